"""What a run found as one section of Markdown, for the page of a CI job."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dsg_cli.report.evaluations import (
    beside,
    percent,
    place,
    published_table,
    ranking,
    refusals,
    shown_benches,
    shown_metrics,
    verdicts,
    verdicts_of_attack,
)
from dsg_cli.report.rendering import code, share, table
from dsg_cli.settings import PublishedSection
from dsg_cli.workspace.artifacts import Guardrail, Header, ModelWeights, Threshold
from dsg_cli.workspace.results import AttackReport, EvalReport, Json
from dsg_cli.workspace.store import Stored


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


def chain_summary(chain: Sequence[Stored], published: PublishedSection | None = None) -> Json:
    """The chain's artifacts and its main numbers as one JSON object."""
    summary: Json = {"artifacts": [stored.id for stored in chain]}
    for stored in chain:
        body = stored.body
        if isinstance(body, ModelWeights):
            summary["trained_on"] = body.trained.get("corpora", [])
        elif isinstance(body, Threshold):
            summary |= {
                "threshold": body.threshold,
                "gate": body.gate,
                "false_positive_rate": body.false_positive_rate,
            }
        elif isinstance(body, Guardrail):
            summary |= {"features": body.indices, "forget": body.forget}
        elif isinstance(body, EvalReport):
            summary |= {
                "split": body.split,
                "benches": stored.header.settings["benches"],
                "results": body.results,
                "gate_rate": {bench: found["rate"] for bench, found in body.gate.items()},
                "expected": body.expected,
            }
        elif isinstance(body, AttackReport):
            summary.setdefault("attacks", {})[body.attack] = {"curve": body.curve, "summary": body.summary}
    summary["seconds"] = round(sum(stored.header.seconds for stored in chain), 1)
    summary["peak_memory_mb"] = max(stored.header.peak_memory_mb for stored in chain)
    if published is not None and published.results:
        rows = beside(published, summary.get("results", {}))
        summary["published"] = dataclasses.asdict(published) | {"compared": rows}
    return summary


def chain_table(chain: Sequence[Stored], published: PublishedSection | None = None) -> Group:
    """One table for the whole chain, and what it means and does not mean."""
    summary = chain_summary(chain, published)
    table = Table("", "base", "guarded", "gated", box=None, pad_edge=False)
    for bench in summary.get("benches", []):
        sides = summary["results"].get(bench, {"base": {}, "unlearned": {}})
        is_forgotten = bench.split("-novel")[0].removesuffix("-paper") in summary["forget"]
        mark = "  (to forget)" if is_forgotten else ""
        rate = summary["gate_rate"].get(bench)
        table.add_row(
            f"{bench}{mark}",
            percent(sides, "base"),
            percent(sides, "unlearned"),
            "-" if rate is None else f"{rate:.2f}",
        )
    attacks = summary.get("attacks", {})
    for name, label in (("relearn", "relearned, {x} steps"), ("dilution", "diluted, {x} benign tokens")):
        if name in attacks:
            last = attacks[name]["curve"][-1]
            values = (last["base"]["forget_acc"], last["unlearned"]["forget_acc"], last["unlearned"].get("gate_rate"))
            table.add_row(label.format(x=last["x"]), *map(share, values))
    cut = f"Gate: {summary['gate']} > {summary['threshold']:.3f}" if "threshold" in summary else ""
    rate = summary.get("false_positive_rate")
    found = f"{cut}; false positives on fresh retain text {rate:.3f}." if cut and rate is not None else cut
    theirs: list[RenderableType] = []
    if "published" in summary:
        source = Text(f"Published: {summary['published']['source']}.")
        theirs = [Text(""), source, published_table(summary["published"]["compared"])]
    return Group(table, *theirs, Text(""), Text(found), Text(meaning(summary)))


def meaning(summary: Json) -> str:
    """What the numbers say, in words, and what they do not."""
    attacks = summary.get("attacks", {})
    sentences = []
    if "results" in summary:
        sentences.append(
            "Accuracy on four-choice questions; chance is 0.25. A guarded model near chance on what it should forget, "
            "and near its base elsewhere, keeps the knowledge from being asked for plainly."
        )
    if "dilution" in attacks:
        found = attacks["dilution"]["summary"]
        if (found["forget_acc_worst"] or 0) > found["forget_acc_before"] + 0.1:
            is_mean = summary.get("gate") == "mean"
            why = ", because the paper's gate averages over the whole sequence" if is_mean else ""
            sentences.append(
                f"It does not stop everyone: {found['worst_x']} harmless tokens around a question bring accuracy "
                f"back to {found['forget_acc_worst']:.2f}{why}."
            )
    sentences.append(
        "The knowledge is still in the weights: whoever holds them can take the guardrail off. It protects an API, "
        "not a published model."
    )
    return " ".join(sentences)
