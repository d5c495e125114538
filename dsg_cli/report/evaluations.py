"""Evaluations as terminal tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from dsg_cli.artifacts import EvalReport, Json
from dsg_cli.report.expectations import verdicts
from dsg_cli.report.methods import composed
from dsg_cli.report.metrics import interval, number, refusals, shown_metrics


def evaluation_table(body: EvalReport, named: Sequence[str]) -> Table:
    """What was measured, a row a bench or, of one on free text, a row a metric."""
    has_reference = any("reference" in sides for sides in body.results.values())
    columns = ["bench", "questions", "base", "guarded", "95 %", "gated"]
    columns = [*columns[:1], "n", *columns[2:], "reference"] if has_reference else columns
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, no_wrap=i == 0)
    shown = shown_benches(body, named)
    for bench in shown:
        for row in _rows_of_bench(bench, body):
            table.add_row(*row[: len(columns)])
    for one in verdicts(body):
        table.add_row(Text(one.expect), "", "", one.unlearned, one.bound, "met" if one.is_met else "NOT MET")
    remarks = [composed(body.composition)] if body.composition else []
    if len(shown) < len(body.results):
        remarks.append(f"{len(body.results) - len(shown)} parts more with --json")
    remarks += [f"{n} answers of the base model are from {name}" for name, n in body.base_from.items()]
    remarks += refusals(body.refused)
    table.caption = "; ".join(remarks) or None
    return table


def _rows_of_bench(bench: str, body: EvalReport) -> Iterator[list[str]]:
    """One row for accuracy; of a bench without one, a row a metric after the first, which says the rest."""
    sides, gate = body.results[bench], body.gate.get(bench)
    base, after = sides["base"], sides["unlearned"]
    n = str(base["n"]) + (f" of {base['n_asked']}" if base.get("n_asked") else "")
    gated = f"{gate['rate']:.2f}" if gate else "-"
    metrics = shown_metrics(sides)
    if metrics == ["acc"]:
        low_high = f"{after['acc_low']:.2f}-{after['acc_high']:.2f}" if {"acc_low", "acc_high"} <= set(after) else "-"
        yield [bench, n, percent(sides, "base"), percent(sides, "unlearned"), low_high, gated, ""]
        return
    yield [bench, n, "", "", "", gated, ""]
    for metric in metrics:
        yield [
            f"  {metric}",
            "",
            number(base.get(metric)),
            number(after[metric]),
            interval(after, metric),
            f"{after[f'gated_{metric}']:.2f}" if f"gated_{metric}" in after else "",
            number(sides["reference"].get(metric)) if "reference" in sides else "",
        ]


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
