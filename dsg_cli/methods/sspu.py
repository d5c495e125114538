"""SSPU (Wang et al., 2505.24428): RMU guided by the subspaces that SAE features span.

Decoder rows of the most and of the least relevant features, made orthonormal by QR, are the bases U_rel and U_irr.
Forget text is pulled to c times a random vector projected into span(U_irr), so that it turns into something that has
nothing to do with the knowledge; and |(I - U_rel U_rel^T) dW|^2 keeps the update of each weight matrix, on its side of
the residual stream, within span(U_rel). Of the paper's own settings only the form is followed: see settings.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsg_cli.errors import DsgError
from dsg_cli.methods.freedom import freed
from dsg_cli.methods.given import Changed, Given
from dsg_cli.methods.settings import Sspu
from dsg_cli.methods.steered import below, steering_loss, unit
from dsg_cli.methods.training import train

RANK_TOLERANCE = 1e-6
"""Part of the longest direction below which a further one is none: float32 holds no more."""


def unlearn(given: Given, settings: Sspu) -> Changed:
    """Train.

    Raises:
        DsgError: Adapters are asked for, whose products are no update that a subspace holds.
    """
    features = given.features
    assert features is not None
    if settings.lora:
        raise DsgError("sspu keeps the update of weights in a subspace, which adapters are not.", "Leave --lora out.")
    free = freed(given.model, settings, layers=below(features.site.layer), seed=given.seed)
    relevant_DK, irrelevant_DK = (
        orthonormal(rows).to(given.device) for rows in (features.relevant_KD, features.irrelevant_KD)
    )
    random_D = torch.randn(len(irrelevant_DK), generator=torch.Generator().manual_seed(given.seed)).to(given.device)
    control_D = settings.coefficient * unit(irrelevant_DK @ (irrelevant_DK.T @ random_D))
    before = [one.detach().clone() for one in free.parameters]

    def penalty() -> Tensor:
        changes = [now - then for now, then in zip(free.parameters, before, strict=True)]
        return settings.subspace_weight * outside(changes, relevant_DK)

    loss = steering_loss(
        given,
        free,
        site=features.site,
        control_D=control_D,
        retain_weight=settings.retain_weight,
        penalty=penalty,
    )
    return train(given, free, loss)


def orthonormal(rows_KD: Tensor) -> Tensor:
    """A basis of what some vectors span, [D, K']; K' is their number, or the rank if that is lower."""
    q_DK, r_KK = torch.linalg.qr(rows_KD.double().T)
    size = r_KK.diagonal().abs()
    return q_DK[:, size > RANK_TOLERANCE * size.max()].float()


def outside(changes: Sequence[Tensor], basis_DK: Tensor) -> Tensor:
    """Sum over weights of |(I - U U^T) dW|^2, [].

    D, the width of the residual stream, is the outputs of a matrix that writes to it and the inputs of one that reads
    it; what has neither side, such as a bias within an MLP, counts whole. For an orthonormal U the norm of what is
    outside is |dW|^2 - |U^T dW|^2, which takes K products a column in place of D.
    """
    width = len(basis_DK)
    total = torch.zeros((), device=basis_DK.device)
    for change in changes:
        total = total + change.square().sum()
        if change.shape[0] == width:
            total = total - (basis_DK.T @ change).square().sum()
        elif change.shape[-1] == width:
            total = total - (change @ basis_DK).square().sum()
    return total
