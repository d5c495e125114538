"""An attack's curve, guarded and unguarded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsg_cli.methods import METHODS
from dsg_cli.report.evaluations import SIDES, place, unit
from dsg_cli.report.figures.style import (
    CYCLE,
    DASHES,
    FORGET,
    GREY,
    INK,
    KEPT,
    MARKERS,
    OTHER,
    Drawn,
    chance_line,
    drawing,
    key_above,
    look,
)
from dsg_cli.report.rendering import share, short
from dsg_cli.report.studies import Point, mean_over, points_of
from dsg_cli.workspace.artifacts import Threshold
from dsg_cli.workspace.results import AttackReport, Comparison, EvalReport, Json, StudyReport

MOST_TICKS, WIDELY = 9, 30

MOST_VARIANTS = 5
"""Lines in one figure; the table has them all."""


def draw_attack(artifact: str, body: AttackReport) -> Drawn | None:
    """Lines where the attack has a scale, else a point each; nothing for an attack that could not be measured."""
    if not body.curve or not body.summary["n_measurable"]:
        return None
    variants: dict[str, list[Json]] = {}
    for point in body.curve:
        variants.setdefault(point["variant"], []).append(point)
    worst = sorted(variants, key=lambda name: -max(point["unlearned"]["forget_acc"] for point in variants[name]))
    xs = {point["x"] for point in body.curve}
    is_scale = len(xs) > 1 and all(isinstance(x, int | float) for x in xs)
    points = [point for name in worst[:MOST_VARIANTS] for point in variants[name]]
    with drawing(height=3.6 if is_scale else 1.1 + 0.28 * len(points)) as (figure, axes):
        if is_scale:
            _lines_attack(axes, {name: variants[name] for name in worst[:MOST_VARIANTS]}, body)
        else:
            _points(axes, [(_name_attack(point), point["unlearned"], point["base"]) for point in points])
        key_above(axes)
    more = (
        f" The {MOST_VARIANTS} variants of {len(worst)} that brought back most." if len(worst) > MOST_VARIANTS else ""
    )
    shades = (
        " The shade is the 95\N{NO-BREAK SPACE}% interval of what brought back most."
        if is_scale and "forget_low" in points[0]["unlearned"]
        else ""
    )
    title = f"Attack {body.attack} on {body.bench}: what comes back, guarded and unguarded.{shades}{more}"
    before, found = body.before["unlearned"]["forget_acc"], body.summary
    said = f"Guarded {before:.2f} before, at most {share(found['forget_acc_worst'])} at {place(body)}"
    said += f", where the unguarded model has {share(found['unguarded_at_worst'])}."
    return Drawn(f"{artifact}-curve", artifact, title, said, figure)


def draw_all(attacks: Sequence[tuple[str, AttackReport]]) -> Drawn | None:
    """All attacks in one figure, each at the point where most came back."""
    found = [(name, body, _worst(body)) for name, body in attacks if body.summary["n_measurable"]]
    found = sorted(found, key=lambda one: -(one[1].summary["forget_acc_worst"] or 0))
    if not found:
        return None
    with drawing(height=1.1 + 0.28 * len(found)) as (figure, axes):
        _points(axes, [(f"{body.attack} ({name})", point["unlearned"], point["base"]) for name, body, point in found])
        key_above(axes)
    title = (
        "All attacks at their worst: accuracy on what is to be forgotten where most came back, guarded and unguarded."
    )
    said = "; ".join(f"{body.attack} {body.summary['forget_acc_worst']:.2f} at {place(body)}" for _, body, _ in found)
    return Drawn("attacks-worst", "", title, f"Guarded: {said}.", figure)


def _worst(body: AttackReport) -> Json:
    found = body.summary
    points = [p for p in body.curve if (p["x"], p["variant"]) == (found["worst_x"], found["worst_variant"])]
    return max(points or body.curve, key=lambda point: point["unlearned"]["forget_acc"])


def _name_attack(point: Json) -> str:
    return " ".join(str(part) for part in (point["variant"], point["x"]) if part != "")


def _lines_attack(axes: Any, variants: dict[str, list[Json]], body: AttackReport) -> None:
    """The first variant brought back most."""
    for number, (name, points) in enumerate(variants.items()):
        points = sorted(points, key=lambda point: point["x"])
        xs = [point["x"] for point in points]
        colour, dash = CYCLE[number % len(CYCLE)], DASHES[number % len(DASHES)]
        guarded = [point["unlearned"] for point in points]
        axes.plot(xs, [one["forget_acc"] for one in guarded], dash, marker=MARKERS[number], color=colour,
                  label=f"guarded{f', {short(name, 36)}' if name else ''}")  # fmt: skip
        if number == 0 and all("forget_low" in one and "forget_high" in one for one in guarded):
            low, high = ([one[f"forget_{end}"] for one in guarded] for end in ("low", "high"))
            axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
        unguarded = [point["base"]["forget_acc"] for point in points]
        axes.plot(xs, unguarded, dash, color=GREY, linewidth=1.1, label="unguarded" if number == 0 else None)
    _scale(axes, sorted({point["x"] for points in variants.values() for point in points}))
    axes.set_ylim(-0.03, 1.05)
    axes.set_xlabel(unit(body.attack) or "x")
    axes.set_ylabel(f"accuracy on {short(body.bench, 32)}")
    axes.grid(axis="y")


def _scale(axes: Any, xs: Sequence[float]) -> None:
    """Ticks where something was measured; widely spread numbers from 0 on in proportion to their logarithm."""
    positive = [x for x in xs if x > 0]
    if positive and xs[0] >= 0 and positive[-1] / positive[0] >= WIDELY:
        axes.set_xscale("symlog", linthresh=positive[0], linscale=0.6)
    if len(xs) <= MOST_TICKS:
        axes.set_xticks(xs, [f"{x:g}" for x in xs])
        axes.minorticks_off()


def _points(axes: Any, lines: Sequence[tuple[str, Json, Json]]) -> None:
    """A line each: its name, and what both sides answer."""
    for at, (_, guarded, unguarded) in enumerate(reversed(lines)):
        if "forget_low" in guarded and "forget_high" in guarded:
            axes.plot([guarded["forget_low"], guarded["forget_high"]], [at, at], color=CYCLE[0], linewidth=1.2)
        axes.plot(unguarded["forget_acc"], at, "s", color=GREY, label="unguarded" if at == 0 else None)
        axes.plot(guarded["forget_acc"], at, "o", color=CYCLE[0], label="guarded" if at == 0 else None)
    axes.set_yticks(range(len(lines)), [short(name, 44) for name, _, _ in reversed(lines)])
    axes.set_ylim(-0.6, len(lines) - 0.4)
    axes.set_xlim(-0.03, 1.05)
    axes.set_xlabel("accuracy; bars are 95 % intervals")
    axes.grid(axis="x")


NEAR = 7.0
"""Points of a figure within which two markers count as one."""

LETTER, LINE = 5.0, 9.5
"""Width of a digit and height of a line of labels."""

WRAPPED = 4
"""Numbers in a line of a label."""


@dataclass(frozen=True)
class Cluster:
    """Points that lie on one another."""

    data: tuple[float, float]
    x: float
    """In points from the lower left of the figure."""
    y: float
    numbers: list[int]


Box = tuple[float, float, float, float]


def clusters(axes: Any, points: Sequence[tuple[float, float, int]]) -> list[Cluster]:
    """Points by where they lie in the figure, which has been laid out."""
    found: list[Cluster] = []
    scale = 72 / axes.figure.dpi
    for x, y, number in points:
        left, up = (one * scale for one in axes.transData.transform((x, y)))
        own = next((one for one in found if math.hypot(one.x - left, one.y - up) < NEAR), None)
        if own is None:
            found.append(Cluster((x, y), left, up, [number]))
        elif number not in own.numbers:
            own.numbers.append(number)
    return found


def place_labels(axes: Any, found: Sequence[Cluster]) -> None:
    """Beside each cluster, on the side that is most free; the labels that need most room first."""
    taken = [(one.x - 5, one.y - 5, one.x + 5, one.y + 5) for one in found]
    left, bottom, right, top = (float(one) * 72 / axes.figure.dpi for one in axes.bbox.extents)
    for one in sorted(found, key=lambda one: -len(one.numbers)):
        lines = [", ".join(map(str, one.numbers[i : i + WRAPPED])) for i in range(0, len(one.numbers), WRAPPED)]
        boxes = _around(one, LETTER * max(map(len, lines)), LINE * len(lines))
        free = min(boxes, key=lambda box: _covered(box, taken) + 1e3 * _outside(box, (left, bottom, right, top)))
        taken.append(free)
        away = ((free[0] + free[2]) / 2 - one.x, (free[1] + free[3]) / 2 - one.y)
        axes.annotate("\n".join(lines), one.data, xytext=away, textcoords="offset points", ha="center", va="center",
                      fontsize=8, linespacing=1.05, zorder=4)  # fmt: skip


def _around(one: Cluster, width: float, height: float) -> list[Box]:
    """Places for a label, the nearest first."""
    middles = [
        (one.x + dx * (far + width / 2), one.y + dy * (far + height / 2))
        for far in (7, 14, 22)
        for dx, dy in ((1, 0), (0, 1), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))
    ]
    return [(x - width / 2, y - height / 2, x + width / 2, y + height / 2) for x, y in middles]


def _covered(box: Box, taken: Sequence[Box]) -> float:
    """Area of a box that others have."""
    return sum(
        max(0.0, min(box[2], one[2]) - max(box[0], one[0])) * max(0.0, min(box[3], one[3]) - max(box[1], one[1]))
        for one in taken
    )


def _outside(box: Box, frame: Box) -> float:
    """How far a box stands out of a frame, in points."""
    beyond = (frame[0] - box[0], frame[1] - box[1], box[2] - frame[2], box[3] - frame[3])
    return sum(max(0.0, one) for one in beyond)


FORMS = {
    "guardrail": ("clamps features", FORGET, "o"),
    "wrapper": ("prompts and filters", OTHER, "^"),
    "model": ("changes weights", KEPT, "s"),
    "": ("other", GREY, "D"),
}
"""What a method makes -> how the key says it, colour, marker."""

KEY_COLUMNS = 3

LEAST_RANGE = 0.8
"""Of utilities: the axis begins there, or further left."""


def draw_comparison(artifact: str, body: Comparison) -> Drawn | None:
    """Forget accuracy against utility: chosen settings with numbers, on test questions; trials faint, on dev questions.

    Methods are told apart by number, as more than a few colours cannot be; those that lie on one another share a label.
    """
    rows = [(row, _utility(row, body), _forget(row, body)) for row in body.rows]
    known = [(row, x, side["acc"], side) for row, x, side in rows if x is not None and side.get("acc") is not None]
    if not known:
        return None
    numbers = {name: i for i, name in enumerate(dict.fromkeys(row["method"] for row, *_ in known), start=1)}
    n_lines = -(-len(numbers) // KEY_COLUMNS)
    with drawing(6.6, 4.7 + 0.17 * n_lines) as (figure, axes):
        _trials(axes, body, numbers)
        for row, x, y, side in known:
            name, colour, marker = FORMS[_form(row["method"])]
            if "acc_low" in side and "acc_high" in side:
                axes.plot([x, x], [side["acc_low"], side["acc_high"]], color=colour, linewidth=1, alpha=0.45)
            axes.plot(x, y, marker, color=colour, markersize=7.5, label=name, zorder=3)
        chance_line(axes, body.chance)
        _framed(axes, body, [x for _, x, _, _ in known])
        _key(axes, numbers)
        points = [(x, y, numbers[row["method"]]) for row, x, y, _ in known]
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # What is laid out stays where labels are put beside it.
        place_labels(axes, clusters(axes, points))
    said = [f"{row['method']}{_sae(row, body)} {y:.2f} at {x:.2f}" for row, x, y, _ in known]
    title = (
        "Forgetting against utility: accuracy on what is to be forgotten (better below), and on everything else "
        "(better to the right). Large: the chosen settings, on test questions, with 95\N{NO-BREAK SPACE}% intervals; "
        "several of a number are its SAEs. Small: all trials, on dev questions."
    )
    text = f"Forget accuracy at utility: {'; '.join(said)}. Chance is {body.chance:.2f}."
    return Drawn(f"{artifact}-trade-off", artifact, title, text, figure)


def _trials(axes: Any, body: Comparison, numbers: dict[str, int]) -> None:
    for trial in body.trials:
        if trial["forget"] is not None and trial["utility"] is not None and trial["method"] in numbers:
            _, colour, marker = FORMS[_form(trial["method"])]
            axes.plot(trial["utility"], trial["forget"], marker, color=colour, alpha=0.4, markersize=3)


def _framed(axes: Any, body: Comparison, xs: Sequence[float]) -> None:
    """Room for labels to the right, and a key of what is not a method."""
    least = min(axes.get_xlim()[0], LEAST_RANGE)
    axes.set_xticks([tick for tick in axes.get_xticks() if least <= tick < 1.001])
    axes.set_xlim(least, max(xs) + 0.17 * (max(xs) - least))
    axes.set_ylim(-0.03, 1.07)
    axes.set_xlabel("utility: accuracy on everything else, a mean over benches")
    axes.set_ylabel(f"accuracy on {short(body.benches['forget'], 34)}")
    axes.grid()
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axes.legend(once.values(), once.keys(), loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, fontsize=8.5)


def _key(axes: Any, numbers: dict[str, int]) -> None:
    """Number and name of each method, in columns below."""
    names = [f"{number}  {short(name, 26)}" for name, number in numbers.items()]
    n_lines = -(-len(names) // KEY_COLUMNS)
    for column in range(KEY_COLUMNS):
        lines = names[column * n_lines : (column + 1) * n_lines]
        axes.annotate("\n".join(lines), (column / KEY_COLUMNS, 0), xycoords="axes fraction", xytext=(0, -38),
                      textcoords="offset points", va="top", fontsize=8.5, linespacing=1.35)  # fmt: skip


def _sae(row: Json, body: Comparison) -> str:
    several = {one["sae"] for one in body.rows if one["method"] == row["method"]}
    return f" on {str(row['sae']).rsplit('/', 1)[-1]}" if len(several) > 1 else ""


def _form(method: str) -> str:
    return METHODS[method].form if method in METHODS else ""


def _forget(row: Json, body: Comparison) -> Json:
    side: Json = row["results"].get(body.benches["forget"], {})
    return side


def _utility(row: Json, body: Comparison) -> float | None:
    found = {bench: sides.get("acc") for bench, sides in row["results"].items()}
    return mean_of(found, [*body.benches["near"], *body.benches["other"]])


def mean_of(found: Json, benches: Sequence[str]) -> float | None:
    """Mean over those benches that were asked."""
    known = [found[bench] for bench in benches if found.get(bench) is not None]
    return sum(known) / len(known) if known else None


def draw_evaluation(
    artifact: str, body: EvalReport, benches: Sequence[str], chances: dict[str, float | None]
) -> Drawn | None:
    """A line a bench; nothing where no bench has an accuracy.

    Args:
        artifact: Its id.
        body: The evaluation.
        benches: Those that are shown.
        chances: Bench -> accuracy of guessing, where that is known.
    """
    benches = [name for name in benches if all("acc" in body.results[name][side] for side in ("unlearned", "base"))]
    if not benches:
        return None
    said = []
    with drawing(height=0.9 + 0.36 * len(benches)) as (figure, axes):
        for place, bench in enumerate(reversed(benches)):
            sides = body.results[bench]
            for side, colour, marker, shift in (("base", GREY, "s", 0.13), ("unlearned", FORGET, "o", -0.13)):
                one = sides[side]
                label = {"base": "base", "unlearned": "guarded"}[side] if place == 0 else None
                if "acc_low" in one and "acc_high" in one:
                    axes.plot([one["acc_low"], one["acc_high"]], [place + shift] * 2, color=colour, linewidth=1.2)
                axes.plot(one["acc"], place + shift, marker, color=colour, label=label)
            if chances.get(bench) is not None:
                label = None if "guessing" in axes.get_legend_handles_labels()[1] else "guessing"
                axes.plot(
                    [chances[bench]] * 2, [place - 0.38, place + 0.38], ":", color=INK, linewidth=1.1, label=label
                )
            said.append(f"{bench} {sides['base']['acc']:.2f} to {sides['unlearned']['acc']:.2f}")
        axes.set_yticks(range(len(benches)), [short(name, 40) for name in reversed(benches)])
        axes.set_xlim(-0.03, 1.05)
        axes.set_xlabel(f"accuracy, {body.split} questions; bars are 95 % intervals")
        axes.grid(axis="x")
        axes.set_ylim(-0.6, len(benches) - 0.4)
        key_above(axes, 3)
    title = f"Accuracy before and after, {body.split} questions."
    return Drawn(f"{artifact}-accuracy", artifact, title, f"{'; '.join(reversed(said))}.", figure)


COLOURS = "cividis"
"""Even in lightness, also for those who do not see all colours."""

ON_DARK, ON_LIGHT = "#ffffff", "#010101"  # Pure black would be left out of an SVG, and follow the page.

DARK = 0.55
"""Values below it are on a dark ground."""


def heat_map(
    axes: Any, grid: Sequence[Sequence[float | None]], rows: Sequence[object], columns: Sequence[object], title: str
) -> None:
    """Draw one, from 0 to 1; short rows and None leave cells empty."""
    whole = [[*row, *[None] * (len(columns) - len(row))] for row in grid]
    numbers = [[float("nan") if value is None else value for value in row] for row in whole]
    edges = [[one - 0.5 for one in range(n + 1)] for n in (len(columns), len(whole))]
    axes.pcolormesh(*edges, numbers, vmin=0, vmax=1, cmap=COLOURS, edgecolors="face", linewidth=0.4)
    axes.set_ylim(len(whole) - 0.5, -0.5)
    for i, row in enumerate(whole):
        for k, value in enumerate(row):
            if value is not None:
                axes.text(k, i, f"{value:.2f}", ha="center", va="center", fontsize=8.5,
                          color=ON_DARK if value < DARK else ON_LIGHT)  # fmt: skip
    axes.set_xticks(range(len(columns)), [short(one, 18) for one in columns])
    axes.set_yticks(range(len(rows)), [short(one, 24) for one in rows])
    axes.tick_params(length=0)
    axes.set_title(title)
    axes.spines[:].set_visible(False)


PARTS = ("fresh", "forget")
"""What did not set the threshold."""

BINS = 40


def draw_histogram(artifact: str, body: Threshold, rows: Sequence[Json]) -> Drawn | None:
    """Nothing where there is no such text."""
    groups: dict[tuple[str, bool], list[float]] = {}
    for row in rows:
        if row.get("part") in PARTS and math.isfinite(row["statistic"]):
            groups.setdefault((str(row["group"]), row["part"] == "forget"), []).append(float(row["statistic"]))
    if not groups:
        return None
    largest = max(max(values) for values in groups.values())
    edges = np.linspace(0, max(largest, body.threshold) * 1.02 or 1, BINS)
    others = [colour for colour in CYCLE if colour != FORGET]
    said = []
    with drawing() as (figure, axes):
        for number, ((group, is_forget), values) in enumerate(sorted(groups.items(), key=lambda item: not item[0][1])):
            share = np.histogram(values, edges)[0] / len(values)
            colour = FORGET if is_forget else others[number % len(others)]
            label = f"{short(group, 40)} ({'forget' if is_forget else 'retain'}, {len(values)})"
            axes.stairs(share, edges, color=colour, label=label, fill=is_forget, alpha=0.55 if is_forget else 1,
                        linestyle=DASHES[number % len(DASHES)], linewidth=1.5)  # fmt: skip
            above = sum(value > body.threshold for value in values) / len(values)
            said.append(f"{above:.1%} of {group} above it")
        axes.axvline(body.threshold, color=INK, linestyle="--", linewidth=1.2)
        axes.annotate("threshold", (body.threshold, 1), xycoords=("data", "axes fraction"), xytext=(3, -10),
                      textcoords="offset points", fontsize=9)  # fmt: skip
        axes.set_xlabel(f"statistic of the {body.gate} gate over a piece of text")
        axes.set_ylabel("share of pieces")
        key_above(axes)
    title = f"What the gate sees: its statistic on text that did not set its threshold of {body.threshold:.4g}."
    return Drawn(f"{artifact}-statistic", artifact, title, f"{'; '.join(said)}.", figure)


def draw_published(rows: Sequence[Json]) -> Drawn | None:
    """A line a bench, side and metric of those that were measured; nothing where none was.

    Args:
        rows: Of `published.beside`.
    """
    known = [row for row in rows if row["measured"] is not None and 0 <= row["published"] <= 1]
    if not known:
        return None
    with drawing(height=1.2 + 0.28 * len(known)) as (figure, axes):
        for at, row in enumerate(reversed(known)):
            axes.plot([row["published"], row["measured"]], [at, at], color=INK, linewidth=0.8, alpha=0.6)
            axes.plot(row["published"], at, "D", color=GREY, label="published" if at == 0 else None)
            axes.plot(row["measured"], at, "o", color=FORGET, label="measured" if at == 0 else None)
        axes.set_yticks(range(len(known)), [short(_name_published(row), 44) for row in reversed(known)])
        axes.set_ylim(-0.6, len(known) - 0.4)
        axes.set_xlim(-0.03, 1.05)
        axes.set_xlabel("share")
        axes.grid(axis="x")
        key_above(axes)
    said = [f"{_name_published(row)} {row['published']:.3f} published, {row['measured']:.3f} measured" for row in known]
    return Drawn("published", "", "Published beside measured numbers.", f"{'; '.join(said)}.", figure)


def _name_published(row: Json) -> str:
    metric = "" if row["metric"] == "acc" else f" {row['metric']}"
    return f"{row['bench']}{metric}, {SIDES[row['side']]}"


def draw_sequence(artifact: str, body: Comparison) -> Drawn | None:
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
        f"{name} {_said_sequence(of_gone[-1])} and {_said_sequence(of_rest[-1])}"
        for name, of_gone, of_rest in zip(names, gone, rest, strict=True)
    ]
    numbered = ", ".join(f"{i}: {name}" for i, name in enumerate(requests, start=1))
    title = (
        "Requests one after another: mean accuracy on all that was to be forgotten by then (better low), and on what "
        f"is never to be forgotten (better high). {numbered}."
    )
    return Drawn(f"{artifact}-sequence", artifact, title, f"After the last request: {'; '.join(said)}.", figure)


def _said_sequence(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


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


def draw_study(artifact: str, body: StudyReport) -> Drawn | None:
    """Nothing where no point could be measured."""
    points = [point for point in points_of(body) if not point[2]]
    varied = [name for name in body.grid if len({repr(point[0][name]) for point in points}) > 1]
    if not points or not varied:
        return None
    if len(varied) > 1 and body.benches["forget"] and not {"by"} & set(varied) and body.study not in MEASURES:
        return _heat_map(artifact, body, points, varied)
    return _lines_study(artifact, body, points, varied)


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
            heat_map(
                axes,
                grid,
                [_name_study(one) for one in rows],
                [_name_study(one) for one in columns],
                f"accuracy {name}",
            )
            axes.set_xlabel(_said_study(across))
            known = [value for row in grid for value in row if value is not None]
            if known:
                said.append(f"{name} from {min(known):.2f} to {max(known):.2f}")
        panels[0].set_ylabel(_said_study(down))
    others = f", mean over {', '.join(map(_said_study, varied[2:]))}" if varied[2:] else ""
    title = f"Study {body.study}: accuracy by {_said_study(down)} and {_said_study(across)}{others}."
    return Drawn(f"{artifact}-heat-map", artifact, title, f"Accuracy {'; '.join(said)}.", figure)


def _lines_study(artifact: str, body: StudyReport, points: list[Point], varied: list[str]) -> Drawn | None:
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
        axes.set_xlabel(_said_study(along))
        axes.set_ylabel("accuracy" if body.benches["forget"] else LABELS.get(body.study, "share"))
        axes.grid(axis="y")
        if body.benches["forget"]:
            axes.set_ylim(-0.03, 1.07)
        figure.legend(loc="outside right upper", fontsize=8)
    title = f"Study {body.study} along {_said_study(along)}; shades are 95 % intervals."
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
    xs = [x if is_numeric else _name_study(x) for x, _ in found]
    style = look(number)
    axes.plot(xs, [row["value"] for _, row in found], DASHES[number % len(DASHES)], label=short(label, 40), **style)
    if all(row["low"] is not None and row["high"] is not None for _, row in found):
        low, high = ([row[end] for _, row in found] for end in ("low", "high"))
        axes.fill_between(xs, low, high, color=style["color"], alpha=0.1, linewidth=0)


def _mean_of(points: list[Point], wanted: Json, benches: list[str]) -> float | None:
    of_cell = [point for point in points if all(point[0][name] == value for name, value in wanted.items())]
    known = [one for one in (mean_over(point, benches) for point in of_cell) if one is not None]
    return sum(known) / len(known) if known else None


def _name_study(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)[-24:]


def _grouped(setting: str, value: object) -> str:
    """A setting of a line; a number needs its name."""
    return f"{_said_study(setting)} {_name_study(value)}" if isinstance(value, int | float) else _name_study(value)


def _said_study(setting: str) -> str:
    """A setting in words."""
    return SETTINGS.get(setting, setting.replace("_", " "))
