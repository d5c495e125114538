"""Accuracy of the base and of the unlearned model on each bench, with intervals."""

from __future__ import annotations

from collections.abc import Sequence

from dsg_cli.artifacts import EvalReport
from dsg_cli.report.evaluations import shown_benches
from dsg_cli.report.figures.style import FORGET, GREY, INK, Drawn, drawing, key_above, short


def draw(artifact: str, body: EvalReport, named: Sequence[str], chances: dict[str, float]) -> Drawn | None:
    """A line a bench; nothing where no bench has an accuracy.

    Args:
        artifact: Its id.
        body: The evaluation.
        named: Benches that were named, for those that have parts.
        chances: Bench -> accuracy of guessing, where that is known.
    """
    benches = [name for name in shown_benches(body, named) if "acc" in body.results[name]["unlearned"]]
    benches = [name for name in benches if "acc" in body.results[name]["base"]]
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
            if bench in chances:
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
