"""SimNPO (Fan et al., 2410.07163): NPO without a reference model, by the likelihood per token.

L = -w (2 / b) mean log sigmoid(b NLL(x) / |x| - g) + a R(retain).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dsg_cli.methods.freedom import freed
from dsg_cli.methods.given import Changed, Given
from dsg_cli.methods.losses import logits_of, retain_term, sequence_losses
from dsg_cli.methods.reference import Reference
from dsg_cli.methods.settings import SimNpo
from dsg_cli.methods.training import Batches, train


def unlearn(given: Given, settings: SimNpo) -> Changed:
    """Train."""
    free = freed(given.model, settings, seed=given.seed)
    reference = Reference(free.parameters)

    def loss(batches: Batches) -> dict[str, Tensor]:
        nll_B = sequence_losses(logits_of(given.model, batches.forget), batches.forget)
        forget = simnpo_loss(nll_B, batches.forget.mask_BL[:, 1:].sum(-1), settings.beta, settings.gamma)
        retain = retain_term(given.model, reference, batches.retain, settings.retain_loss)
        total = settings.forget_weight * forget + settings.retain_weight * retain
        return {"loss": total, "simnpo": forget.detach(), "retain": retain.detach()}

    return train(given, free, loss)


def simnpo_loss(nll_B: Tensor, n_tokens_B: Tensor, beta: float, gamma: float) -> Tensor:
    """-(2 / b) mean log sigmoid(b NLL / |x| - g), []."""
    return -2 / beta * F.logsigmoid(beta * nll_B / n_tokens_B - gamma).mean()
