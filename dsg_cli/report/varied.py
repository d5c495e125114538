"""What a study says, in sentences: how far apart its points are."""

from __future__ import annotations

from collections.abc import Iterator

from dsg_cli.artifacts import StudyReport
from dsg_cli.report.attacks import share
from dsg_cli.report.studies import mean_over, points_of


def how_well(body: StudyReport) -> Iterator[str]:
    """The range of accuracies over all points of a study that asked."""
    points = [point for point in points_of(body) if not point[2]]
    said = []
    for bench in body.benches["forget"]:
        found = [point[1][bench, "acc"]["value"] for point in points if (bench, "acc") in point[1]]
        base = share(body.base.get(bench, {}).get("acc"))
        said += [f"{bench} {_range(found)} (base {base}, guessing {body.chance:.2f})"] if _range(found) else []
    kept = _range([mean_over(point, body.benches["other"]) for point in points])
    said += [f"mean of {', '.join(body.benches['other'])} {kept}"] if kept else []
    if said:
        yield f"Study {body.study}, {len(points)} points on {body.split} questions: {'; '.join(said)}."


def costs(body: StudyReport) -> Iterator[str]:
    """The ranges of false positives and of the time that a guarded pass takes beyond a plain one."""
    rows = [row for row in body.rows if row["value"] is not None]
    for metric, name, digits in (
        ("false_positive_rate", "fresh retain text gated", ".1%"),
        ("overhead", "time of a guarded pass over a plain one", "+.1%"),
    ):
        found = _range([row["value"] for row in rows if row["metric"] == metric], digits)
        if found:
            yield f"Study {body.study}: {name} {found}."


def _range(values: list[float | None], digits: str = ".2f") -> str:
    known = [one for one in values if one is not None]
    low, high = (format(one, digits) for one in (min(known), max(known))) if known else ("", "")
    return low if low == high else f"{low} to {high}"
