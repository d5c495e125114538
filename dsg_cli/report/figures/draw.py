"""One function a figure: what is drawn, its title, and a description with its numbers for those who do not see it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dsg_cli.report.comparison import form_of, mean_accuracy, other_benches, row_name
from dsg_cli.report.evaluations import SIDES, place, unit
from dsg_cli.report.figures.style import CYCLE, DASHES, FORGET, GREY, INK, KEPT, OTHER, Drawn, drawing, key_above, look
from dsg_cli.report.rendering import share, short
from dsg_cli.report.studies import Point, mean_over, points_of
from dsg_cli.workspace.artifacts import Threshold
from dsg_cli.workspace.body import Json
from dsg_cli.workspace.results import AttackReport, Comparison, EvalReport, StudyReport


def _share_axis(axes: Any, names: Sequence[str], label: str, n_columns: int = 2) -> None:
    """A line for each name from above to below, and the key."""
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.set(xlabel=label, xlim=(-0.03, 1.05), ylim=(-0.6, len(names) - 0.4))
    axes.grid(axis="x")
    key_above(axes, n_columns)


MOST_VARIANTS = 5  # Lines in the figure of an attack; the table has them all.
MOST_TICKS, WIDELY = 9, 30


def draw_attack(artifact: str, body: AttackReport) -> Drawn | None:
    """Lines where the attack has a scale, else a point each; nothing for an attack that could not be measured."""
    summary = body.summary
    if not body.curve or not summary["n_measurable"]:
        return None
    variants: dict[str, list[Json]] = {}
    for point in body.curve:
        variants.setdefault(point["variant"], []).append(point)
    worst_first = sorted(variants, key=lambda name: -max(map(_forget_acc, variants[name])))
    shown = {name: variants[name] for name in worst_first[:MOST_VARIANTS]}
    points = [point for of_variant in shown.values() for point in of_variant]
    xs = {point["x"] for point in body.curve}
    is_scale = len(xs) > 1 and all(isinstance(x, int | float) for x in xs)
    if is_scale:
        figure = _attack_lines(shown, body)
    else:
        names = [" ".join(str(part) for part in (point["variant"], point["x"]) if part != "") for point in points]
        figure = _attack_points(names, points)
    title = f"Attack {body.attack} on {body.bench}: what comes back, guarded and unguarded."
    if is_scale and "forget_low" in points[0]["unlearned"]:
        title += " The shade is the 95\N{NO-BREAK SPACE}% interval of what brought back most."
    if len(variants) > MOST_VARIANTS:
        title += f" The {MOST_VARIANTS} variants of {len(variants)} that brought back most."
    before, worst = body.before["unlearned"]["forget_acc"], share(summary["forget_acc_worst"])
    unguarded = f"where the unguarded model has {share(summary['unguarded_at_worst'])}"
    description = f"Guarded {before:.2f} before, at most {worst} at {place(body)}, {unguarded}."
    return Drawn(f"{artifact}-curve", artifact, title, description, figure)


def draw_all(attacks: Sequence[tuple[str, AttackReport]]) -> Drawn | None:
    """All attacks in one figure, each at the point where most came back."""
    measured = [(name, body) for name, body in attacks if body.summary["n_measurable"]]
    measured = sorted(measured, key=lambda attack: -(attack[1].summary["forget_acc_worst"] or 0))
    if not measured:
        return None
    points = []
    for _, body in measured:
        at = (body.summary["worst_x"], body.summary["worst_variant"])
        there = [point for point in body.curve if (point["x"], point["variant"]) == at]
        points.append(max(there or body.curve, key=_forget_acc))
    figure = _attack_points([f"{body.attack} ({name})" for name, body in measured], points)
    at_worst = "accuracy on what is to be forgotten where most came back, guarded and unguarded"
    title = f"All attacks at their worst: {at_worst}."
    worst = [f"{body.attack} {body.summary['forget_acc_worst']:.2f} at {place(body)}" for _, body in measured]
    return Drawn("attacks-worst", "", title, f"Guarded: {'; '.join(worst)}.", figure)


def _forget_acc(point: Json) -> float:
    accuracy: float = point["unlearned"]["forget_acc"]
    return accuracy


def _attack_lines(variants: dict[str, list[Json]], body: AttackReport) -> Figure:
    """The first variant brought back most."""
    with drawing(height=3.6) as (figure, axes):
        for number, (name, of_variant) in enumerate(variants.items()):
            points = sorted(of_variant, key=lambda point: point["x"])
            xs, sides = [point["x"] for point in points], [point["unlearned"] for point in points]
            label, style = f"guarded{f', {short(name, 36)}' if name else ''}", look(number)
            axes.plot(xs, list(map(_forget_acc, points)), label=label, **style)
            if number == 0 and all("forget_low" in side and "forget_high" in side for side in sides):
                low, high = ([side[f"forget_{end}"] for side in sides] for end in ("low", "high"))
                axes.fill_between(xs, low, high, color=style["color"], alpha=0.15, linewidth=0)
            base, key = [point["base"]["forget_acc"] for point in points], "unguarded" if number == 0 else None
            axes.plot(xs, base, style["linestyle"], color=GREY, linewidth=1.1, label=key)
        _ticks(axes, sorted({point["x"] for points in variants.values() for point in points}))
        axes.set(xlabel=unit(body.attack) or "x", ylabel=f"accuracy on {short(body.bench, 32)}", ylim=(-0.03, 1.05))
        axes.grid(axis="y")
        key_above(axes)
    return figure


def _ticks(axes: Any, xs: Sequence[float]) -> None:
    """Ticks where something was measured; widely spread numbers from 0 on in proportion to their logarithm."""
    positive = [x for x in xs if x > 0]
    if positive and xs[0] >= 0 and positive[-1] / positive[0] >= WIDELY:
        axes.set_xscale("symlog", linthresh=positive[0], linscale=0.6)
    if len(xs) <= MOST_TICKS:
        axes.set_xticks(xs, [f"{x:g}" for x in xs])
        axes.minorticks_off()


def _attack_points(names: Sequence[str], points: Sequence[Json]) -> Figure:
    with drawing(height=1.1 + 0.28 * len(points)) as (figure, axes):
        for at, point in enumerate(reversed(points)):
            side = point["unlearned"]
            if "forget_low" in side and "forget_high" in side:
                axes.plot([side["forget_low"], side["forget_high"]], [at, at], color=CYCLE[0], linewidth=1.2)
            axes.plot(point["base"]["forget_acc"], at, "s", color=GREY, label="unguarded" if at == 0 else None)
            axes.plot(side["forget_acc"], at, "o", color=CYCLE[0], label="guarded" if at == 0 else None)
        _share_axis(axes, [short(name, 44) for name in names], "accuracy; bars are 95 % intervals")
    return figure


NEAR = 7.0  # Points of a figure within which two markers count as one.
LETTER, LINE = 5.0, 9.5  # Width of a digit and height of a line of labels, in points.
WRAPPED = 4  # Numbers in a line of a label.


@dataclass(frozen=True)
class Cluster:
    """Points that lie on one another."""

    data: tuple[float, float]
    x: float  # In points from the lower left of the figure.
    y: float
    numbers: list[int]


Box = tuple[float, float, float, float]  # Left, bottom, right and top, in points.


def clusters(axes: Any, points: Sequence[tuple[float, float, int]]) -> list[Cluster]:
    """Points by where they lie in the figure, which has been laid out."""
    known: list[Cluster] = []
    for x, y, number in points:
        left, up = (pixels * 72 / axes.figure.dpi for pixels in axes.transData.transform((x, y)))
        own = next((cluster for cluster in known if math.hypot(cluster.x - left, cluster.y - up) < NEAR), None)
        if own is None:
            known.append(Cluster((x, y), left, up, [number]))
        elif number not in own.numbers:
            own.numbers.append(number)
    return known


def place_labels(axes: Any, all_clusters: Sequence[Cluster]) -> None:
    """Beside each cluster, on the side that is most free; the labels that need most room first."""
    taken: list[Box] = [(c.x - 5, c.y - 5, c.x + 5, c.y + 5) for c in all_clusters]
    left, bottom, right, top = (float(pixels) * 72 / axes.figure.dpi for pixels in axes.bbox.extents)
    for cluster in sorted(all_clusters, key=lambda cluster: -len(cluster.numbers)):
        numbers = [cluster.numbers[i : i + WRAPPED] for i in range(0, len(cluster.numbers), WRAPPED)]
        lines = [", ".join(map(str, of_line)) for of_line in numbers]
        boxes = _boxes_around(cluster, LETTER * max(map(len, lines)), LINE * len(lines))
        box = min(boxes, key=lambda box: _covered(box, taken) + 1e3 * _outside(box, (left, bottom, right, top)))
        taken.append(box)
        offset = ((box[0] + box[2]) / 2 - cluster.x, (box[1] + box[3]) / 2 - cluster.y)
        axes.annotate("\n".join(lines), cluster.data, xytext=offset, textcoords="offset points", ha="center",
                      va="center", fontsize=8, linespacing=1.05, zorder=4)  # fmt: skip


def _boxes_around(cluster: Cluster, width: float, height: float) -> list[Box]:
    middles = [
        (cluster.x + dx * (far + width / 2), cluster.y + dy * (far + height / 2))
        for far in (7, 14, 22)
        for dx, dy in ((1, 0), (0, 1), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))
    ]
    return [(x - width / 2, y - height / 2, x + width / 2, y + height / 2) for x, y in middles]


def _covered(box: Box, taken: Sequence[Box]) -> float:
    return sum(
        max(0.0, min(box[2], other[2]) - max(box[0], other[0]))
        * max(0.0, min(box[3], other[3]) - max(box[1], other[1]))
        for other in taken
    )


def _outside(box: Box, frame: Box) -> float:
    return sum(max(0.0, x) for x in (frame[0] - box[0], frame[1] - box[1], box[2] - frame[2], box[3] - frame[3]))


FORMS = {
    "guardrail": ("clamps features", FORGET, "o"),
    "wrapper": ("prompts and filters", OTHER, "^"),
    "model": ("changes weights", KEPT, "s"),
    "": ("other", GREY, "D"),
}
"""What a method makes -> how the key says it, colour, marker."""

KEY_COLUMNS = 3
LEAST_RANGE = 0.8  # Of utilities: the axis begins there, or further left.


def draw_comparison(artifact: str, body: Comparison) -> Drawn | None:
    """Forget accuracy against utility: chosen settings with numbers, on test questions; trials faint, on dev questions.

    Methods are told apart by number, as more than a few colours cannot be; those that lie on one another share a label.
    """
    measured = [
        (row, x, side["acc"], side)
        for row in body.rows
        for x in [mean_accuracy(row["results"], other_benches(body))]
        for side in [row["results"].get(body.benches["forget"], {})]
        if x is not None and side.get("acc") is not None
    ]
    if not measured:
        return None
    numbers = {name: i for i, name in enumerate(dict.fromkeys(row["method"] for row, *_ in measured), start=1)}
    names = [f"{number}  {short(name, 26)}" for name, number in numbers.items()]
    n_lines = -(-len(names) // KEY_COLUMNS)
    with drawing(6.6, 4.7 + 0.17 * n_lines) as (figure, axes):
        for trial in body.trials:
            if trial["forget"] is not None and trial["utility"] is not None and trial["method"] in numbers:
                _, colour, marker = FORMS[form_of(trial["method"])]
                axes.plot(trial["utility"], trial["forget"], marker, color=colour, alpha=0.4, markersize=3)
        for row, x, y, side in measured:
            label, colour, marker = FORMS[form_of(row["method"])]
            if "acc_low" in side and "acc_high" in side:
                axes.plot([x, x], [side["acc_low"], side["acc_high"]], color=colour, linewidth=1, alpha=0.45)
            axes.plot(x, y, marker, color=colour, markersize=7.5, label=label, zorder=3)
        axes.axhline(body.chance, color=GREY, linestyle=":", linewidth=1, label="chance")
        _frame(axes, body, max(x for _, x, _, _ in measured))
        for column in range(KEY_COLUMNS):
            axes.annotate("\n".join(names[column * n_lines : (column + 1) * n_lines]), (column / KEY_COLUMNS, 0),
                          xycoords="axes fraction", xytext=(0, -38), textcoords="offset points", va="top",
                          fontsize=8.5, linespacing=1.35)  # fmt: skip
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # What is laid out stays where labels are put beside it.
        place_labels(axes, clusters(axes, [(x, y, numbers[row["method"]]) for row, x, y, _ in measured]))
    title = (
        "Forgetting against utility: accuracy on what is to be forgotten (better below), and on everything else "
        "(better to the right). Large: the chosen settings, on test questions, with 95\N{NO-BREAK SPACE}% intervals; "
        "several of a number are its SAEs. Small: all trials, on dev questions."
    )
    values = "; ".join(f"{row_name(body, row, ' on ')} {y:.2f} at {x:.2f}" for row, x, y, _ in measured)
    description = f"Forget accuracy at utility: {values}. Chance is {body.chance:.2f}."
    return Drawn(f"{artifact}-trade-off", artifact, title, description, figure)


def _frame(axes: Any, body: Comparison, largest: float) -> None:
    least = min(axes.get_xlim()[0], LEAST_RANGE)
    axes.set_xticks([tick for tick in axes.get_xticks() if least <= tick < 1.001])
    axes.set(xlim=(least, largest + 0.17 * (largest - least)), ylim=(-0.03, 1.07))
    axes.set_xlabel("utility: accuracy on everything else, a mean over benches")
    axes.set_ylabel(f"accuracy on {short(body.benches['forget'], 34)}")
    axes.grid()
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axes.legend(once.values(), once.keys(), loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, fontsize=8.5)


def draw_sequence(artifact: str, body: Comparison) -> Drawn | None:
    """A line a method and a column a request, for lines of a chart would lie on one another."""
    sequences = [sequence for sequence in body.sequences if len(sequence["curve"]) > 1]
    if not sequences:
        return None
    requests = list(dict.fromkeys(point["request"] for sequence in sequences for point in sequence["curve"]))
    forget = [body.benches["forget"], *requests[1:]]
    kept = [name for name in other_benches(body) if name not in forget]
    grids: list[list[list[float | None]]] = [[], []]
    for sequence in sequences:
        results = [{bench: {"acc": acc} for bench, acc in point["results"].items()} for point in sequence["curve"]]
        grids[0].append([mean_accuracy(result, forget[:n]) for n, result in enumerate(results, start=1)])
        grids[1].append([mean_accuracy(result, kept) for result in results])
    names = [sequence["method"] for sequence in sequences]
    with drawing(6.6, 1.2 + 0.25 * len(names), ncols=2, sharey=True) as (figure, panels):
        for axes, grid, which in zip(panels, grids, ("to forget so far", "never to be forgotten"), strict=True):
            heat_map(axes, grid, names, range(1, len(requests) + 1), f"accuracy, {which}")
            axes.set_xlabel("after request")
    numbered = ", ".join(f"{i}: {name}" for i, name in enumerate(requests, start=1))
    title = (
        "Requests one after another: mean accuracy on all that was to be forgotten by then (better low), and on what "
        f"is never to be forgotten (better high). {numbered}."
    )
    last = [f"{name} {share(f[-1])} and {share(k[-1])}" for name, f, k in zip(names, *grids, strict=True)]
    return Drawn(f"{artifact}-sequence", artifact, title, f"After the last request: {'; '.join(last)}.", figure)


def draw_evaluation(
    artifact: str, body: EvalReport, benches: Sequence[str], chances: dict[str, float | None]
) -> Drawn | None:
    """A line for each bench of those to be shown, with guessing where its accuracy is known.

    Nothing where no bench has an accuracy.
    """
    benches = [name for name in benches if all("acc" in body.results[name][side] for side in SIDES)]
    if not benches:
        return None
    with drawing(height=0.9 + 0.36 * len(benches)) as (figure, axes):
        for at, bench in enumerate(reversed(benches)):
            for side, colour, marker, shift in (("base", GREY, "s", 0.13), ("unlearned", FORGET, "o", -0.13)):
                metrics = body.results[bench][side]
                if "acc_low" in metrics and "acc_high" in metrics:
                    ends = [metrics["acc_low"], metrics["acc_high"]]
                    axes.plot(ends, [at + shift] * 2, color=colour, linewidth=1.2)
                label = SIDES[side] if at == 0 else None
                axes.plot(metrics["acc"], at + shift, marker, color=colour, label=label)
            if chances.get(bench) is not None:
                label = None if "guessing" in axes.get_legend_handles_labels()[1] else "guessing"
                axes.plot([chances[bench]] * 2, [at - 0.38, at + 0.38], ":", color=INK, linewidth=1.1, label=label)
        label = f"accuracy, {body.split} questions; bars are 95 % intervals"
        _share_axis(axes, [short(name, 40) for name in benches], label, 3)
    pairs = [[f"{body.results[bench][side]['acc']:.2f}" for side in SIDES] for bench in benches]
    accuracies = [f"{bench} {before} to {after}" for bench, (before, after) in zip(benches, pairs, strict=True)]
    title = f"Accuracy before and after, {body.split} questions."
    return Drawn(f"{artifact}-accuracy", artifact, title, f"{'; '.join(accuracies)}.", figure)


COLOURS = "cividis"  # Even in lightness, also for those who do not see all colours.
ON_DARK, ON_LIGHT = "#ffffff", "#010101"  # Pure black would be left out of an SVG, and follow the page.
DARK = 0.55  # Values below it are on a dark ground.


def heat_map(
    axes: Any, grid: Sequence[Sequence[float | None]], rows: Sequence[object], columns: Sequence[object], title: str
) -> None:
    """Draw one, from 0 to 1; short rows and None leave cells empty."""
    values = np.full((len(grid), len(columns)), np.nan)
    for i, row in enumerate(grid):
        for k, value in enumerate(row):
            if value is not None:
                values[i, k], colour = value, ON_DARK if value < DARK else ON_LIGHT
                axes.text(k, i, f"{value:.2f}", ha="center", va="center", fontsize=8.5, color=colour)
    edges = [np.arange(n + 1) - 0.5 for n in (len(columns), len(grid))]
    axes.pcolormesh(*edges, values, vmin=0, vmax=1, cmap=COLOURS, edgecolors="face", linewidth=0.4)
    axes.set_ylim(len(grid) - 0.5, -0.5)
    axes.set_xticks(range(len(columns)), [short(name, 18) for name in columns])
    axes.set_yticks(range(len(rows)), [short(name, 24) for name in rows])
    axes.tick_params(length=0)
    axes.set_title(title)
    axes.spines[:].set_visible(False)


TEST_PARTS = ("fresh", "forget")  # What did not set the threshold.
N_BINS = 40


def draw_histogram(artifact: str, body: Threshold, rows: Sequence[Json]) -> Drawn | None:
    """The gate's statistic on text that did not set its threshold; nothing where there is no such text."""
    groups: dict[tuple[bool, str], list[float]] = {}
    for row in rows:
        if row.get("part") in TEST_PARTS and math.isfinite(row["statistic"]):
            groups.setdefault((row["part"] == "forget", str(row["group"])), []).append(float(row["statistic"]))
    if not groups:
        return None
    edges = np.linspace(0, max(*map(max, groups.values()), body.threshold) * 1.02 or 1, N_BINS)
    others = [colour for colour in CYCLE if colour != FORGET]
    rates = []
    with drawing() as (figure, axes):
        for number, ((is_forget, group), values) in enumerate(sorted(groups.items(), key=lambda item: -item[0][0])):
            shares = np.histogram(values, edges)[0] / len(values)
            colour = FORGET if is_forget else others[number % len(others)]
            label = f"{short(group, 40)} ({'forget' if is_forget else 'retain'}, {len(values)})"
            axes.stairs(shares, edges, color=colour, label=label, fill=is_forget, alpha=0.55 if is_forget else 1,
                        linestyle=DASHES[number % len(DASHES)], linewidth=1.5)  # fmt: skip
            rate = sum(value > body.threshold for value in values) / len(values)
            rates.append(f"{rate:.1%} of {group} above it")
        axes.axvline(body.threshold, color=INK, linestyle="--", linewidth=1.2)
        axes.annotate("threshold", (body.threshold, 1), xycoords=("data", "axes fraction"), xytext=(3, -10),
                      textcoords="offset points", fontsize=9)  # fmt: skip
        axes.set_xlabel(f"statistic of the {body.gate} gate over a piece of text")
        axes.set_ylabel("share of pieces")
        key_above(axes)
    title = f"What the gate sees: its statistic on text that did not set its threshold of {body.threshold:.4g}."
    return Drawn(f"{artifact}-statistic", artifact, title, f"{'; '.join(rates)}.", figure)


def draw_published(rows: Sequence[Json]) -> Drawn | None:
    """A line a bench, side and metric of those that were measured (rows of `evaluations.beside`)."""
    rows = [row for row in rows if row["measured"] is not None and 0 <= row["published"] <= 1]
    if not rows:
        return None
    metrics = ["" if row["metric"] == "acc" else f" {row['metric']}" for row in rows]
    names = [f"{row['bench']}{metric}, {SIDES[row['side']]}" for row, metric in zip(rows, metrics, strict=True)]
    with drawing(height=1.2 + 0.28 * len(rows)) as (figure, axes):
        for at, row in enumerate(reversed(rows)):
            axes.plot([row["published"], row["measured"]], [at, at], color=INK, linewidth=0.8, alpha=0.6)
            axes.plot(row["published"], at, "D", color=GREY, label="published" if at == 0 else None)
            axes.plot(row["measured"], at, "o", color=FORGET, label="measured" if at == 0 else None)
        _share_axis(axes, [short(name, 44) for name in names], "share")
    values = [f"{row['published']:.3f} published, {row['measured']:.3f} measured" for row in rows]
    values = [f"{name} {numbers}" for name, numbers in zip(names, values, strict=True)]
    return Drawn("published", "", "Published beside measured numbers.", f"{'; '.join(values)}.", figure)


MEASURES = {"length": ("false_positive_rate", "forget_gate_rate"), "cost": ("overhead",)}
"""Of studies that ask nothing."""

MEASURE_NAMES = {"false_positive_rate": "false positives", "forget_gate_rate": "forget text gated"}
LABELS = {"cost": "overhead: guarded over plain, less 1", "length": "share of texts"}

SETTINGS = {"n_features": "number of features", "share": "share of the forget text, %", "sae": "SAE"}
SETTINGS |= {"by": "what is left out"}

MOST_LINES = 10


def draw_study(artifact: str, body: StudyReport) -> Drawn | None:
    """A heat map of two settings of the guardrail, else lines; nothing where no point could be measured."""
    points = [point for point in points_of(body) if not point[2]]
    varied = [name for name in body.grid if len({repr(point[0][name]) for point in points}) > 1]
    if not points or not varied:
        return None
    if len(varied) > 1 and body.benches["forget"] and "by" not in varied and body.study not in MEASURES:
        return _study_heat_map(artifact, body, points, varied)
    return _study_lines(artifact, body, points, varied)


def _study_heat_map(artifact: str, body: StudyReport, points: list[Point], varied: list[str]) -> Drawn | None:
    """Mean over whatever else varies."""
    down, across = varied[0], varied[1]

    def tried(name: str) -> list[Any]:
        return [value for value in body.grid[name] if any(point[0][name] == value for point in points)]

    rows, columns = tried(down), tried(across)
    forget = body.benches["forget"][0]
    benches = {f"on {short(forget, 20)}": [forget], "of what is to be kept": body.benches["other"]}
    ranges = []
    with drawing(7.0, 1.3 + 0.36 * len(rows), ncols=2) as (figure, panels):
        for axes, (name, of_panel) in zip(panels, benches.items(), strict=True):
            grid = [[_cell_mean(points, {down: row, across: column}, of_panel) for column in columns] for row in rows]
            heat_map(axes, grid, [*map(_value_name, rows)], [*map(_value_name, columns)], f"accuracy {name}")
            axes.set_xlabel(_setting_name(across))
            known = [value for row in grid for value in row if value is not None]
            if known:
                ranges.append(f"{name} from {min(known):.2f} to {max(known):.2f}")
        panels[0].set_ylabel(_setting_name(down))
    others = f", mean over {', '.join(map(_setting_name, varied[2:]))}" if varied[2:] else ""
    title = f"Study {body.study}: accuracy by {_setting_name(down)} and {_setting_name(across)}{others}."
    return Drawn(f"{artifact}-heat-map", artifact, title, f"Accuracy {'; '.join(ranges)}.", figure)


def _cell_mean(points: list[Point], settings: Json, benches: list[str]) -> float | None:
    in_cell = [point for point in points if all(point[0][name] == value for name, value in settings.items())]
    means = [mean for point in in_cell if (mean := mean_over(point, benches)) is not None]
    return sum(means) / len(means) if means else None


def _study_lines(artifact: str, body: StudyReport, points: list[Point], varied: list[str]) -> Drawn | None:
    """Along the last setting that varies and is a number; else along the points."""
    numeric = [name for name in varied if all(type(point[0][name]) in (int, float) for point in points)]
    along = numeric[-1] if numeric else varied[-1]
    apart = [name for name in varied if name != along]
    groups: dict[tuple[str, ...], list[Point]] = {}
    for point in points:
        groups.setdefault(tuple(_group_name(name, point[0][name]) for name in apart), []).append(point)
    lines: list[str] = []
    with drawing(7.0, 3.6) as (figure, axes):
        for group, of_group in groups.items():
            ordered = sorted(of_group, key=lambda point: point[0][along]) if numeric else of_group
            for name, rows in _measured(body, ordered).items():
                known = [(point[0][along], row) for point, row in zip(ordered, rows, strict=True) if row]
                if not known or len(lines) >= MOST_LINES:
                    continue
                label = ", ".join([*group, name])
                xs = [x if numeric else _value_name(x) for x, _ in known]
                _line(axes, xs, [row for _, row in known], len(lines), label)
                lines.append(f"{label} from {known[0][1]['value']:.2f} to {known[-1][1]['value']:.2f}")
        if not lines:
            return None
        label = "accuracy" if body.benches["forget"] else LABELS.get(body.study, "share")
        axes.set(xlabel=_setting_name(along), ylabel=label)
        axes.grid(axis="y")
        if body.benches["forget"]:
            axes.set_ylim(-0.03, 1.07)
        figure.legend(loc="outside right upper", fontsize=8)
    title = f"Study {body.study} along {_setting_name(along)}; shades are 95 % intervals."
    return Drawn(f"{artifact}-lines", artifact, title, f"{'; '.join(lines)}.", figure)


def _measured(body: StudyReport, points: list[Point]) -> dict[str, list[Json | None]]:
    """What is drawn -> its row at each point; of more than one bench that is to be kept, the mean is drawn."""
    kept = body.benches["other"]
    names = {("", measure): MEASURE_NAMES.get(measure, measure) for measure in MEASURES.get(body.study, ())}
    if not names:
        names = {(bench, "acc"): bench for bench in (*body.benches["forget"], *(kept if len(kept) == 1 else ()))}
    rows: dict[str, list[Json]] = {name: [point[1].get(key, {}) for point in points] for key, name in names.items()}
    if len(kept) > 1 and body.study not in MEASURES:
        means = [{"value": mean_over(point, kept), "low": None, "high": None} for point in points]
        rows[f"mean of {len(kept)} others"] = means
    return {name: [row if row.get("value") is not None else None for row in of] for name, of in rows.items()}


def _line(axes: Any, xs: list[Any], rows: list[Json], number: int, label: str) -> None:
    style = look(number)
    axes.plot(xs, [row["value"] for row in rows], label=short(label, 40), **style)
    if all(row["low"] is not None and row["high"] is not None for row in rows):
        low, high = ([row[end] for row in rows] for end in ("low", "high"))
        axes.fill_between(xs, low, high, color=style["color"], alpha=0.1, linewidth=0)


def _value_name(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)[-24:]


def _group_name(setting: str, value: object) -> str:
    """A setting of a line; a number needs its name."""
    return f"{_setting_name(setting)} {_value_name(value)}" if isinstance(value, int | float) else _value_name(value)


def _setting_name(setting: str) -> str:
    return SETTINGS.get(setting, setting.replace("_", " "))
