"""Labels of points that lie close together: one for those on one another, each where it covers nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
