"""SSPU (Wang et al., 2505.24428): RMU guided by the subspaces that SAE features span.

Decoder rows of the most and of the least relevant features span two subspaces, of which U_rel and U_irr are bases.
Forget text is pulled to c times a random vector projected into span(U_irr), so that it turns into something that has
nothing to do with the knowledge; and |(I - U_rel U_rel^T) dW|^2 keeps the update of each weight matrix, on its side of
the residual stream, within span(U_rel). Of the paper's own settings only the form is followed: see settings.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dsg_cli.errors import DsgError
from dsg_cli.methods.freedom import OUT, freed
from dsg_cli.methods.given import Changed, Given
from dsg_cli.methods.settings import Sspu
from dsg_cli.methods.steered import below, steering_loss, unit
from dsg_cli.methods.training import train
from dsg_cli.runtime.sites import OUT_PROJECTION

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
    sides = stream_sides(given.model, free.names)

    def penalty() -> Tensor:
        changes = [now - then for now, then in zip(free.parameters, before, strict=True)]
        return settings.subspace_weight * outside(changes, relevant_DK, sides)

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
    """A basis of what some vectors span, [D, K']; K' is their number, or the rank if that is lower.

    By singular values: the paper's QR has the same span, but for vectors that depend on those before them.
    """
    u_DK, size_K, _ = torch.linalg.svd(rows_KD.double().T, full_matrices=False)
    return u_DK[:, size_K > RANK_TOLERANCE * size_K.max()].float()


def stream_sides(model: nn.Module, names: Sequence[str]) -> list[int]:
    """Of each weight, the dimension that is the residual stream if both have its width: 0 or -1.

    A linear layer stores [outputs, inputs], GPT-2's `Conv1D` the other way round.
    """
    sides = []
    for name in names:
        path = name.rpartition(".")[0]
        is_writing = path.rpartition(".")[2] in (*OUT, *OUT_PROJECTION)
        sides.append(0 if is_writing != isinstance(model.get_submodule(path), Conv1D) else -1)
    return sides


def outside(changes: Sequence[Tensor], basis_DK: Tensor, sides: Sequence[int]) -> Tensor:
    """Sum over weights of |(I - U U^T) dW|^2, [].

    D, the width of the residual stream, is the outputs of a matrix that writes to it and the inputs of one that reads
    it; what has neither side, such as a bias within an MLP, counts whole. For an orthonormal U the norm of what is
    outside is |dW|^2 - |U^T dW|^2, which takes K products a column in place of D.

    Args:
        changes: dW of each weight.
        basis_DK: U.
        sides: Which dimension of each is D where both are as wide.
    """
    width = len(basis_DK)
    total = torch.zeros((), device=basis_DK.device)
    for change, side in zip(changes, sides, strict=True):
        total = total + change.square().sum()
        wide = [one for one in (0, -1) if change.shape[one] == width]
        if wide:
            inside = torch.tensordot(change, basis_DK, dims=([side if len(wide) == 2 else wide[0]], [0]))
            total = total - inside.square().sum()
    return total
