"""What RMU and SSPU share: at one layer, forget text is pulled to a fixed vector and retain text is held in place.

Layers above it are never run. Shapes: B sequences, L positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsg_cli.methods.freedom import Free
from dsg_cli.methods.given import Given
from dsg_cli.methods.reference import Reference
from dsg_cli.methods.training import Batches, Loss
from dsg_cli.residuals import read_residual
from dsg_cli.runtime.sites import HookSite
from dsg_cli.tokens import TokenBatch


def steering_loss(
    given: Given,
    free: Free,
    *,
    site: HookSite,
    control_D: Tensor,
    retain_weight: float,
    penalty: Callable[[], Tensor] | None = None,
) -> Loss:
    """MSE(h(forget), control) + a MSE(h(retain), h_frozen(retain)) + penalty, at a site, over all tokens.

    Args:
        given: Model and text.
        free: What is trained.
        site: Where h is read.
        control_D: What forget text is pulled to.
        retain_weight: a.
        penalty: A further term, of the weights.
    """
    reference = Reference(free.parameters)

    def read(batch: TokenBatch) -> Tensor:
        return read_residual(given.model, site, batch.ids_BL, batch.mask_BL)[batch.mask_BL].float()

    def loss(batches: Batches) -> dict[str, Tensor]:
        with reference():
            before_TD = read(batches.retain)
        forget = (read(batches.forget) - control_D).square().mean()
        retain = (read(batches.retain) - before_TD).square().mean()
        terms = {"forget": forget.detach(), "retain": retain.detach()}
        total = forget + retain_weight * retain
        if penalty is not None:
            extra = penalty()
            total, terms = total + extra, {**terms, "penalty": extra.detach()}
        return {"loss": total, **terms}

    return loss


def below(layer: int) -> list[int]:
    """The layer and the two below it, whose weights are trained."""
    return [one for one in (layer - 2, layer - 1, layer) if one >= 0]


def unit(vector_D: Tensor) -> Tensor:
    """A vector of length 1."""
    return vector_D / torch.linalg.vector_norm(vector_D)
