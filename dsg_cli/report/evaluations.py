"""Evaluations as terminal tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from dsg_cli.artifacts import EvalReport, Json
from dsg_cli.report.expectations import met, verdicts
from dsg_cli.report.methods import composed
from dsg_cli.report.metrics import interval, number, refusals, shown_metrics


def evaluation_table(body: EvalReport, named: Sequence[str]) -> Table:
    """What was measured, a row a bench or, of one on free text, a row a metric."""
    has_reference = any("reference" in sides for sides in body.results.values())
    of_all = ("bench", "questions", "base", "guarded", "95 %", "gated", "reference")
    # In 80 columns: beside a reference, the number of questions and how many were gated stand with the bench.
    left_out = {"questions", "gated"} if has_reference else {"reference"}
    columns = [name for name in of_all if name not in left_out]
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, no_wrap=name == "bench")
    shown = shown_benches(body, named)
    for bench in shown:
        for row in _rows_of_bench(bench, body, has_reference):
            table.add_row(*(row.get(name, "") for name in columns))
    for one in verdicts(body):
        verdict: dict[str, str | Text] = {"bench": Text(one.expect), "guarded": one.unlearned, "95 %": one.bound}
        verdict[columns[-1]] = met(one.is_met)
        table.add_row(*(verdict.get(name, "") for name in columns))
    remarks = [composed(body.composition)] if body.composition else []
    if len(shown) < len(body.results):
        remarks.append(f"{len(body.results) - len(shown)} parts more with --json")
    remarks += [f"{n} answers of the base model are from {name}" for name, n in body.base_from.items()]
    remarks += refusals(body.refused)
    table.caption = "; ".join(remarks) or None
    return table


def _rows_of_bench(bench: str, body: EvalReport, has_reference: bool) -> Iterator[dict[str, str]]:
    """One row for accuracy; of a bench without one, a row a metric after the first, which says the rest."""
    sides, gate = body.results[bench], body.gate.get(bench)
    base, after = sides["base"], sides["unlearned"]
    n = str(base["n"]) + (f" of {base['n_asked']}" if base.get("n_asked") else "")
    gated = f"{gate['rate']:.2f}" if gate else "-"
    head = {"bench": f"{bench}, {n}, gated {gated}" if has_reference else bench, "questions": n, "gated": gated}
    metrics = shown_metrics(sides)
    if metrics == ["acc"]:
        shares = {"base": percent(sides, "base"), "guarded": percent(sides, "unlearned")}
        yield head | shares | {"95 %": interval(after, "acc")}
        return
    yield head
    for metric in metrics:
        row = {"bench": f"  {metric}", "base": number(base.get(metric)), "guarded": number(after[metric])}
        row |= {"95 %": interval(after, metric)}
        if f"gated_{metric}" in after:
            row["gated"] = f"{after[f'gated_{metric}']:.2f}"
        if "reference" in sides:
            row["reference"] = number(sides["reference"].get(metric))
        yield row


def percent(sides: Json, side: str) -> str:
    """Accuracy of one side, or a dash."""
    value = sides[side].get("acc")
    return "-" if value is None else f"{value:.2f}"


def first_metric(sides: Json) -> str:
    """The first metric of the unlearned side."""
    metric = shown_metrics(sides)[0]
    return percent(sides, "unlearned") if metric == "acc" else f"{metric} {number(sides['unlearned'].get(metric))}"


def shown_benches(body: EvalReport, named: Sequence[str]) -> list[str]:
    """Of an evaluation's benches those that were named, not their parts."""
    return [bench for bench in body.results if bench in named] or list(body.results)
