"""Conditional clamp (Khoriaty et al., 2503.11127): a feature is set to a negative value where it exceeds another."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dsg_cli.methods.clamping import Clamping, coefficient_of, frequent_features
from dsg_cli.methods.settings import ConditionalClamp


def clamping(statistics: Mapping[str, Tensor], settings: ConditionalClamp, median_residual_norm: float) -> Clamping:
    """On every token and for every selected feature j: `f_j > above -> -c`.

    Args:
        statistics: `forget_rate` and `retain_rate` of select, [F].
        settings: How many features, above which activation, and c.
        median_residual_norm: The unit `r` of c.

    Raises:
        DsgError: Too few features are left.
    """
    indices = frequent_features(
        statistics,
        n_features=settings.n_features,
        max_retain_rate=settings.max_retain_rate,
        section="conditional_clamp",
    )
    c = coefficient_of(settings.strength, median_residual_norm, key="conditional_clamp.strength")
    n = len(indices)
    return Clamping(indices, [], [-c] * n, [settings.above] * n, "each", setting=settings.strength)
