"""Features that were picked by their descriptions or by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from dsg_cli.artifacts import FeatureSet
from dsg_cli.report.plain import visible

if TYPE_CHECKING:
    from dsg_cli.stages.candidates import Candidates

SHOWN = 40
"""Candidates in a table, at most."""


def candidates_table(candidates: Candidates) -> Table:
    """What a query found, the best first, before any text is read."""
    table = Table("rank", "feature", "score", "description", box=None, pad_edge=False)
    for rank, match in enumerate(candidates.ranking[:SHOWN], start=1):
        table.add_row(str(rank), str(match.index), f"{match.score:.3f}", Text(visible(candidates.texts[match.index])))
    n = len(candidates.ranking)
    more = f", of which {SHOWN} are shown" if n > SHOWN else ""
    table.caption = Text(f"{n} match {candidates.described['query']!r}{more}.")
    return table


def picked_table(body: FeatureSet) -> Table:
    """What was taken, with what was measured."""
    found = {row["index"]: row for row in body.described.get("ranking", [])}
    measured = ["forget"] if body.forget_tokens else []
    said = ["description"] if any("description" in row for row in found.values()) else []
    scored = ["score"] if found else []
    table = Table("rank", "feature", *scored, *measured, "retain", *said, box=None, pad_edge=False)
    for rank, feature in enumerate(body.features, start=1):
        row = found.get(feature.index, {"score": 0.0})
        values = [row["score"]] * len(scored) + [feature.forget_score or 0.0] * len(measured) + [feature.retain_score]
        cells = [f"{value:.4g}" for value in values]
        table.add_row(str(rank), str(feature.index), *cells, *(Text(visible(row.get("description", ""))) for _ in said))
    table.caption = Text(visible(_caption(body)))
    return table


def _caption(body: FeatureSet) -> str:
    unread = "" if body.forget_tokens else "; no forget text was read"
    if not body.described:
        return f"Named by hand{unread}."
    described = body.described
    n = described.get("n_matched", len(described["ranking"]))
    return (
        f"{n} match {described['query']!r} ({described['ranker']}, {described['source']}), "
        f"{body.n_passed} are rare enough on retain text{unread}."
    )
