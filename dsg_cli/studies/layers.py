"""Which layer? A guardrail on every SAE that is named, each where it was trained.

Strengths in `r` are multiples of the median residual norm at the SAE's own hook, so that one strength means the same at
every layer.
"""

from __future__ import annotations

from dsg_cli.artifacts import Json
from dsg_cli.studies import seeds
from dsg_cli.studies.rig import Rig


def rows_of(point: Json, rig: Rig) -> list[Json]:
    """The guardrail on the SAE of a point, on every bench; `hook` says which layer it is.

    Raises:
        DsgError: The SAE cannot be read or does not fit the model, or the guardrail cannot be made.
    """
    return seeds.rows_of(point, rig)
