"""For texts of which length does the threshold hold?

Pieces of exactly so many tokens: the threshold that retain text of that length would set, the rate of false positives
under the recipe's threshold (set on a range of lengths) and under the length's own, and the share of forget text on
which the recipe's gate opens.
"""

from __future__ import annotations

from dsg_cli.artifacts import Json
from dsg_cli.errors import DsgError
from dsg_cli.studies.guards import Guards, Statistics
from dsg_cli.studies.rig import Rig
from dsg_cli.studies.rows import failed_row, rate_row, row_of


def rows_of(point: Json, rig: Rig) -> list[Json]:
    """What the gate does with text of one length; a length that can set no threshold of its own says why.

    Raises:
        DsgError: The recipe's guardrail cannot be made, or there is no text of that length.
    """
    guards, wanted = rig.guards_at({}), rig.wanted.at(point)
    threshold = guards.make(wanted).threshold
    seen = {part: _seen(rig, guards, point, part) for part in ("calibrate", "fresh", "forget")}
    if not seen["fresh"]:
        raise DsgError(f"No document of the retain text has {point['length']} tokens.", "Give shorter lengths.")
    rows = [_share(point, "false_positive_rate", seen["fresh"], threshold)]
    if seen["forget"]:
        rows.append(_share(point, "forget_gate_rate", seen["forget"], threshold))
    try:
        own = guards.threshold(wanted, seen["calibrate"])
    except DsgError as error:
        return [*rows, failed_row(point, error.message, metric="threshold")]
    return [*rows, row_of(point, "threshold", value=own), _share(point, "own_false_positive_rate", seen["fresh"], own)]


def _seen(rig: Rig, guards: Guards, point: Json, part: str) -> Statistics:
    what, pieces = f"{part}, {point['length']} tokens", rig.pieces(part, point["length"], False)
    return guards.statistics(rig.wanted.at(point), pieces, what=what) if pieces else []


def _share(point: Json, metric: str, seen: Statistics, threshold: float) -> Json:
    return rate_row(point, metric, sum(statistic > threshold for _, statistic in seen), len(seen))
