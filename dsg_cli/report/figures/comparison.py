"""Methods side by side: what each forgets against what it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsg_cli.artifacts import Comparison, Json
from dsg_cli.methods.names import METHODS
from dsg_cli.report.figures.placing import clusters, place_labels
from dsg_cli.report.figures.style import FORGET, GREY, KEPT, OTHER, Drawn, chance_line, drawing, short

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


def draw(artifact: str, body: Comparison) -> Drawn | None:
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
