"""Attacks as tables: the curve of one, and several ranked by what they brought back."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from dsg_cli.artifacts import AttackReport, Json
from dsg_cli.attacks.names import KINDS
from dsg_cli.report.console import captioned
from dsg_cli.report.expectations import met, verdicts_of_attack

NOT_MEASURABLE = "not measurable on this model"


def curve_table(body: AttackReport) -> Table:
    """Every point of one attack; forget accuracies with their intervals."""
    variants = list(dict.fromkeys(point["variant"] for point in body.curve))
    has_variants = len(variants) > 1
    has_utility = any("utility_acc" in point["guarded"] for point in body.curve)
    columns = [*(["variant"] if has_variants else []), unit(body.attack) or "how"]
    table = Table(*columns, "guarded", "95 %", "gated", "unguarded", box=None, pad_edge=False)
    if has_utility:
        table.add_column("utility")
    above = None
    for point in body.curve:
        guard, variant = point["guarded"], point["variant"]
        cells = [
            *([variant if variant != above else ""] if has_variants else []),
            shown(point["x"]),
            f"{guard['forget_acc']:.2f}",
        ]
        cells += [interval(guard), share(guard.get("gate_rate")), share(point["unguarded"]["forget_acc"])]
        table.add_row(*cells, *([share(guard.get("utility_acc"))] if has_utility else []))
        above = variant
    for one in verdicts_of_attack(body):
        mark = met(one.is_met)
        table.add_row(*([""] if has_variants else []), Text(one.expect), one.unlearned, one.bound, mark, one.base)
    before = body.before
    how = f" Variant: {variants[0]}." if variants[:1] not in ([], [""]) and not has_variants else ""
    table.caption = (
        f"{body.threat_model}{how} Without the attack: guarded {before['guarded']['forget_acc']:.2f}, "
        f"unguarded {before['unguarded']['forget_acc']:.2f}."
        + ("" if body.summary["n_measurable"] else f" {NOT_MEASURABLE.capitalize()}: unguarded, it cannot answer.")
        + evasions(body)
    )
    return table


def attack_headline(body: AttackReport) -> str:
    """What came back at most, and what there was without the attack."""
    found = body.summary
    if not found["n_measurable"]:
        return f"{body.attack} on {body.bench}: {NOT_MEASURABLE}"
    return (
        f"{body.attack} on {body.bench}: {share(found['forget_acc_worst'])}, before {share(found['forget_acc_before'])}"
    )


def evasions(body: AttackReport) -> str:
    """Where each variant first brought back more than half of what the guard took away."""
    first = [f"{variant + ': ' if variant else ''}{shown(x)}" for variant, x in body.summary["evaded_at"].items()]
    return f" Above {body.summary['evades_above']:.2f} from {'; '.join(first)}." if first else ""


def ranking(attacks: Sequence[AttackReport]) -> list[AttackReport]:
    """What brought back most first; what could not be measured last."""
    return sorted(attacks, key=lambda one: -(one.summary["forget_acc_worst"] or 0))


def ranking_table(attacks: Sequence[AttackReport]) -> Group:
    """One line an attack, at the point where most came back."""
    table = Table("attack", "before", "worst", "gated", "unguarded", "where", box=None, pad_edge=False)
    for one in ranking(attacks):
        found = one.summary
        cells = (found["forget_acc_before"], found["forget_acc_worst"], found["gate_rate_at_worst"])
        where = place(one) if found["n_measurable"] else NOT_MEASURABLE
        table.add_row(one.attack, *map(share, cells), share(found["unguarded_at_worst"]), where)
    table.caption = "Accuracy on forget questions, guarded, where most came back; and the unguarded model there."
    return captioned(table)


def place(one: AttackReport) -> str:
    """The variant and the x at which most came back."""
    found = one.summary
    if not found["n_measurable"]:
        return "-"
    return " ".join(part for part in (found["worst_variant"], shown(found["worst_x"]), unit(one.attack)) if part)


def unit(kind: str) -> str:
    """What the x of an attack's curve counts."""
    return KINDS[kind].unit if kind in KINDS else "x"


def shown(x: float | str) -> str:
    """The x of a point."""
    return x if isinstance(x, str) else f"{x:g}"


def share(value: float | None) -> str:
    """A rate, or a dash."""
    return "-" if value is None else f"{value:.2f}"


def interval(side: Json) -> str:
    """The 95 % interval of a forget accuracy."""
    has_interval = {"forget_low", "forget_high"} <= set(side)
    return f"{side['forget_low']:.2f}-{side['forget_high']:.2f}" if has_interval else "-"
