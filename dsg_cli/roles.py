"""Which features an artifact chose, and what for: to be clamped, to be watched by the gate, or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dsg_cli.artifacts import FeatureSet, Guardrail
from dsg_cli.runtime.gates import DETECTING_FORMS
from dsg_cli.slicing import chosen_columns


@dataclass(frozen=True)
class Chosen:
    """One feature of an SAE."""

    index: int
    roles: list[str]
    """`clamped`, `watched`; empty where it was not chosen at all."""
    weight: float | None = None
    """In the gate's token score, if it has one there."""


def chosen_by(body: Guardrail | FeatureSet, detect_K: Tensor | None = None) -> list[Chosen]:
    """What a guardrail clamps, then what its gate only watches; or what a selection would.

    Args:
        body: The artifact's.
        detect_K: Of a guardrail: weights of its columns in the gate's token score.
    """
    if isinstance(body, FeatureSet):
        weights = {int(one["index"]): float(one["weight"]) for one in body.probe.get("features", [])}
        clamped, watched = [feature.index for feature in body.features], list(weights)
    else:
        clamped, watched = body.indices, body.detectors or body.indices
        columns = chosen_columns(body.indices, body.detectors)
        has_weights = body.gate in DETECTING_FORMS and detect_K is not None
        weights = dict(zip(columns, detect_K.tolist(), strict=True)) if has_weights and detect_K is not None else {}
    return [
        Chosen(index, _roles(index, clamped, watched), weights.get(index) if index in watched else None)
        for index in chosen_columns(clamped, watched)
    ]


def _roles(index: int, clamped: Sequence[int], watched: Sequence[int]) -> list[str]:
    return [role for role, of_role in (("clamped", clamped), ("watched", watched)) if index in of_role]
