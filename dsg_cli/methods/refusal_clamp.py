"""Refusal clamp (Khoriaty et al., 2503.11127): where a harmful feature fires, a refusal feature is raised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dsg_cli.errors import DsgError
from dsg_cli.methods.clamping import Clamping, coefficient_of, frequent_features, refusing
from dsg_cli.methods.settings import RefusalClamp


def clamping(statistics: Mapping[str, Tensor], settings: RefusalClamp, median_residual_norm: float) -> Clamping:
    """On every token: `f_j > above` for any selected feature j `-> f_refusal = coefficient`.

    Args:
        statistics: `forget_rate` and `retain_rate` of select, [F].
        settings: How many features, above which activation, and what is raised to what.
        median_residual_norm: The unit `r` of the coefficient.

    Raises:
        DsgError: Too few features are left, or the refusal feature is one of them or not there.
    """
    selected = frequent_features(
        statistics,
        n_features=settings.n_features,
        max_retain_rate=settings.max_retain_rate,
        section="refusal_clamp",
    )
    refusal = settings.refusal_feature
    notes: tuple[str, ...] = ()
    if refusal is None:
        refusal = stand_in(statistics, selected)
        notes = (
            f"The refusal feature {refusal} is a stand-in: of the live features the one that is most frequent on "
            "retain text and rarest on forget text. It turns answers to something else rather than to a refusal.",
        )
    n_features = len(statistics["forget_rate"])
    if refusal >= n_features:
        raise DsgError(
            f"The SAE has {n_features} features; there is no {refusal} to be the refusal feature.",
            "Name another with methods.refusal_clamp.refusal_feature (--set).",
        )
    coefficient = coefficient_of(settings.coefficient, median_residual_norm, key="refusal_clamp.coefficient")
    return refusing(
        selected,
        [settings.above] * len(selected),
        refusal,
        coefficient,
        clamps_features=settings.clamps_features,
        setting=settings.coefficient,
        notes=notes,
    )


def stand_in(statistics: Mapping[str, Tensor], selected: Sequence[int]) -> int:
    """argmax_j(retain_rate_j - forget_rate_j) over live features that are not selected.

    Raises:
        DsgError: There is none.
    """
    forget_F, retain_F = statistics["forget_rate"], statistics["retain_rate"]
    is_live_F = (forget_F > 0) | (retain_F > 0)
    is_live_F[list(selected)] = False
    if not is_live_F.any():
        raise DsgError(
            "All live features are selected, so none is left to stand in for a refusal feature.",
            "Name one with methods.refusal_clamp.refusal_feature (--set).",
        )
    return int((retain_F - forget_F).where(is_live_F, -torch.inf).argmax())
