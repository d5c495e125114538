"""Published numbers beside measured ones, where both are shares."""

from __future__ import annotations

from collections.abc import Sequence

from dsg_cli.artifacts import Json
from dsg_cli.report.figures.style import FORGET, GREY, INK, Drawn, drawing, key_above, short
from dsg_cli.report.published import SIDES


def draw(rows: Sequence[Json]) -> Drawn | None:
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
        axes.set_yticks(range(len(known)), [short(_name(row), 44) for row in reversed(known)])
        axes.set_ylim(-0.6, len(known) - 0.4)
        axes.set_xlim(-0.03, 1.05)
        axes.set_xlabel("share")
        axes.grid(axis="x")
        key_above(axes)
    said = [f"{_name(row)} {row['published']:.3f} published, {row['measured']:.3f} measured" for row in known]
    return Drawn("published", "", "Published beside measured numbers.", f"{'; '.join(said)}.", figure)


def _name(row: Json) -> str:
    metric = "" if row["metric"] == "acc" else f" {row['metric']}"
    return f"{row['bench']}{metric}, {SIDES[row['side']]}"
