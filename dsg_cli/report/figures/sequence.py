"""Requests one after another: what each method forgot so far, and what is left of the rest."""

from __future__ import annotations

from dsg_cli.artifacts import Comparison
from dsg_cli.report.figures.comparison import mean_of
from dsg_cli.report.figures.heat import heat_map
from dsg_cli.report.figures.style import Drawn, drawing


def draw(artifact: str, body: Comparison) -> Drawn | None:
    """A line a method and a column a request, for lines of a chart would lie on one another."""
    sequences = [one for one in body.sequences if len(one["curve"]) > 1]
    if not sequences:
        return None
    requests = list(dict.fromkeys(point["request"] for one in sequences for point in one["curve"]))
    forgotten = [body.benches["forget"], *requests[1:]]
    kept = [name for name in (*body.benches["near"], *body.benches["other"]) if name not in forgotten]
    gone = [
        [mean_of(point["results"], forgotten[: i + 1]) for i, point in enumerate(one["curve"])] for one in sequences
    ]
    rest = [[mean_of(point["results"], kept) for point in one["curve"]] for one in sequences]
    names = [one["method"] for one in sequences]
    with drawing(6.6, 1.2 + 0.25 * len(names), ncols=2, sharey=True) as (figure, panels):
        for axes, grid, what in zip(panels, (gone, rest), ("to forget so far", "never to be forgotten"), strict=True):
            heat_map(axes, grid, names, range(1, len(requests) + 1), f"accuracy, {what}")
            axes.set_xlabel("after request")
    said = [
        f"{name} {_said(of_gone[-1])} and {_said(of_rest[-1])}"
        for name, of_gone, of_rest in zip(names, gone, rest, strict=True)
    ]
    numbered = ", ".join(f"{i}: {name}" for i, name in enumerate(requests, start=1))
    title = (
        "Requests one after another: mean accuracy on all that was to be forgotten by then (better low), and on what "
        f"is never to be forgotten (better high). {numbered}."
    )
    return Drawn(f"{artifact}-sequence", artifact, title, f"After the last request: {'; '.join(said)}.", figure)


def _said(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
