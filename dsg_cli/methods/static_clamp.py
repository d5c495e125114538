"""Static clamp (Farrell et al., 2410.19278): wherever a selected feature is active, it is set to a negative value."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dsg_cli.methods.clamping import Clamping, coefficient_of, frequent_features
from dsg_cli.methods.settings import StaticClamp


def clamping(statistics: Mapping[str, Tensor], settings: StaticClamp, median_residual_norm: float) -> Clamping:
    """On every token and for every selected feature j: `f_j > 0 -> -c`.

    Khoriaty et al. (2503.11127) call the same with c = 300 and 5 features Clamp Prime.

    Args:
        statistics: `forget_rate` and `retain_rate` of select, [F].
        settings: How many features, and c.
        median_residual_norm: The unit `r` of c.

    Raises:
        DsgError: Too few features are left.
    """
    indices = frequent_features(
        statistics,
        n_features=settings.n_features,
        max_retain_rate=settings.max_retain_rate,
        section="static_clamp",
    )
    c = coefficient_of(settings.strength, median_residual_norm, key="static_clamp.strength")
    n = len(indices)
    return Clamping(indices, [], [-c] * n, [0.0] * n, "each", setting=settings.strength)
