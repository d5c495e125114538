"""Plain training: lower the loss of the next token on text. It teaches, and is no way to unlearn.

L = NLL(text) per token. With it a benchmark's *target* is made of a base model (forget and retain text), and the
*reference* that never read what is to be forgotten (retain text alone).
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from dsg_cli.methods.freedom import freed
from dsg_cli.methods.given import Changed, Given
from dsg_cli.methods.losses import logits_of, token_losses
from dsg_cli.methods.settings import Finetune
from dsg_cli.methods.training import Batches, train


def unlearn(given: Given, settings: Finetune) -> Changed:
    """Train on `given.forget`; the name is that of every method's function, `given.retain` is not read."""
    settings = dataclasses.replace(settings, steps=n_steps(settings, len(given.forget.rows)))
    free = freed(given.model, settings, seed=given.seed)
    first = torch.tensor(given.forget.first or [0] * len(given.forget.rows), device=given.device)

    def loss(batches: Batches) -> dict[str, Tensor]:
        batch = batches.forget
        position_L = torch.arange(1, batch.ids_BL.shape[1], device=given.device)
        counts_BL = batch.mask_BL[:, 1:] & (position_L >= first[list(batch.index), None])
        losses_BL = token_losses(logits_of(given.model, batch), batch)
        return {"loss": (losses_BL * counts_BL).sum() / counts_BL.sum()}

    return train(given, free, loss)


def n_steps(settings: Finetune, n_rows: int) -> int:
    """Steps of the optimiser: as many as are set, or else as the epochs need; the last may go beyond them."""
    a_step = settings.batch_size * settings.accumulation
    return settings.steps or max(1, math.ceil(settings.epochs * n_rows / a_step))
