"""A study as a terminal table of at most 80 columns, and as Markdown: a line a point, or strengths side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from dsg_cli.evals.metrics import judged
from dsg_cli.report.rendering import code, share
from dsg_cli.report.rendering import table as markdown_table
from dsg_cli.workspace.results import Json, StudyReport

HEADS = {
    "n_features": "n",
    "ratio_percentile": "ratio %",
    "share": "%",
    "n_documents": "docs",
    "n_entities": "names",
    "n_in_sae": "of",
    "batch_size": "batch",
}
"""Columns of settings that have a shorter name in a table."""

TERMINAL_WIDTH = 80

LEFT_OUT = ("score", "95 %", "of", "false pos.")
"""Columns that go first where a terminal is too narrow."""

Point = tuple[Json, dict[tuple[str, str], Json], str]
"""Settings; bench and metric -> row; what went wrong."""


def study_table(body: StudyReport) -> Group:
    """The table, what its columns are, and which points failed."""
    columns, rows = _narrowed(*table_of(body))
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))
    return Group(table, Text(legend(body)), *(Text(line, style="red") for line in failures(body)))


def study_markdown(body: StudyReport) -> str:
    """The same as Markdown."""
    columns, rows = table_of(body)
    names = [number for number, column in enumerate(columns) if column in ("sae", "hook")]
    shown = [
        [code(cell, in_table=True) if number in names and cell else cell for number, cell in enumerate(row)]
        for row in rows
    ]
    failed = [f"- {' '.join(line.split())}" for line in failures(body)]
    return "\n\n".join([markdown_table(columns, shown), legend(body), *(["\n".join(failed)] if failed else [])])


def study_headline(body: StudyReport) -> str:
    """How many points, on which questions, and the best of them."""
    n_points = f"{body.study}, {body.computed['n_points']} points"
    scored = [(_score(body, point), point) for point in points_of(body)]
    best = max((score for score, _ in scored if score is not None), default=None)
    split = f", {body.split}" if body.base else ""
    return f"{n_points}{split}" + (f", best score {best:.2f}" if best is not None else "")


def table_of(body: StudyReport) -> tuple[list[str], list[list[str]]]:
    """Columns and rows."""
    points = points_of(body)
    if body.study == "length":
        return _lines(body, points, ("threshold", "false pos.", "95 %", "at own", "forget gated"), _length_cells)
    if body.study == "cost":
        return _lines(body, points, ("plain ms", "guarded ms", "overhead", "95 %"), _cost_cells)
    if body.study == "sequential":
        benches = body.benches["forget"]
        return _lines(body, points, (*benches, "rest", "gated of rest"), _sequential_cells)
    if len(body.grid.get("strength", [])) > 1:
        return _strengths(body, points)
    return _lines(body, points, ("forget", "95 %", "gated", "other", "gated", "false pos.", "score"), _guard_cells)


def _narrowed(columns: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Without columns that are left to the CSV, as long as a terminal has no room for all."""
    for name in LEFT_OUT:
        widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
        if sum(widths) + 2 * (len(widths) - 1) > TERMINAL_WIDTH and name in columns:
            place = columns.index(name)
            columns, *rows = [[*cells[:place], *cells[place + 1 :]] for cells in (columns, *rows)]
    return columns, rows


def legend(body: StudyReport) -> str:
    """What the columns are, and on which questions."""
    if body.study == "length":
        return (
            "threshold: what retain text of that length would set. false pos.: of fresh retain text of that length, "
            "under the recipe's threshold; at own: under that length's. forget gated: share of forget text of that "
            "length on which the recipe's gate opens."
        )
    if body.study == "cost":
        return "overhead: guarded over plain, less 1: the median of pairs of passes that took turns, and its interval."
    other = body.benches["other"]
    forget = _forget_bench(body)
    first = body.base.get(forget, {})
    questions = f"Accuracy on {body.split} questions"
    if body.study == "sequential":
        return f"{questions} after each request, chance {body.chance:.2f}; rest: mean of {', '.join(other) or 'none'}."
    said = f"{questions}. forget: {forget} (base {share(first.get('acc'))}, chance {body.chance:.2f}); other: mean of "
    said += f"{', '.join(other) or 'none'}. "
    if len(body.grid.get("strength", [])) > 1:
        return f"{said}Cells: forget / other, by strength."
    return f"{said}false pos.: of fresh retain text. score: harmonic mean of forgetting and utility, as in dsg compare."


def failures(body: StudyReport) -> list[str]:
    """Points, and measures of points, that could not be had: the reason, and the first of those that share it."""
    found: dict[str, list[Json]] = {}
    for row in body.rows:
        if row["error"]:
            found.setdefault(row["error"], []).append(row)
    lines = []
    for error, rows in found.items():
        where = ", ".join(f"{HEADS.get(name, name)} {_shown(rows[0].get(name))}" for name in body.grid)
        more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        lines.append(f"{where}{more}: {error}")
    return lines


def points_of(body: StudyReport) -> list[Point]:
    """The rows of each point together, in their order."""
    found: dict[str, Point] = {}
    for row in body.rows:
        settings = {name: row.get(name) for name in body.grid}
        place = found.setdefault(repr(settings), (settings | {name: row.get(name) for name in body.columns}, {}, ""))
        if row["error"] and not row["metric"]:
            found[repr(settings)] = (*place[:2], row["error"])
        else:
            place[1][row["bench"], row["metric"]] = row
    return list(found.values())


def _lines(
    body: StudyReport,
    points: Sequence[Point],
    measured: Sequence[str],
    cells_of: Callable[[StudyReport, Point], list[str]],
) -> tuple[list[str], list[list[str]]]:
    """A line a point; settings that do not vary are left out, unless none does."""
    columns = [name for name in body.columns if len({repr(point[0][name]) for point in points}) > 1]
    columns = columns or list(body.grid)[:1]
    rows = [
        [_shown(point[0][name]) for name in columns]
        + (["failed", *[""] * (len(measured) - 1)] if point[2] else cells_of(body, point))
        for point in points
    ]
    return [*(HEADS.get(name, name) for name in columns), *measured], rows


def _strengths(body: StudyReport, points: Sequence[Point]) -> tuple[list[str], list[list[str]]]:
    """Strengths side by side: forget / other accuracy."""
    strengths = body.grid["strength"]
    rest = [name for name in body.grid if name != "strength" and len(body.grid[name]) > 1]
    found: dict[str, tuple[Json, dict[str, str]]] = {}
    for point in points:
        key = repr([point[0][name] for name in rest])
        found.setdefault(key, (point[0], {}))[1][point[0]["strength"]] = _pair(body, point)
    rows = [
        [*(_shown(settings[name]) for name in rest), *(cells.get(one, "") for one in strengths)]
        for settings, cells in found.values()
    ]
    return [*(HEADS.get(name, name) for name in rest), *strengths], rows


def _forget_bench(body: StudyReport) -> str:
    return next(iter(body.benches["forget"]), "")


def _pair(body: StudyReport, point: Point) -> str:
    if point[2]:
        return "failed"
    return f"{share(_value(point, _forget_bench(body), 'acc'))} / {share(mean_over(point, body.benches['other']))}"


def _guard_cells(body: StudyReport, point: Point) -> list[str]:
    forget = point[1].get((_forget_bench(body), "acc"), {})
    return [
        share(forget.get("value")),
        _interval(forget),
        share(forget.get("gate_rate")),
        share(mean_over(point, body.benches["other"])),
        share(mean_over(point, body.benches["other"], "gate_rate")),
        _rate(_value(point, "", "false_positive_rate")),
        share(_score(body, point)),
    ]


def _sequential_cells(body: StudyReport, point: Point) -> list[str]:
    of_requests = [share(_value(point, bench, "acc")) for bench in body.benches["forget"]]
    rest = body.benches["other"]
    return [*of_requests, share(mean_over(point, rest)), share(mean_over(point, rest, "gate_rate"))]


def _length_cells(_body: StudyReport, point: Point) -> list[str]:
    false = point[1].get(("", "false_positive_rate"), {})
    return [
        share(_value(point, "", "threshold")),
        _rate(false.get("value")),
        _interval(false, 3),
        _rate(_value(point, "", "own_false_positive_rate")),
        share(_value(point, "", "forget_gate_rate")),
    ]


def _cost_cells(_body: StudyReport, point: Point) -> list[str]:
    seconds = [_value(point, "", f"{way}_seconds") for way in ("plain", "guarded")]
    overhead = point[1].get(("", "overhead"), {})
    value, low, high = (overhead.get(name) for name in ("value", "low", "high"))
    return [
        *(f"{1000 * one:.2f}" if one is not None else "-" for one in seconds),
        "-" if value is None else f"{value:+.1%}",
        "-" if low is None or high is None else f"{low:+.1%} to {high:+.1%}",
    ]


def _score(body: StudyReport, point: Point) -> float | None:
    """As dsg compare judges; of a study of one bench that is to be forgotten."""
    benches = body.benches["forget"]
    if len(benches) != 1 or point[2]:
        return None
    found = {bench: _value(point, bench, "acc") for bench in (*benches, *body.benches["other"])}
    known = {bench: value for bench, value in found.items() if value is not None and bench in body.base}
    if benches[0] not in known:
        return None
    base = {bench: body.base[bench]["acc"] for bench in known}
    score: float = judged(benches[0], known, base, body.chance)["score"]
    return score


def _value(point: Point, bench: str, metric: str, column: str = "value") -> float | None:
    value: float | None = point[1].get((bench, metric), {}).get(column)
    return value


def mean_over(point: Point, benches: Sequence[str], column: str = "value") -> float | None:
    """Mean over the benches that were asked at a point; of a column of its rows."""
    found = [_value(point, bench, "acc", column) for bench in benches]
    known = [one for one in found if one is not None]
    return sum(known) / len(known) if known else None


def _interval(row: Json, digits: int = 2) -> str:
    if row.get("low") is None or row["high"] is None:
        return "-"
    return f"{row['low']:.{digits}f}-{row['high']:.{digits}f}"


def _rate(value: float | None) -> str:
    """One that is small."""
    return "-" if value is None else f"{value:.3f}"


def _shown(value: object) -> str:
    if value is None:
        return ""
    text = f"{value:g}" if isinstance(value, float) else str(value).rsplit("/", 1)[-1]
    return text.replace(".hook_", ".")


def how_well_varied(body: StudyReport) -> Iterator[str]:
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


def costs_varied(body: StudyReport) -> Iterator[str]:
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
