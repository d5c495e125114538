"""Published numbers beside measured ones, and how far apart they are."""

from __future__ import annotations

from rich.table import Table

from dsg_cli.artifacts import Json
from dsg_cli.settings import PublishedSection

SIDES = {"base": "base", "unlearned": "guarded"}
"""What tables call the sides of a bench."""


def beside(section: PublishedSection, results: Json) -> list[Json]:
    """`[{bench, side, metric, published, measured, difference}]`; null where nothing was measured.

    Args:
        section: Of a recipe.
        results: bench -> side -> metric -> value, of an evaluation.
    """
    rows: list[Json] = []
    for bench, sides in section.results.items():
        for side, values in sides.items():
            of_metrics = values if isinstance(values, dict) else {"acc": values}
            for metric, published in of_metrics.items():
                measured = results.get(bench, {}).get(side, {}).get(metric)
                difference = None if measured is None else measured - published
                row = {"bench": bench, "side": side, "metric": metric, "published": published}
                rows.append(row | {"measured": measured, "difference": difference})
    return rows


def published_table(rows: list[Json]) -> Table:
    """The same for a terminal: shares with four digits after the point, other metrics with two."""
    table = Table("", "side", "metric", "published", "measured", "difference", box=None, pad_edge=False)
    for row in rows:
        n_digits = 4 if row["metric"].startswith("acc") else 2
        signs = {"published": "", "measured": "", "difference": "+"}
        shown = ["-" if row[key] is None else f"{row[key]:{sign}.{n_digits}f}" for key, sign in signs.items()]
        table.add_row(row["bench"], SIDES[row["side"]], row["metric"], *shown)
    return table
