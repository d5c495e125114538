"""Methods that train on what the residual stream holds rather than on what the model says: RMU, SSPU and SAE-guided
representation. Layers above the one that is read are never run. Shapes: B sequences, L positions, D width, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dsg_cli.data.batches import TokenBatch
from dsg_cli.errors import DsgError
from dsg_cli.guardrail.runtime.sites import OUT_PROJECTION, HookSite, decoder_layers
from dsg_cli.methods.text import NameSpans, TrainingRows
from dsg_cli.methods.training import (
    OUT,
    Batches,
    Features,
    Loss,
    ReferenceWeights,
    TrainableParameters,
    TrainedWeights,
    TrainingInputs,
    retain_term,
    train,
    trainable_parameters,
)
from dsg_cli.models.residuals import read_residual
from dsg_cli.settings import Rmu, SaeRepresentation, Sspu

DEFAULT_DEPTH = 7 / 32
"""Of RMU's layer in Zephyr 7B."""

RANK_TOLERANCE = 1e-6
"""Part of the longest direction below which a further one is none: float32 holds no more."""

UNKNOWN_ROWS = 128
"""Rows of a file of unknown text that are read, at most."""


def unlearn_rmu(inputs: TrainingInputs, settings: Rmu) -> TrainedWeights:
    """RMU (Li et al., 2403.03218): representations of forget text are misdirected.

    L = MSE(h_l(forget), c u) + a MSE(h_l(retain), h_l,frozen(retain)), with u a random unit vector of entries drawn
    evenly from [0, 1), c its coefficient, and h_l the residual stream after layer l. Layers l - 2 to l are trained.
    """
    n_layers = len(decoder_layers(inputs.model))
    layer = round(DEFAULT_DEPTH * n_layers) if settings.layer is None else settings.layer
    trainable = trainable_parameters(inputs.model, settings, layers=_with_two_below(layer), seed=inputs.seed)
    direction_D = random_direction(inputs.model.config.hidden_size, inputs.seed).to(inputs.device)
    site, control_D = HookSite(layer, "resid_post"), settings.coefficient * direction_D
    return train(inputs, trainable, _steering_loss(inputs, trainable, site, control_D, settings.retain_weight))


def random_direction(width: int, seed: int) -> Tensor:
    """u, [D]."""
    return _unit(torch.rand(width, generator=torch.Generator().manual_seed(seed)))


def unlearn_sspu(inputs: TrainingInputs, settings: Sspu) -> TrainedWeights:
    """SSPU (Wang et al., 2505.24428): RMU guided by the subspaces that SAE features span.

    Decoder rows of the most and of the least relevant features span two subspaces, of which U_rel and U_irr are bases.
    Forget text is pulled to c times a random vector projected into span(U_irr), so that it turns into something that
    has nothing to do with the knowledge; and |(I - U_rel U_rel^T) dW|^2 keeps the update of each weight matrix, on its
    side of the residual stream, within span(U_rel). Of the paper's own settings only the form is followed.
    """
    features = inputs.features
    assert features is not None
    if settings.lora:
        raise DsgError("sspu keeps the update of weights in a subspace, which adapters are not.", "Leave --lora out.")
    layers = _with_two_below(features.site.layer)
    trainable = trainable_parameters(inputs.model, settings, layers=layers, seed=inputs.seed)
    relevant_DK, irrelevant_DK = (
        orthonormal_basis(rows).to(inputs.device) for rows in (features.relevant_KD, features.irrelevant_KD)
    )
    generator = torch.Generator().manual_seed(inputs.seed)
    random_D = torch.randn(len(irrelevant_DK), generator=generator).to(inputs.device)
    control_D = settings.coefficient * _unit(irrelevant_DK @ (irrelevant_DK.T @ random_D))
    before = [parameter.detach().clone() for parameter in trainable.parameters]
    sides = stream_sides(inputs.model, trainable.names)

    def penalty() -> Tensor:
        changes = [now - then for now, then in zip(trainable.parameters, before, strict=True)]
        return settings.subspace_weight * norm_outside(changes, relevant_DK, sides)

    loss = _steering_loss(inputs, trainable, features.site, control_D, settings.retain_weight, penalty)
    return train(inputs, trainable, loss)


def _steering_loss(
    inputs: TrainingInputs,
    trainable: TrainableParameters,
    site: HookSite,
    control_D: Tensor,
    retain_weight: float,
    penalty: Callable[[], Tensor] | None = None,
) -> Loss:
    """MSE(h(forget), control) + a MSE(h(retain), h_frozen(retain)) + penalty of weights, h at a site, all tokens."""
    reference = ReferenceWeights(trainable.parameters)

    def read(batch: TokenBatch) -> Tensor:
        return read_residual(inputs.model, site, batch.ids_BL, batch.mask_BL)[batch.mask_BL].float()

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


def _with_two_below(layer: int) -> list[int]:
    return list(range(max(0, layer - 2), layer + 1))


def _unit(vector_D: Tensor) -> Tensor:
    return vector_D / torch.linalg.vector_norm(vector_D)


def orthonormal_basis(rows_KD: Tensor) -> Tensor:
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


def norm_outside(changes: Sequence[Tensor], basis_DK: Tensor, sides: Sequence[int]) -> Tensor:
    """Sum over weights of |(I - U U^T) dW|^2, [].

    D, the width of the residual stream, is the outputs of a matrix that writes to it and the inputs of one that reads
    it; what has neither side, such as a bias within an MLP, counts whole. For an orthonormal U the norm of what is
    outside is |dW|^2 - |U^T dW|^2, which takes K products a column in place of D. `sides` says which dimension of each
    dW is D where both are as wide.
    """
    width = len(basis_DK)
    total = torch.zeros((), device=basis_DK.device)
    for change, side in zip(changes, sides, strict=True):
        total = total + change.square().sum()
        wide = [dimension for dimension in (0, -1) if change.shape[dimension] == width]
        if wide:
            inside = torch.tensordot(change, basis_DK, dims=([side if len(wide) == 2 else wide[0]], [0]))
            total = total - inside.square().sum()
    return total


def unlearn_sae_representation(inputs: TrainingInputs, settings: SaeRepresentation) -> TrainedWeights:
    """SAE-guided internal representation unlearning (2509.15631): what was known is made to look unknown.

    In the latent space of an SAE, with z the activations at the last token of a name: in forget text they are drawn to
    u, those of a name that nobody has in the same place, and pushed from k, their own of before, while a term on retain
    text holds the rest. Distances are relative to that between known and unknown, and the push ends at that distance,
    so that the loss is bounded: L = |z - u|^2 / s + p max(0, 1 - |z - k|^2 / s) + a R(retain), s = |u - k|^2.

    With a file of texts about unknown entities, z and k are means over the tokens of a row and u is the mean over that
    file. The layers up to the SAE's hook are trained.
    """
    features, unknown = inputs.features, inputs.unknown
    assert features is not None and unknown is not None
    layers = list(range(features.site.layer + (features.site.point != "resid_pre")))
    trainable = trainable_parameters(inputs.model, settings, layers=layers, seed=inputs.seed)
    reference = ReferenceWeights(trainable.parameters)
    with torch.no_grad():
        mean_F = None if isinstance(unknown, NameSpans) else _mean_latents(inputs, features, unknown)

    def latents_of(index: Sequence[int]) -> Tensor:
        """z of some rows with the weights of now, and k with those of then."""
        if isinstance(unknown, NameSpans):
            return _activations(inputs, features, *unknown.batch(index, version=0))
        return row_latents(inputs, features, inputs.forget.batch(index))

    def known_and_unknown(index: Sequence[int]) -> tuple[Tensor, Tensor]:
        known_NF = latents_of(index)
        if isinstance(unknown, NameSpans):
            return known_NF, _activations(inputs, features, *unknown.batch(index, version=1))
        assert mean_F is not None
        return known_NF, mean_F.expand_as(known_NF)

    def loss(batches: Batches) -> dict[str, Tensor]:
        z_NF = latents_of(batches.forget.index)
        with reference():
            known_NF, unknown_NF = known_and_unknown(batches.forget.index)
        pull, push = representation_loss(z_NF, known_NF, unknown_NF)
        retain = retain_term(inputs.model, reference, batches.retain, settings.retain_loss)
        total = pull + settings.push_weight * push + settings.retain_weight * retain
        return {"loss": total, "pull": pull.detach(), "push": push.detach(), "retain": retain.detach()}

    _check_apart(known_and_unknown, len(inputs.forget.rows))
    return train(inputs, trainable, loss)


def _check_apart(known_and_unknown: Callable[[Sequence[int]], tuple[Tensor, Tensor]], n_rows: int) -> None:
    """Refuse to train where no row looks different from unknown text; most often the first tells that one does."""
    with torch.no_grad():
        for start in range(0, n_rows, 8):
            known_NF, unknown_NF = known_and_unknown(range(start, min(start + 8, n_rows)))
            if bool((known_NF != unknown_NF).any()):
                return
    raise DsgError(
        "The SAE tells forget text and text about unknown entities not apart.",
        "Give other texts: --set methods.sae_representation.unknown_file=FILE.",
    )


def representation_loss(z_NF: Tensor, known_NF: Tensor, unknown_NF: Tensor) -> tuple[Tensor, Tensor]:
    """|z - u|^2 / s and max(0, 1 - |z - k|^2 / s), each in the mean over those whose u and k differ, [] each.

    Where none do, as in rows without a name, both are 0.
    """
    scale_N = (known_NF - unknown_NF).square().sum(-1)
    differ_N = scale_N > 0
    if not bool(differ_N.any()):
        return 0 * z_NF.sum(), 0 * z_NF.sum()
    scale_N = torch.where(differ_N, scale_N, 1.0)
    pull_N = (z_NF - unknown_NF).square().sum(-1) / scale_N
    push_N = (1 - (z_NF - known_NF).square().sum(-1) / scale_N).clamp(min=0)
    return pull_N[differ_N].mean(), push_N[differ_N].mean()


def row_latents(inputs: TrainingInputs, features: Features, batch: TokenBatch) -> Tensor:
    """Mean SAE activations of each sequence's counted tokens, [B, F]."""
    counted_BL = batch.counted_BL
    acts_TF = _activations(inputs, features, batch, counted_BL)
    row_T = torch.arange(len(counted_BL), device=counted_BL.device)[:, None].expand_as(counted_BL)[counted_BL]
    sums_BF = torch.zeros(len(counted_BL), acts_TF.shape[1], device=acts_TF.device).index_add(0, row_T, acts_TF)
    return sums_BF / counted_BL.sum(-1, keepdim=True).clamp(min=1)


def _activations(inputs: TrainingInputs, features: Features, batch: TokenBatch, at_BL: Tensor) -> Tensor:
    """SAE activations at some tokens, in their order, [T, F]."""
    resid_BLD = read_residual(inputs.model, features.site, batch.ids_BL, batch.mask_BL).float()
    return features.encode(resid_BLD[at_BL])


def _mean_latents(inputs: TrainingInputs, features: Features, text: TrainingRows) -> Tensor:
    """Over rows, [F]."""
    index = text.draws(min(UNKNOWN_ROWS, len(text.rows)), inputs.seed)
    parts = [row_latents(inputs, features, text.batch(index[i : i + 8])).sum(0) for i in range(0, len(index), 8)]
    return torch.stack(parts).sum(0) / len(index)
