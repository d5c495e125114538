"""The gate's statistic on forget text and on each retain corpus, with the threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dsg_cli.artifacts import Json, Threshold
from dsg_cli.report.figures.style import CYCLE, DASHES, FORGET, INK, Drawn, drawing, key_above, short

PARTS = ("fresh", "forget")
"""What did not set the threshold."""
BINS = 40


def draw(artifact: str, body: Threshold, rows: Sequence[Json]) -> Drawn | None:
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
