"""Negative preference optimisation (Zhang et al., 2404.05868): forget text is what is never preferred.

L = w (2 / b) mean log(1 + (p(x) / p_ref(x))^b) + a R(retain), with p(x) the probability of a whole forget sequence and
p_ref that of the model as it was. As b goes to 0 it becomes gradient ascent; for b > 0 it is bounded below by 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsg_cli.methods.freedom import freed
from dsg_cli.methods.given import Changed, Given
from dsg_cli.methods.losses import logits_of, retain_term, sequence_losses
from dsg_cli.methods.reference import Reference
from dsg_cli.methods.settings import Npo
from dsg_cli.methods.training import Batches, train


def unlearn(given: Given, settings: Npo) -> Changed:
    """Train. The reference's likelihood of each forget sequence is computed once, when it is first drawn."""
    free = freed(given.model, settings, seed=given.seed)
    reference = Reference(free.parameters)
    known: dict[int, Tensor] = {}

    def before(batches: Batches) -> Tensor:
        index = batches.forget.index
        for i in index:
            if i not in known:  # Alone, so that its bits do not depend on what was drawn beside it, nor on a resume.
                row = given.forget.batch([i])
                with reference():
                    known[i] = sequence_losses(logits_of(given.model, row), row)[0]
        return torch.stack([known[i] for i in index])

    def loss(batches: Batches) -> dict[str, Tensor]:
        nll_B = sequence_losses(logits_of(given.model, batches.forget), batches.forget)
        forget = npo_loss(nll_B, before(batches), settings.beta)
        retain = retain_term(given.model, reference, batches.retain, settings.retain_loss)
        total = settings.forget_weight * forget + settings.retain_weight * retain
        return {"loss": total, "npo": forget.detach(), "retain": retain.detach()}

    return train(given, free, loss)


def npo_loss(nll_B: Tensor, reference_nll_B: Tensor, beta: float) -> Tensor:
    """(2 / b) mean log(1 + (p / p_ref)^b), from negative log-likelihoods of sequences, []."""
    return 2 / beta * F.softplus(beta * (reference_nll_B - nll_B)).mean()
