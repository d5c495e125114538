"""A study as a table and in words: a line a point, or strengths side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from rich.console import Group

from dsg_cli.evals.metrics import unlearning_score
from dsg_cli.report.rendering import Name, Styled, Table, View, fold, interval, share, spread, terminal
from dsg_cli.workspace.body import Json
from dsg_cli.workspace.results import StudyReport

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
LEFT_OUT = ("score", "95 %", "of", "false pos.")  # Columns that go first where a terminal is too narrow.
Point = tuple[Json, dict[tuple[str, str], Json], str]  # Settings; bench and metric -> row; what went wrong.


def study_view(body: StudyReport) -> View:
    """The table with all its columns, what they are, and which points failed."""
    return [points_table(body), legend(body), *(Styled(line, "red") for line in failures(body))]


def study_table(body: StudyReport) -> Group:
    """The same for a terminal, without columns that are left to the CSV, as long as there is no room for all."""
    table, *lines = study_view(body)
    assert isinstance(table, Table)
    columns, rows = list(table.columns), [list(row) for row in table.rows]
    for name in LEFT_OUT:
        widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
        if sum(widths) + 2 * (len(widths) - 1) > TERMINAL_WIDTH and name in columns:
            place = columns.index(name)
            columns, *rows = [[*cells[:place], *cells[place + 1 :]] for cells in (columns, *rows)]
    return terminal([replace(table, columns=columns, rows=rows), *lines])


def study_markdown(body: StudyReport) -> str:
    """The same as Markdown."""
    failed = [f"- {' '.join(line.split())}" for line in failures(body)]
    return "\n\n".join([points_table(body).markdown(), legend(body), *(["\n".join(failed)] if failed else [])])


def study_headline(body: StudyReport) -> str:
    """How many points, on which questions, and the best of them."""
    best = max((score for point in points_of(body) if (score := _score(body, point)) is not None), default=None)
    split, known = f", {body.split}" if body.base else "", "" if best is None else f", best score {best:.2f}"
    return f"{body.study}, {body.computed['n_points']} points{split}{known}"


def points_table(body: StudyReport) -> Table:
    """A line a point; strengths, where several were tried, side by side."""
    points = points_of(body)
    if body.study == "length":
        columns, rows = _lines(body, points, ("threshold", "false pos.", "95 %", "at own", "forget gated"), _of_length)
    elif body.study == "cost":
        columns, rows = _lines(body, points, ("plain ms", "guarded ms", "overhead", "95 %"), _of_cost)
    elif body.study == "sequential":
        benches = body.benches["forget"]
        columns, rows = _lines(body, points, (*benches, "rest", "gated of rest"), _of_sequence)
    elif len(body.grid.get("strength", [])) > 1:
        columns, rows = _strengths(body, points)
    else:
        measures = ("forget", "95 %", "gated", "other", "gated", "false pos.", "score")
        columns, rows = _lines(body, points, measures, _of_guardrail)
    rows = [
        [Name(cell) if column in ("sae", "hook") else cell for column, cell in zip(columns, row, strict=True)]
        for row in rows
    ]
    return Table(columns, rows, f"study {body.study}, a line a point", fold=fold(rows, "lines"))


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
    other = ", ".join(body.benches["other"]) or "none"
    questions = f"Accuracy on {body.split} questions"
    if body.study == "sequential":
        return f"{questions} after each request, chance {body.chance:.2f}; rest: mean of {other}."
    forget = _forget_bench(body)
    base = share(body.base.get(forget, {}).get("acc"))
    sentences = f"{questions}. forget: {forget} (base {base}, chance {body.chance:.2f}); other: mean of {other}. "
    if len(body.grid.get("strength", [])) > 1:
        return f"{sentences}Cells: forget / other, by strength."
    return (
        f"{sentences}false pos.: of fresh retain text. score: harmonic mean of forgetting and utility, as in "
        "dsg compare."
    )


def failures(body: StudyReport) -> list[str]:
    """Points, and measures of points, that could not be had: the reason, and the first of those that share it."""
    rows_by_error: dict[str, list[Json]] = {}
    for row in body.rows:
        if row["error"]:
            rows_by_error.setdefault(row["error"], []).append(row)
    lines = []
    for error, rows in rows_by_error.items():
        where = ", ".join(f"{HEADS.get(name, name)} {_setting(rows[0].get(name))}" for name in body.grid)
        more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        lines.append(f"{where}{more}: {error}")
    return lines


def points_of(body: StudyReport) -> list[Point]:
    """The rows of each point together, in their order."""
    points: dict[str, Point] = {}
    for row in body.rows:
        key = repr({name: row.get(name) for name in body.grid})
        settings = {name: row.get(name) for name in (*body.grid, *body.columns)}
        point = points.setdefault(key, (settings, {}, ""))
        if row["error"] and not row["metric"]:
            points[key] = (*point[:2], row["error"])
        else:
            point[1][row["bench"], row["metric"]] = row
    return list(points.values())


Lines = tuple[list[str], list[list[str]]]  # Columns and rows.


Cells = Callable[[StudyReport, Point], list[str]]


def _lines(body: StudyReport, points: Sequence[Point], measures: Sequence[str], cells_of: Cells) -> Lines:
    """A line a point; settings that do not vary are left out, unless none does."""
    columns = [name for name in body.columns if len({repr(point[0][name]) for point in points}) > 1]
    columns = columns or list(body.grid)[:1]
    rows = []
    for point in points:
        cells = ["failed", *[""] * (len(measures) - 1)] if point[2] else cells_of(body, point)
        rows.append([*(_setting(point[0][name]) for name in columns), *cells])
    return [*(HEADS.get(name, name) for name in columns), *measures], rows


def _strengths(body: StudyReport, points: Sequence[Point]) -> Lines:
    strengths = body.grid["strength"]
    rest = [name for name in body.grid if name != "strength" and len(body.grid[name]) > 1]
    lines: dict[str, tuple[list[str], dict[str, str]]] = {}
    for point in points:
        settings = [_setting(point[0][name]) for name in rest]
        forget, other = _value(point, _forget_bench(body), "acc"), mean_over(point, body.benches["other"])
        cells = lines.setdefault(repr([point[0][name] for name in rest]), (settings, {}))[1]
        cells[point[0]["strength"]] = "failed" if point[2] else f"{share(forget)} / {share(other)}"
    rows = [[*settings, *(cells.get(strength, "") for strength in strengths)] for settings, cells in lines.values()]
    return [*(HEADS.get(name, name) for name in rest), *strengths], rows


def _forget_bench(body: StudyReport) -> str:
    return next(iter(body.benches["forget"]), "")


def _of_guardrail(body: StudyReport, point: Point) -> list[str]:
    forget, other = point[1].get((_forget_bench(body), "acc"), {}), body.benches["other"]
    forgotten = [share(forget.get("value")), interval(forget, digits=".2f"), share(forget.get("gate_rate"))]
    kept = [share(mean_over(point, other, column)) for column in ("value", "gate_rate")]
    return [*forgotten, *kept, share(_value(point, "", "false_positive_rate"), 3), share(_score(body, point))]


def _of_sequence(body: StudyReport, point: Point) -> list[str]:
    of_requests = [share(_value(point, bench, "acc")) for bench in body.benches["forget"]]
    return [*of_requests, *(share(mean_over(point, body.benches["other"], of)) for of in ("value", "gate_rate"))]


def _of_length(_body: StudyReport, point: Point) -> list[str]:
    false_positives = point[1].get(("", "false_positive_rate"), {})
    return [
        share(_value(point, "", "threshold")),
        share(false_positives.get("value"), 3),
        interval(false_positives, digits=".3f"),
        share(_value(point, "", "own_false_positive_rate"), 3),
        share(_value(point, "", "forget_gate_rate")),
    ]


def _of_cost(_body: StudyReport, point: Point) -> list[str]:
    seconds = [_value(point, "", f"{way}_seconds") for way in ("plain", "guarded")]
    milliseconds = [share(None if duration is None else 1000 * duration) for duration in seconds]
    overhead = point[1].get(("", "overhead"), {})
    value = overhead.get("value")
    shown = "-" if value is None else f"{value:+.1%}"
    return [*milliseconds, shown, interval(overhead, digits="+.1%", between=" to ")]


def _score(body: StudyReport, point: Point) -> float | None:
    """As dsg compare judges; of a study of one bench that is to be forgotten."""
    benches = body.benches["forget"]
    if len(benches) != 1 or point[2]:
        return None
    values = {bench: _value(point, bench, "acc") for bench in (*benches, *body.benches["other"])}
    known = {bench: value for bench, value in values.items() if value is not None and bench in body.base}
    if benches[0] not in known:
        return None
    base = {bench: body.base[bench]["acc"] for bench in known}
    score: float = unlearning_score(benches[0], known, base, body.chance)["score"]
    return score


def _value(point: Point, bench: str, metric: str, column: str = "value") -> float | None:
    value: float | None = point[1].get((bench, metric), {}).get(column)
    return value


def mean_over(point: Point, benches: Sequence[str], column: str = "value") -> float | None:
    """Mean over the benches that were asked at a point; of a column of its rows."""
    values = [value for bench in benches if (value := _value(point, bench, "acc", column)) is not None]
    return sum(values) / len(values) if values else None


def _setting(value: object) -> str:
    if value is None:
        return ""
    text = f"{value:g}" if isinstance(value, float) else str(value).rsplit("/", 1)[-1]
    return text.replace(".hook_", ".")


def accuracies_studied(body: StudyReport) -> Iterator[str]:
    """The range of accuracies over all points of a study that asked."""
    points = [point for point in points_of(body) if not point[2]]
    parts = []
    for bench in body.benches["forget"]:
        if accuracies := spread(_value(point, bench, "acc") for point in points):
            base = share(body.base.get(bench, {}).get("acc"))
            parts.append(f"{bench} {accuracies} (base {base}, guessing {body.chance:.2f})")
    if means := spread(mean_over(point, body.benches["other"]) for point in points):
        parts.append(f"mean of {', '.join(body.benches['other'])} {means}")
    if parts:
        yield f"Study {body.study}, {len(points)} points on {body.split} questions: {'; '.join(parts)}."


def costs_studied(body: StudyReport) -> Iterator[str]:
    """The ranges of false positives and of the time that a guarded pass takes beyond a plain one."""
    for metric, name, digits in (
        ("false_positive_rate", "fresh retain text gated", ".1%"),
        ("overhead", "time of a guarded pass over a plain one", "+.1%"),
    ):
        if values := spread((row["value"] for row in body.rows if row["metric"] == metric), digits):
            yield f"Study {body.study}: {name} {values}."
