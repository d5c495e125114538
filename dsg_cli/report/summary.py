"""What a run found: as one section of Markdown for the page of a CI job, as one JSON object, and as one table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rich.console import Group

from dsg_cli.report.evaluations import (
    benches_of,
    beside,
    expectation_rows,
    place,
    published_table,
    ranking,
    refusals,
    shown_metrics,
)
from dsg_cli.report.rendering import Name, Table, View, code, interval, share, terminal
from dsg_cli.settings import PublishedSection
from dsg_cli.workspace.artifacts import Guardrail, Header, ModelWeights, Threshold
from dsg_cli.workspace.body import Json
from dsg_cli.workspace.results import AttackReport, EvalReport
from dsg_cli.workspace.store import Stored


def markdown(chain: Sequence[Stored]) -> str:
    """A heading, what was evaluated, its results, expectations and attacks, and the ids of all artifacts.

    The chain is of one guardrail, or of several together on one model, with at least one evaluation or attack.
    """
    evaluations = [stored for stored in chain if isinstance(stored.body, EvalReport)]
    judged = [stored.body for stored in chain if isinstance(stored.body, EvalReport | AttackReport)]
    attacks = [body for body in judged if isinstance(body, AttackReport)]
    inputs = [used.id for stored in chain if stored.header.kind in ("eval", "attack") for used in stored.header.inputs]
    guardrails = list(dict.fromkeys(inputs))
    parts = [
        f"## dsg: {', '.join(guardrails) or 'no guardrail'}",
        _provenance(chain[-1].header, guardrails),
        *map(_evaluation, evaluations),
        *(_expectation_table(body).markdown() for body in judged if body.expected),
        *([_attack_table(attacks).markdown()] if attacks else []),
        f"Artifacts: {', '.join(code(stored.id) for stored in chain)}.",
    ]
    return "\n\n".join(parts) + "\n"


def _provenance(header: Header, guardrails: Sequence[str]) -> str:
    sae = f"; SAE {code(header.sae.source)} at {code(header.sae.hook)}" if header.sae else ""
    commit = header.git.get("commit", "")[:10]
    built = f" ({commit}{', changed' if header.git.get('dirty') else ''})" if commit else ""
    return (
        f"Guardrail {', '.join(map(code, guardrails))} on model {code(header.model.source)}{sae}; "
        f"dsg {header.dsg_version}{built}; {header.device}, {header.dtype}, seed {header.seed}; {header.created}."
    )


def _evaluation(stored: Stored) -> str:
    body, benches = stored.body_as(EvalReport), benches_of(stored)
    rows = [row for bench in benches for row in _bench_rows(bench, body.results[bench], body.gate.get(bench))]
    text = Table(("bench", "base", "guarded", "95 % interval", "gated", "n"), rows).markdown()
    if n_more := len(body.results) - len(benches):
        text += f"\n\n{n_more} parts more in {code(stored.id)}."
    return text + "".join(f"\n\n{sentence}." for sentence in refusals(body.refused))


def _bench_rows(bench: str, sides: Json, gate: Json | None) -> list[list[str]]:
    """A row a metric."""
    base, unlearned = sides["base"], sides["unlearned"]
    n_asked = f" of {base['n_asked']}" if base.get("n_asked") else ""
    ends = [share(gate["rate"] if gate else None, 3), f"{unlearned['n']}{n_asked}"]
    rows = []
    for metric in shown_metrics(sides):
        values = [share(base.get(metric), 3), share(unlearned.get(metric), 3)]
        name = Name(bench if metric == "acc" else f"{bench}.{metric}")
        rows.append([name, *values, interval(unlearned, metric, ".3f", " to "), *ends])
    return rows


def _expectation_table(body: EvalReport | AttackReport) -> Table:
    rows = []
    for row in expectation_rows(body):
        rows.append(["✅" if row.is_met else "❌", Name(row.expect), row.base, row.unlearned, row.bound, row.n])
    return Table(("", "expected", "base", "guarded", "bound", "n"), rows)


def _attack_table(attacks: Sequence[AttackReport]) -> Table:
    rows = []
    for body in ranking(attacks):
        keys = ("forget_acc_before", "forget_acc_worst", "unguarded_at_worst")
        before, worst, unguarded = (share(body.summary[key], 3) for key in keys)
        rows.append([body.attack, Name(body.bench), before, worst, place(body), unguarded])
    return Table(("attack", "bench", "before", "worst", "at", "unguarded there"), rows)


def chain_summary(chain: Sequence[Stored], published: PublishedSection | None = None) -> Json:
    """The chain's artifacts and its main numbers as one JSON object."""
    summary: Json = {"artifacts": [stored.id for stored in chain]}
    for stored in chain:
        body = stored.body
        if isinstance(body, ModelWeights):
            summary["trained_on"] = body.trained.get("corpora", [])
        elif isinstance(body, Threshold):
            summary |= {name: getattr(body, name) for name in ("threshold", "gate", "false_positive_rate")}
        elif isinstance(body, Guardrail):
            summary |= {"features": body.indices, "forget": body.forget}
        elif isinstance(body, EvalReport):
            summary |= {
                "split": body.split,
                "benches": stored.header.settings["benches"],
                "results": body.results,
                "gate_rate": {bench: gate["rate"] for bench, gate in body.gate.items()},
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
    rows = []
    for bench in summary.get("benches", []):
        sides = summary["results"].get(bench, {"base": {}, "unlearned": {}})
        is_forgotten = bench.split("-novel")[0].removesuffix("-paper") in summary.get("forget", [])
        accuracies = [share(sides[side].get("acc")) for side in ("base", "unlearned")]
        name = f"{bench}{'  (to forget)' if is_forgotten else ''}"
        rows.append([name, *accuracies, share(summary["gate_rate"].get(bench))])
    attacks = summary.get("attacks", {})
    for kind, label in (("relearn", "relearned, {x} steps"), ("dilution", "diluted, {x} benign tokens")):
        if kind in attacks:
            last = attacks[kind]["curve"][-1]
            values = (last["base"]["forget_acc"], last["unlearned"]["forget_acc"], last["unlearned"].get("gate_rate"))
            rows.append([label.format(x=last["x"]), *map(share, values)])
    view: View = [Table(("", "base", "guarded", "gated"), rows)]
    if "published" in summary:
        source = f"Published: {summary['published']['source']}."
        view += ["", source, published_table(summary["published"]["compared"])]
    gate = f"Gate: {summary['gate']} > {summary['threshold']:.3f}" if "threshold" in summary else ""
    rate = summary.get("false_positive_rate")
    if gate and rate is not None:
        gate += f"; false positives on fresh retain text {rate:.3f}."
    return terminal([*view, "", gate, _meaning(summary)])


def _meaning(summary: Json) -> str:
    """What the numbers say, in words, and what they do not."""
    sentences = []
    if "results" in summary:
        sentences.append(
            "Accuracy on four-choice questions; chance is 0.25. A guarded model near chance on what it should forget, "
            "and near its base elsewhere, keeps the knowledge from being asked for plainly."
        )
    dilution = summary.get("attacks", {}).get("dilution", {}).get("summary")
    if dilution and (dilution["forget_acc_worst"] or 0) > dilution["forget_acc_before"] + 0.1:
        is_mean = summary.get("gate") == "mean"
        why = ", because the paper's gate averages over the whole sequence" if is_mean else ""
        sentences.append(
            f"It does not stop everyone: {dilution['worst_x']} harmless tokens around a question bring accuracy "
            f"back to {dilution['forget_acc_worst']:.2f}{why}."
        )
    sentences.append(
        "The knowledge is still in the weights: whoever holds them can take the guardrail off. It protects an API, "
        "not a published model."
    )
    return " ".join(sentences)
