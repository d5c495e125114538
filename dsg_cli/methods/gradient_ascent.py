"""Gradient ascent (Jang et al., 2210.01504): training on forget text with the sign turned round.

L = -NLL(forget), per token. Nothing holds the rest of the model, and nothing bounds the loss.
"""

from __future__ import annotations

from torch import Tensor

from dsg_cli.methods.freedom import freed
from dsg_cli.methods.given import Changed, Given
from dsg_cli.methods.losses import logits_of, mean_loss
from dsg_cli.methods.settings import GradientAscent
from dsg_cli.methods.training import Batches, train


def unlearn(given: Given, settings: GradientAscent) -> Changed:
    """Train."""
    free = freed(given.model, settings, seed=given.seed)

    def loss(batches: Batches) -> dict[str, Tensor]:
        forget = mean_loss(logits_of(given.model, batches.forget), batches.forget)
        return {"loss": -forget, "forget_nll": forget.detach()}

    return train(given, free, loss)
