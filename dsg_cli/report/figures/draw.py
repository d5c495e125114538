"""A study: a heat map where two settings or more vary, lines with intervals where one does."""

from __future__ import annotations

from typing import Any

from dsg_cli.artifacts import Json, StudyReport
from dsg_cli.report.figures.heat import heat_map
from dsg_cli.report.figures.style import DASHES, Drawn, drawing, look, short
from dsg_cli.report.studies import Point, mean_over, points_of

MEASURES = {"length": ("false_positive_rate", "forget_gate_rate"), "cost": ("overhead",)}
"""Of studies that ask nothing."""
NAMES = {"false_positive_rate": "false positives", "forget_gate_rate": "forget text gated"}
LABELS = {"cost": "overhead: guarded over plain, less 1", "length": "share of texts"}
SETTINGS = {
    "n_features": "number of features",
    "share": "share of the forget text, %",
    "sae": "SAE",
    "by": "what is left out",
}
MOST_LINES = 10


def draw(artifact: str, body: StudyReport) -> Drawn | None:
    """Nothing where no point could be measured."""
    points = [point for point in points_of(body) if not point[2]]
    varied = [name for name in body.grid if len({repr(point[0][name]) for point in points}) > 1]
    if not points or not varied:
        return None
    if len(varied) > 1 and body.benches["forget"] and not {"by"} & set(varied) and body.study not in MEASURES:
        return _heat_map(artifact, body, points, varied)
    return _lines(artifact, body, points, varied)


def _heat_map(artifact: str, body: StudyReport, points: list[Point], varied: list[str]) -> Drawn | None:
    """Mean over whatever else varies."""
    down, across = varied[0], varied[1]
    rows, columns = (
        [one for one in body.grid[name] if any(p[0][name] == one for p in points)] for name in (down, across)
    )
    forget, *_ = body.benches["forget"]
    benches = {f"on {short(forget, 20)}": [forget], "of what is to be kept": body.benches["other"]}
    said = []
    with drawing(7.0, 1.3 + 0.36 * len(rows), ncols=2) as (figure, panels):
        for axes, (name, several) in zip(panels, benches.items(), strict=True):
            grid = [[_mean_of(points, {down: row, across: column}, several) for column in columns] for row in rows]
            heat_map(axes, grid, [_name(one) for one in rows], [_name(one) for one in columns], f"accuracy {name}")
            axes.set_xlabel(_said(across))
            known = [value for row in grid for value in row if value is not None]
            if known:
                said.append(f"{name} from {min(known):.2f} to {max(known):.2f}")
        panels[0].set_ylabel(_said(down))
    others = f", mean over {', '.join(map(_said, varied[2:]))}" if varied[2:] else ""
    title = f"Study {body.study}: accuracy by {_said(down)} and {_said(across)}{others}."
    return Drawn(f"{artifact}-heat-map", artifact, title, f"Accuracy {'; '.join(said)}.", figure)


def _lines(artifact: str, body: StudyReport, points: list[Point], varied: list[str]) -> Drawn | None:
    """Along the last setting that varies and is a number; else along the points."""
    numeric = [name for name in varied if all(type(point[0][name]) in (int, float) for point in points)]
    along = numeric[-1] if numeric else varied[-1]
    apart = [name for name in varied if name != along]
    groups: dict[tuple[str, ...], list[Point]] = {}
    for point in points:
        groups.setdefault(tuple(_grouped(name, point[0][name]) for name in apart), []).append(point)
    said: list[str] = []
    with drawing(7.0, 3.6) as (figure, axes):
        for group, several in groups.items():
            ordered = sorted(several, key=lambda point: point[0][along]) if numeric else several
            for name, rows in _measured(body, ordered).items():
                found = [(point[0][along], row) for point, row in zip(ordered, rows, strict=True) if row]
                if not found or len(said) >= MOST_LINES:
                    continue
                label = ", ".join([*group, name])
                _line(axes, found, len(said), label, is_numeric=bool(numeric))
                said.append(f"{label} from {found[0][1]['value']:.2f} to {found[-1][1]['value']:.2f}")
        if not said:
            return None
        axes.set_xlabel(_said(along))
        axes.set_ylabel("accuracy" if body.benches["forget"] else LABELS.get(body.study, "share"))
        axes.grid(axis="y")
        if body.benches["forget"]:
            axes.set_ylim(-0.03, 1.07)
        figure.legend(loc="outside right upper", fontsize=8)
    title = f"Study {body.study} along {_said(along)}; shades are 95 % intervals."
    return Drawn(f"{artifact}-lines", artifact, title, f"{'; '.join(said)}.", figure)


def _measured(body: StudyReport, points: list[Point]) -> dict[str, list[Json | None]]:
    """What is drawn -> its row at each point; several benches that are to be kept are drawn as their mean."""
    named = {(("", name)): NAMES.get(name, name) for name in MEASURES.get(body.study, ())}
    kept = body.benches["other"]
    named = named or {(bench, "acc"): bench for bench in (*body.benches["forget"], *(kept if len(kept) == 1 else ()))}
    rows = {said: [point[1].get(key) for point in points] for key, said in named.items()}
    found = {name: [row if row and row["value"] is not None else None for row in of] for name, of in rows.items()}
    if len(kept) > 1 and body.study not in MEASURES:
        means = [mean_over(point, kept) for point in points]
        found[f"mean of {len(kept)} others"] = [
            None if one is None else {"value": one, "low": None, "high": None} for one in means
        ]
    return found


def _line(axes: Any, found: list[tuple[Any, Json]], number: int, label: str, *, is_numeric: bool) -> None:
    xs = [x if is_numeric else _name(x) for x, _ in found]
    style = look(number)
    axes.plot(xs, [row["value"] for _, row in found], DASHES[number % len(DASHES)], label=short(label, 40), **style)
    if all(row["low"] is not None and row["high"] is not None for _, row in found):
        low, high = ([row[end] for _, row in found] for end in ("low", "high"))
        axes.fill_between(xs, low, high, color=style["color"], alpha=0.1, linewidth=0)


def _mean_of(points: list[Point], wanted: Json, benches: list[str]) -> float | None:
    of_cell = [point for point in points if all(point[0][name] == value for name, value in wanted.items())]
    known = [one for one in (mean_over(point, benches) for point in of_cell) if one is not None]
    return sum(known) / len(known) if known else None


def _name(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)[-24:]


def _grouped(setting: str, value: object) -> str:
    """A setting of a line; a number needs its name."""
    return f"{_said(setting)} {_name(value)}" if isinstance(value, int | float) else _name(value)


def _said(setting: str) -> str:
    """A setting in words."""
    return SETTINGS.get(setting, setting.replace("_", " "))
