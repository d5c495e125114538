"""A heat map of accuracies with its numbers in its cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsg_cli.report.figures.style import short

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
