"""Gradient difference (Liu et al., 2203.12817): ascent on forget text, descent on retain text.

L = -w NLL(forget) + a R(retain), with R the negative log-likelihood, or the divergence from the model as it was.
"""

from __future__ import annotations

from torch import Tensor

from dsg_cli.methods.freedom import freed
from dsg_cli.methods.given import Changed, Given
from dsg_cli.methods.losses import logits_of, mean_loss, retain_term
from dsg_cli.methods.reference import Reference
from dsg_cli.methods.settings import GradDiff
from dsg_cli.methods.training import Batches, train


def unlearn(given: Given, settings: GradDiff) -> Changed:
    """Train."""
    free = freed(given.model, settings, seed=given.seed)
    reference = Reference(free.parameters)

    def loss(batches: Batches) -> dict[str, Tensor]:
        forget = mean_loss(logits_of(given.model, batches.forget), batches.forget)
        retain = retain_term(given.model, reference, batches.retain, settings.retain_loss)
        total = -settings.forget_weight * forget + settings.retain_weight * retain
        return {"loss": total, "forget_nll": forget.detach(), "retain": retain.detach()}

    return train(given, free, loss)
