"""RMU (Li et al., 2403.03218): representations of forget text are misdirected.

L = MSE(h_l(forget), c u) + a MSE(h_l(retain), h_l,frozen(retain)), with u a random unit vector of entries drawn evenly
from [0, 1), c its coefficient, and h_l the residual stream after layer l. Layers l - 2 to l are trained.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from dsg_cli.data.batches import TokenBatch
from dsg_cli.data.tokens import with_bos
from dsg_cli.errors import DsgError
from dsg_cli.guardrail.runtime.sites import OUT_PROJECTION, HookSite, decoder_layers
from dsg_cli.methods.text import Mentions, Text
from dsg_cli.methods.training import (
    OUT,
    Batches,
    Changed,
    Features,
    Free,
    Given,
    Loss,
    Reference,
    freed,
    retain_term,
    train,
)
from dsg_cli.models.residuals import read_residual
from dsg_cli.settings import Rmu, SaeRepresentation, Sspu


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


DEFAULT_DEPTH = 7 / 32
"""Of the paper's layer in Zephyr 7B."""


def unlearn_rmu(given: Given, settings: Rmu) -> Changed:
    """Train."""
    n_layers = len(decoder_layers(given.model))
    layer = round(DEFAULT_DEPTH * n_layers) if settings.layer is None else settings.layer
    free = freed(given.model, settings, layers=below(layer), seed=given.seed)
    control_D = settings.coefficient * random_direction(given.model.config.hidden_size, given.seed).to(given.device)
    site = HookSite(layer, "resid_post")
    return train(
        given, free, steering_loss(given, free, site=site, control_D=control_D, retain_weight=settings.retain_weight)
    )


def random_direction(width: int, seed: int) -> Tensor:
    """u, [D]."""
    return unit(torch.rand(width, generator=torch.Generator().manual_seed(seed)))


RANK_TOLERANCE = 1e-6
"""Part of the longest direction below which a further one is none: float32 holds no more."""


def unlearn_sspu(given: Given, settings: Sspu) -> Changed:
    """Train."""
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


INNER = re.compile(r"(?<=[\w,;:] )[A-Z][a-z]{2,}\b")
"""A capitalised word that does not begin a sentence: a name."""

WORD = re.compile(r"\b[A-Z][a-z]{2,}\b")


def with_unknown_names(texts: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """The names in some texts, and the texts with each replaced by one made of two others, everywhere the same."""
    names = sorted({name for text in texts for name in INNER.findall(text)})
    if len(names) < 2:
        raise DsgError(
            "The forget text has no names (capitalised words within sentences) that could be recombined.",
            "Give texts about entities that do not exist: --set methods.sae_representation.unknown_file=FILE.",
        )
    rng = random.Random(seed)
    others = rng.sample(names, len(names))
    taken = set(names)
    made: dict[str, str] = {}
    for name, other in zip(names, others, strict=True):
        new = name[: max(1, len(name) // 2)] + other[len(other) // 2 :]
        while new in taken:
            new += rng.choice("aeiou")
        taken.add(new)
        made[name] = new
    return names, [WORD.sub(lambda found: made.get(found[0], found[0]), text) for text in texts]


def find_mentions(tokenizer: PreTrainedTokenizerBase, forget: Text, *, bos: int | None, seed: int) -> Mentions:
    """The rows of forget text with and without their names."""
    if not tokenizer.is_fast:
        raise DsgError(
            "The tokenizer does not say where in a text its tokens are.",
            "Give texts about unknown entities: --set methods.sae_representation.unknown_file=FILE.",
        )
    texts = [str(text) for text in tokenizer.batch_decode(forget.rows, skip_special_tokens=True)]
    names, others = with_unknown_names(texts, seed)
    longest = max(map(len, forget.rows))
    rows: tuple[list[list[int]], list[list[int]]] = ([], [])
    ends: tuple[list[list[int]], list[list[int]]] = ([], [])
    for text, other in zip(texts, others, strict=True):
        at, others_at = _ends(text, other, names)
        versions = (_encoded(tokenizer, text, at, bos=bos), _encoded(tokenizer, other, others_at, bos=bos))
        # A made-up name may have more tokens than the one it replaces; what no longer fits is left out of both.
        found = zip(*(positions for _, positions in versions), strict=True)
        pairs = [pair for pair in found if min(pair) >= 0 and max(pair) < longest]
        for which, (ids, _) in enumerate(versions):
            rows[which].append(ids[:longest])
            ends[which].append([pair[which] for pair in pairs])
    known, unknown = (dataclasses.replace(forget, rows=several) for several in rows)
    return Mentions((known, unknown), ends)


def _ends(text: str, other: str, names: Sequence[str]) -> tuple[list[int], list[int]]:
    """Where the words end that are names, in a text and in the version of it with other names."""
    known = set(names)
    words = zip(WORD.finditer(text), WORD.finditer(other), strict=True)
    pairs = [(word.end(), new.end()) for word, new in words if word[0] in known]
    return [end for end, _ in pairs], [end for _, end in pairs]


def _encoded(
    tokenizer: PreTrainedTokenizerBase, text: str, ends: Sequence[int], *, bos: int | None
) -> tuple[list[int], list[int]]:
    """Token ids, and the positions of the tokens in which those characters end; -1 for one that is in no token."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = with_bos(found["input_ids"], bos)
    shift = len(ids) - len(found["input_ids"])
    spans = [(i + shift, *span) for i, span in enumerate(found["offset_mapping"])]
    return ids, [next((i for i, start, stop in spans if start < end <= stop), -1) for end in ends]


ROWS = 128
"""Rows of a file of unknown text that are read, at most."""


def unlearn_sae_representation(given: Given, settings: SaeRepresentation) -> Changed:
    """Train the layers up to the SAE's hook."""
    features, unknown = given.features, given.unknown
    assert features is not None and unknown is not None
    layers = list(range(features.site.layer + (features.site.point != "resid_pre")))
    free = freed(given.model, settings, layers=layers, seed=given.seed)
    reference = Reference(free.parameters)
    with torch.no_grad():
        centre_F = None if isinstance(unknown, Mentions) else _centre(given, features, unknown)

    def looks(index: Sequence[int]) -> tuple[Tensor, Tensor]:
        """k and u of some rows."""
        if isinstance(unknown, Mentions):
            known_NF = _activations(given, features, *unknown.known(index))
            return known_NF, _activations(given, features, *unknown.unknown(index))
        known_NF = latents(given, features, given.forget.batch(index))
        assert centre_F is not None
        return known_NF, centre_F.expand_as(known_NF)

    def loss(batches: Batches) -> dict[str, Tensor]:
        index = batches.forget.index
        if isinstance(unknown, Mentions):
            z_NF = _activations(given, features, *unknown.known(index))
        else:
            z_NF = latents(given, features, batches.forget)
        with reference():
            known_NF, unknown_NF = looks(index)
        pull, push = representation_loss(z_NF, known_NF, unknown_NF)
        retain = retain_term(given.model, reference, batches.retain, settings.retain_loss)
        total = pull + settings.push_weight * push + settings.retain_weight * retain
        return {"loss": total, "pull": pull.detach(), "push": push.detach(), "retain": retain.detach()}

    _check_apart(looks, len(given.forget.rows))
    return train(given, free, loss)


def _check_apart(looks: Callable[[Sequence[int]], tuple[Tensor, Tensor]], n_rows: int) -> None:
    """Refuse to train where no row looks different from unknown text; most often the first tells that one does."""
    with torch.no_grad():
        for start in range(0, n_rows, 8):
            known_NF, unknown_NF = looks(range(start, min(start + 8, n_rows)))
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


def latents(given: Given, features: Features, batch: TokenBatch) -> Tensor:
    """Mean SAE activations of each sequence's counted tokens, [B, F]."""
    counted_BL = batch.counted_BL
    acts_TF = _activations(given, features, batch, counted_BL)
    row_T = torch.arange(len(counted_BL), device=counted_BL.device)[:, None].expand_as(counted_BL)[counted_BL]
    sums_BF = torch.zeros(len(counted_BL), acts_TF.shape[1], device=acts_TF.device).index_add(0, row_T, acts_TF)
    return sums_BF / counted_BL.sum(-1, keepdim=True).clamp(min=1)


def _activations(given: Given, features: Features, batch: TokenBatch, at_BL: Tensor) -> Tensor:
    """SAE activations at some tokens, in their order, [T, F]."""
    resid_BLD = read_residual(given.model, features.site, batch.ids_BL, batch.mask_BL).float()
    return features.encode(resid_BLD[at_BL])


def _centre(given: Given, features: Features, text: Text) -> Tensor:
    """Mean latents over rows, [F]."""
    index = text.draws(min(ROWS, len(text.rows)), given.seed)
    parts = [latents(given, features, text.batch(index[i : i + 8])).sum(0) for i in range(0, len(index), 8)]
    return torch.stack(parts).sum(0) / len(index)
