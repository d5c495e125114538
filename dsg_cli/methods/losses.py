"""Terms that several losses are made of. Shapes: B sequences, L positions, V vocabulary.

The likelihood of a sequence is that of its tokens after the first, whatever the first is (BOS, mostly).
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dsg_cli.data.batches import TokenBatch
from dsg_cli.errors import DsgError
from dsg_cli.methods.text import Text
from dsg_cli.methods.training import (
    Batches,
    Changed,
    Given,
    Reference,
    divergence,
    freed,
    logits_of,
    mean_loss,
    retain_term,
    sequence_losses,
    token_losses,
    train,
)
from dsg_cli.settings import Finetune, GradDiff, GradientAscent, Npo, Scrub, SimNpo, Ssd


def unlearn_gradient_ascent(given: Given, settings: GradientAscent) -> Changed:
    """Train."""
    free = freed(given.model, settings, seed=given.seed)

    def loss(batches: Batches) -> dict[str, Tensor]:
        forget = mean_loss(logits_of(given.model, batches.forget), batches.forget)
        return {"loss": -forget, "forget_nll": forget.detach()}

    return train(given, free, loss)


def unlearn_grad_diff(given: Given, settings: GradDiff) -> Changed:
    """Train."""
    free = freed(given.model, settings, seed=given.seed)
    reference = Reference(free.parameters)

    def loss(batches: Batches) -> dict[str, Tensor]:
        forget = mean_loss(logits_of(given.model, batches.forget), batches.forget)
        retain = retain_term(given.model, reference, batches.retain, settings.retain_loss)
        total = -settings.forget_weight * forget + settings.retain_weight * retain
        return {"loss": total, "forget_nll": forget.detach(), "retain": retain.detach()}

    return train(given, free, loss)


def unlearn_npo(given: Given, settings: Npo) -> Changed:
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


def unlearn_simnpo(given: Given, settings: SimNpo) -> Changed:
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


def unlearn_scrub(given: Given, settings: Scrub) -> Changed:
    """Train."""
    free = freed(given.model, settings, seed=given.seed)
    teacher = Reference(free.parameters)

    def apart(batch: TokenBatch, logits_BLV: Tensor) -> Tensor:
        with teacher():
            teacher_BLV = logits_of(given.model, batch)
        return divergence(teacher_BLV, logits_BLV, batch, temperature=settings.temperature)

    def loss(batches: Batches) -> dict[str, Tensor]:
        if is_max_step(batches.step, settings):
            left = apart(batches.forget, logits_of(given.model, batches.forget))
            return {"loss": -left, "forget_kl": left.detach()}
        logits_BLV = logits_of(given.model, batches.retain)
        kept, nll = apart(batches.retain, logits_BLV), mean_loss(logits_BLV, batches.retain)
        total = settings.kl_weight * kept + settings.nll_weight * nll
        return {"loss": total, "retain_kl": kept.detach(), "retain_nll": nll.detach()}

    return train(given, free, loss)


def is_max_step(step: int, settings: Scrub) -> bool:
    """Whether a step, counted from 0, is one on forget text."""
    last = 2 * settings.steps // 3 if settings.last_max_step is None else settings.last_max_step
    return step < last and step % (settings.max_steps + settings.min_steps) < settings.max_steps


def unlearn_finetune(given: Given, settings: Finetune) -> Changed:
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


def unlearn_ssd(given: Given, settings: Ssd) -> Changed:
    """Dampen."""
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
