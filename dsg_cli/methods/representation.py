"""SAE-guided internal representation unlearning (2509.15631): what was known is made to look unknown.

In the latent space of an SAE, with z the activations at the last token of a name: in forget text they are drawn to u,
those of a name that nobody has in the same place, and pushed from k, their own of before, while a term on retain text
holds the rest. Distances are relative to that between known and unknown, and the push ends at that distance, so that
the loss is bounded: L = |z - u|^2 / s + p max(0, 1 - |z - k|^2 / s) + a R(retain), s = |u - k|^2.

Names that nobody has are recombined: the first half of one capitalised word with the second half of another. With a
file of texts about unknown entities, z and k are means over the tokens of a row and u is the mean over that file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsg_cli.errors import DsgError
from dsg_cli.methods.freedom import freed
from dsg_cli.methods.given import Changed, Features, Given
from dsg_cli.methods.losses import retain_term
from dsg_cli.methods.mentions import Mentions
from dsg_cli.methods.reference import Reference
from dsg_cli.methods.settings import SaeRepresentation
from dsg_cli.methods.text import Text
from dsg_cli.methods.training import Batches, train
from dsg_cli.residuals import read_residual
from dsg_cli.tokens import TokenBatch

ROWS = 128
"""Rows of a file of unknown text that are read, at most."""


def unlearn(given: Given, settings: SaeRepresentation) -> Changed:
    """Train the layers up to the SAE's hook.

    Raises:
        DsgError: Known and unknown text look alike from the first.
    """
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
