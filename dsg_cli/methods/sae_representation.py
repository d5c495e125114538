"""SAE-guided internal representation unlearning (2509.15631): what was known is made to look unknown.

In the latent space of an SAE, with z the mean activations of a sequence's tokens: forget text is drawn to the mean
latents of text about entities that do not exist and pushed from its own latents of before, while a term on retain text
holds the rest. Distances are relative to that between known and unknown, and the push ends at that distance, so that
the loss is bounded: L = |z - u|^2 / s + p max(0, 1 - |z - k|^2 / s) + a R(retain), s = |u - k|^2.

Where no text about unknown entities is given, it is forget text with its names recombined: the first half of one
capitalised word with the second half of another.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from dsg_cli.errors import DsgError
from dsg_cli.methods.freedom import freed
from dsg_cli.methods.given import Changed, Features, Given
from dsg_cli.methods.losses import retain_term
from dsg_cli.methods.reference import Reference
from dsg_cli.methods.settings import SaeRepresentation
from dsg_cli.methods.text import Text
from dsg_cli.methods.training import Batches, train
from dsg_cli.residuals import read_residual
from dsg_cli.tokens import TokenBatch

NAME = re.compile(r"(?<=[\w,;:] )[A-Z][a-z]{2,}\b")
"""A capitalised word that does not begin a sentence."""
ROWS = 128
"""Rows from which the latents of known and of unknown text are taken."""


def unlearn(given: Given, settings: SaeRepresentation) -> Changed:
    """Train the layers up to the SAE's hook.

    Raises:
        DsgError: Known and unknown text have the same latents.
    """
    features, unknown = given.features, given.unknown
    assert features is not None and unknown is not None
    layers = list(range(features.site.layer + (features.site.point != "resid_pre")))
    free = freed(given.model, settings, layers=layers, seed=given.seed)
    reference = Reference(free.parameters)
    with torch.no_grad():
        known_F, unknown_F = (_centre(given, features, text) for text in (given.forget, unknown))
    scale = (known_F - unknown_F).square().sum()
    if not scale > 0:
        raise DsgError("Text about unknown entities has the same SAE features as forget text.", "Give another file.")

    def loss(batches: Batches) -> dict[str, Tensor]:
        z_BF = latents(given, features, batches.forget)
        pull = (z_BF - unknown_F).square().sum(-1).mean() / scale
        distance_B = (z_BF - known_F).square().sum(-1) / scale
        push = (1 - distance_B).clamp(min=0).mean()
        retain = retain_term(given.model, reference, batches.retain, settings.retain_loss)
        total = pull + settings.push_weight * push + settings.retain_weight * retain
        return {"loss": total, "pull": pull.detach(), "push": push.detach(), "retain": retain.detach()}

    return train(given, free, loss)


def latents(given: Given, features: Features, batch: TokenBatch) -> Tensor:
    """Mean SAE activations of each sequence's counted tokens, [B, F]."""
    resid_BLD = read_residual(given.model, features.site, batch.ids_BL, batch.mask_BL).float()
    counted_BL = batch.counted_BL
    acts_TF = features.encode(resid_BLD[counted_BL])
    row_T = torch.arange(len(counted_BL), device=counted_BL.device)[:, None].expand_as(counted_BL)[counted_BL]
    sums_BF = torch.zeros(len(counted_BL), acts_TF.shape[1], device=acts_TF.device).index_add(0, row_T, acts_TF)
    return sums_BF / counted_BL.sum(-1, keepdim=True).clamp(min=1)


def _centre(given: Given, features: Features, text: Text) -> Tensor:
    """Mean over rows, [F]."""
    index = text.draws(min(ROWS, len(text.rows)), given.seed)
    parts = [latents(given, features, text.batch(index[i : i + 8])).sum(0) for i in range(0, len(index), 8)]
    return torch.stack(parts).sum(0) / len(index)


def with_unknown_names(texts: Sequence[str], seed: int) -> list[str]:
    """The texts with every name replaced by one that is made of two others, the same one wherever it stands."""
    names = sorted({name for text in texts for name in NAME.findall(text)})
    rng = random.Random(seed)
    others = rng.sample(names, len(names))
    made = {a: a[: max(1, len(a) // 2)] + b[len(b) // 2 :] for a, b in zip(names, others, strict=True)}
    taken = set(names)
    made = {a: b if b not in taken else f"{b}a" for a, b in made.items()}
    return [re.sub(r"\b[A-Z][a-z]{2,}\b", lambda found: made.get(found[0], found[0]), text) for text in texts]
