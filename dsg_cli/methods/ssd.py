"""Selective synaptic dampening (Foster et al., 2308.07707): weights that matter to forget text are made smaller.

With F the diagonal of the Fisher information, the mean over sequences of the squared gradient of their loss: where
F_forget > a F_retain, w <- w min(l F_retain / F_forget, 1). No training: a backward pass a row of text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsg_cli.errors import DsgError
from dsg_cli.methods.given import Changed, Given
from dsg_cli.methods.losses import logits_of, mean_loss
from dsg_cli.methods.settings import Ssd
from dsg_cli.methods.text import Text


def unlearn(given: Given, settings: Ssd) -> Changed:
    """Dampen.

    Raises:
        DsgError: A gradient is not finite.
    """
    named = [(name, one.requires_grad_(True)) for name, one in given.model.named_parameters()]
    forget = importances(given, given.forget, settings.n_rows, "forget")
    retain = importances(given, given.retain, settings.n_rows, "retain")
    n_dampened = 0
    with torch.no_grad():
        for number, (_, one) in enumerate(named):
            factor = factors(forget[number], retain[number], settings.alpha, settings.dampening)
            n_dampened += int((factor < 1).sum())
            one.mul_(factor)
            one.requires_grad_(False)
    return Changed([name for name, _ in named], sum(one.numel() for _, one in named), n_dampened, losses=[])


def factors(forget: Tensor, retain: Tensor, alpha: float, dampening: float) -> Tensor:
    """What each weight is multiplied with: 1 where it matters no more than `alpha` times as much to forget text."""
    is_specific = forget > alpha * retain
    beta = (dampening * retain / forget.clamp(min=torch.finfo(forget.dtype).tiny)).clamp(max=1.0)
    return torch.where(is_specific, beta, 1.0)


def importances(given: Given, text: Text, n_rows: int, what: str) -> list[Tensor]:
    """Mean squared gradient of the loss of a row, for each parameter in the model's order."""
    parameters = list(given.model.parameters())
    sums = [torch.zeros_like(one) for one in parameters]
    index = text.draws(min(n_rows, len(text.rows)), given.seed)
    for done, i in enumerate(index):
        batch = text.batch([i])
        grads = torch.autograd.grad(
            mean_loss(logits_of(given.model, batch), batch), parameters, allow_unused=True, materialize_grads=True
        )
        for total, grad in zip(sums, grads, strict=True):
            total += grad.square()
        given.report(f"importances, {what}, rows", done + 1, len(index))
    if not all(bool(torch.isfinite(total).all()) for total in sums):
        raise DsgError(f"A gradient on {what} text is not finite.", "Check the weights.")
    return [total / len(index) for total in sums]
