"""How much does it matter which features, which strength and which alpha?

Number of features x strength x ratio percentile x alpha: from one pass over the corpora, one over held-out retain text
(of gates that watch the clamped features one for all of them together), and one evaluation of the base model.
"""

from __future__ import annotations

from collections.abc import Sequence

from dsg_cli.artifacts import Json
from dsg_cli.studies.rig import Rig, guarded_rows


def prepare(points: Sequence[Json], rig: Rig) -> None:
    """See retain text once for all gates."""
    rig.guards_at({}).prepare([rig.wanted.at(point) for point in points])


def rows_of(point: Json, rig: Rig) -> list[Json]:
    """The guardrail of a point, on every bench.

    Raises:
        DsgError: It cannot be made.
    """
    return guarded_rows(point, rig, rig.guards_at({}))
