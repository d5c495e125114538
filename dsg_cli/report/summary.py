"""What a run found as one section of Markdown, for the page of a CI job."""

from __future__ import annotations

from collections.abc import Sequence

from dsg_cli.artifacts import AttackReport, EvalReport, Header, Json
from dsg_cli.report.attacks import place, ranking
from dsg_cli.report.evaluations import shown_benches
from dsg_cli.report.expectations import verdicts, verdicts_of_attack
from dsg_cli.report.markdown import code, table
from dsg_cli.report.metrics import refusals, shown_metrics
from dsg_cli.workspace import Stored


def markdown(chain: Sequence[Stored]) -> str:
    """A heading, what was evaluated, its results, expectations and attacks, and the ids of all artifacts.

    Args:
        chain: Artifacts of one guardrail, or of several that were put on one model together; at least one evaluation
            or attack.
    """
    guardrails = dict.fromkeys(_guardrails(chain))
    parts = [
        f"## dsg: {', '.join(guardrails) or 'no guardrail'}",
        _provenance(chain[-1].header, list(guardrails)),
        *(_evaluation(stored) for stored in chain if isinstance(stored.body, EvalReport)),
        *(_expectations(stored.body) for stored in chain if isinstance(stored.body, EvalReport | AttackReport)),
        _attacks([stored.body for stored in chain if isinstance(stored.body, AttackReport)]),
        f"Artifacts: {', '.join(code(stored.id) for stored in chain)}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _guardrails(chain: Sequence[Stored]) -> list[str]:
    """Ids of the guardrails that were evaluated or attacked."""
    judged = [stored for stored in chain if stored.header.kind in ("eval", "attack")]
    return [item.id for stored in judged for item in stored.header.inputs]


def _provenance(header: Header, guardrails: Sequence[str]) -> str:
    sae = f"; SAE {code(header.sae.source)} at {code(header.sae.hook)}" if header.sae else ""
    commit = header.git.get("commit", "")[:10]
    built = f" ({commit}{', changed' if header.git.get('dirty') else ''})" if commit else ""
    return (
        f"Guardrail {', '.join(map(code, guardrails))} on model {code(header.model.source)}{sae}; "
        f"dsg {header.dsg_version}{built}; {header.device}, {header.dtype}, seed {header.seed}; {header.created}."
    )


def _evaluation(stored: Stored) -> str:
    body = stored.body_as(EvalReport)
    shown = shown_benches(body, stored.header.settings.get("benches", []))
    rows = [row for bench in shown for row in _bench(bench, body.results[bench], body.gate.get(bench))]
    text = table(["bench", "base", "guarded", "95 % interval", "gated", "n"], rows)
    n_more = len(body.results) - len(shown)
    text += f"\n\n{n_more} parts more in {code(stored.id)}." if n_more else ""
    return text + "".join(f"\n\n{one}." for one in refusals(body.refused))


def _bench(bench: str, sides: Json, gate: Json | None) -> list[list[str]]:
    """A row a metric."""
    base, after = sides["base"], sides["unlearned"]
    asked = base.get("n_asked")
    rows = []
    for metric in shown_metrics(sides):
        low, high = after.get(f"{metric}_low"), after.get(f"{metric}_high")
        rows.append(
            [
                code(bench if metric == "acc" else f"{bench}.{metric}", in_table=True),
                _share(base.get(metric)),
                _share(after.get(metric)),
                f"{low:.3f} to {high:.3f}" if low is not None and high is not None else "-",
                _share(gate["rate"] if gate else None),
                str(after["n"]) + (f" of {asked}" if asked else ""),
            ]
        )
    return rows


def _expectations(body: EvalReport | AttackReport) -> str:
    if not body.expected:
        return ""
    rows = [
        ["✅" if one.is_met else "❌", code(one.expect, in_table=True), one.base, one.unlearned, one.bound, one.n]
        for one in (verdicts(body) if isinstance(body, EvalReport) else verdicts_of_attack(body))
    ]
    return table(["", "expected", "base", "guarded", "bound", "n"], rows)


def _attacks(attacks: Sequence[AttackReport]) -> str:
    """The point of each attack at which most came back."""
    rows = [
        [
            one.attack,
            code(one.bench, in_table=True),
            _share(one.summary["forget_acc_before"]),
            _share(one.summary["forget_acc_worst"]),
            place(one),
            _share(one.summary["unguarded_at_worst"]),
        ]
        for one in ranking(attacks)
    ]
    return table(["attack", "bench", "before", "worst", "at", "unguarded there"], rows) if rows else ""


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
