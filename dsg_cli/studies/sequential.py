"""Requests to forget, one after another: a guardrail for each, all acting together, against one for their union.

After k requests, `each` has k guardrails of n features, the i-th made when the corpora of requests 1 to i were retained
no more; `union` has one of n features, made on all k corpora at once.
"""

from __future__ import annotations

from dsg_cli.artifacts import Json
from dsg_cli.studies.guards import Guards
from dsg_cli.studies.rig import Rig
from dsg_cli.studies.rows import accuracy_rows


def rows_of(point: Json, rig: Rig) -> list[Json]:
    """What acts after so many requests, on the bench of every request and on all others.

    Raises:
        DsgError: A guardrail cannot be made.
    """
    n_requests, wanted = point["requests"], rig.wanted.at(point)
    numbers = range(n_requests) if point["way"] == "each" else [n_requests - 1]
    grounds = [_guards(rig, number, is_union=point["way"] == "union") for number in numbers]
    acting = [guards.make(wanted) for guards in grounds]
    return accuracy_rows(point, rig.asker(grounds[0]).under(acting))


def _guards(rig: Rig, number: int, *, is_union: bool) -> Guards:
    """Guardrails for one request, or for all up to it."""
    met = rig.requests[: number + 1]
    retain = [one for one in rig.retain if one.partition("=")[0] not in met]
    return rig.guards_at({"corpora.forget": list(met if is_union else met[-1:]), "corpora.retain": retain})
