"""What a gate and features saw of a prompt: the text in colours, and a table of its tokens."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from dsg_cli.report.heat import heat
from dsg_cli.report.plain import visible
from dsg_cli.stages.trace import Traced
from dsg_cli.tracing import GateSteps, Trace

SHORT = 48
"""Tokens of a text that is shown whole in the table."""
TOKEN_WIDTH = 14


def trace_view(traced: Traced) -> Group:
    """One prompt: what happened in a sentence, the text, the tokens."""
    seen = traced.trace
    return Group(
        Text(f"{traced.inspected}: {_told(seen)}", style="bold"), Text(), _line(seen), Text(), _table(seen), Text()
    )


def _told(seen: Trace) -> str:
    gate = seen.gate
    if gate is None:
        return f"{len(seen.features)} features; coloured by the strongest of them"
    rule = f"{gate.form} > {gate.threshold:.3f}"
    if not any(gate.gated):
        return f"{rule} stayed shut, at {_number(max_statistic(gate))}; nothing was clamped"
    if gate.latched_at is None:
        opened = f"gated the whole text, at {_number(max_statistic(gate))}"
    else:
        at = gate.latched_at
        opened = f"opened at token {at + 1} of {len(seen.tokens)}, {visible(seen.tokens[at].strip())!r}"
    n = sum(gate.clamped)
    return f"{rule} {opened}; {n} token{'' if n == 1 else 's'} clamped, largest edit {max(gate.edit):.2g}"


def max_statistic(gate: GateSteps) -> float | None:
    """The largest; None where one counts as infinite."""
    found = [one for one in gate.statistic if one is not None]
    return max(found) if len(found) == len(gate.statistic) else None


def _line(seen: Trace) -> Text:
    gate = seen.gate
    if gate is None:
        values = _strongest(seen)
        return heat(seen.tokens, values, largest=max(values))
    above = [max(score - gate.floor, 0.0) for score in gate.score]
    # What is below the threshold is weak, however strong the text's strongest is.
    return heat(seen.tokens, above, largest=max(*above, gate.threshold - gate.floor), marked=gate.latched_at)


def _strongest(seen: Trace) -> list[float]:
    return [max((abs(one) for one in of_token), default=0.0) for of_token in zip(*seen.activations, strict=True)]


def _table(seen: Trace) -> Table:
    gate = seen.gate
    columns = ["#", "token", *(["score", "statistic", "gate", "edit"] if gate else []), "strongest features"]
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns:
        column.no_wrap, column.overflow = True, "ellipsis"
    for column in table.columns[2 : 4 if gate else 2]:
        column.justify = "right"
    table.columns[1].max_width = TOKEN_WIDTH
    shown = [i for i in range(len(seen.tokens)) if len(seen.tokens) <= SHORT or _is_worth_a_row(seen, i)]
    for i in shown:
        cells = _gate_cells(gate, i, is_counted=seen.counted[i]) if gate else []
        table.add_row(str(i + 1), Text(visible(seen.tokens[i].strip(" "))), *cells, _features(seen, i))
    left_out = len(seen.tokens) - len(shown)
    notes = ["* is clamped where the gate is open" if gate else "* would be clamped"]
    notes += [f"{left_out} tokens on which no feature is active are left out"] if left_out else []
    table.caption = Text("; ".join(notes), style="dim")
    return table


def _is_worth_a_row(seen: Trace, i: int) -> bool:
    return any(acts[i] for acts in seen.activations) or (seen.gate is not None and i == seen.gate.latched_at)


def _gate_cells(gate: GateSteps, i: int, *, is_counted: bool) -> list[str]:
    opened = "opens" if i == gate.latched_at else "open" if gate.gated[i] else ""
    score = f"{gate.score[i]:.2f}" if is_counted else "-"
    return [score, _number(gate.statistic[i]), opened, f"{gate.edit[i]:.2g}" if gate.clamped[i] else ""]


def _features(seen: Trace, i: int) -> Text:
    pairs = zip(seen.features, seen.activations, strict=True)
    active = sorted(((abs(acts[i]), acts[i], one) for one, acts in pairs if acts[i]), key=lambda each: -each[0])
    most = 2 if seen.gate else 4
    parts = [f"{one.index}{'*' if 'clamped' in one.roles else ''} {value:.3g}" for _, value, one in active[:most]]
    return Text("  ".join(parts) + (f"  +{len(active) - most}" if len(active) > most else ""))


def _number(value: float | None) -> str:
    return "inf" if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"
