"""The table and the sentences that end `dsg demo` and `dsg run`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dsg_cli.artifacts import AttackReport, EvalReport, Guardrail, Json, ModelWeights, Threshold
from dsg_cli.report.attacks import share
from dsg_cli.report.evaluations import percent
from dsg_cli.report.published import beside, published_table
from dsg_cli.settings import PublishedSection
from dsg_cli.workspace import Stored


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
            values = (last["unguarded"]["forget_acc"], last["guarded"]["forget_acc"], last["guarded"].get("gate_rate"))
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
