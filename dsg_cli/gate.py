"""Hits to gate statistic: when does a sequence count as being about the forgotten knowledge?

Calibration, the guardrail at run time and the tests all count hits here.
"""

from __future__ import annotations

from torch import Tensor


def hot_tokens(acts_BLK: Tensor, counted_BL: Tensor) -> Tensor:
    """True where at least one selected feature is active on a counted token, shape [B, L]."""
    return (acts_BLK != 0).any(-1) & counted_BL


def mean_statistic(hot_BL: Tensor, counted_BL: Tensor) -> Tensor:
    """Share of counted tokens that are hot, shape [B]; 0 for a sequence without counted tokens.

    The paper's rho. Padding, BOS and EOS enter neither numerator nor denominator, so neither the batch nor the
    padding side moves it.
    """
    return hot_BL.sum(-1) / counted_BL.sum(-1).clamp(min=1)
