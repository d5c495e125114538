"""Methods that train (or dampen) weights by a loss on what the model says: each a formula and one function.

Losses are per token unless a formula says otherwise. R(retain) is the negative log-likelihood of retain text, or the
divergence there from the model as it was (`retain_loss`). Shapes: B sequences, L positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dsg_cli.data.batches import TokenBatch
from dsg_cli.errors import DsgError
from dsg_cli.methods.text import TrainingRows
from dsg_cli.methods.training import (
    Batches,
    ReferenceWeights,
    TrainedWeights,
    TrainingInputs,
    divergence,
    mean_loss,
    next_token_logits,
    retain_term,
    sequence_losses,
    token_losses,
    train,
    trainable_parameters,
)
from dsg_cli.settings import Finetune, GradDiff, GradientAscent, Npo, Scrub, SimNpo, Ssd


def unlearn_gradient_ascent(inputs: TrainingInputs, settings: GradientAscent) -> TrainedWeights:
    """Gradient ascent (Jang et al., 2210.01504): L = -NLL(forget). Nothing holds the rest, nothing bounds the loss."""
    trainable = trainable_parameters(inputs.model, settings, seed=inputs.seed)

    def loss(batches: Batches) -> dict[str, Tensor]:
        forget = mean_loss(next_token_logits(inputs.model, batches.forget), batches.forget)
        return {"loss": -forget, "forget_nll": forget.detach()}

    return train(inputs, trainable, loss)


def unlearn_grad_diff(inputs: TrainingInputs, settings: GradDiff) -> TrainedWeights:
    """Gradient difference (Liu et al., 2203.12817): L = -w NLL(forget) + a R(retain)."""

    def forget_nll(batch: TokenBatch, _reference: ReferenceWeights) -> Tensor:
        return mean_loss(next_token_logits(inputs.model, batch), batch)

    return _train_beside_retain(inputs, settings, "forget_nll", forget_nll, sign=-1)


def unlearn_npo(inputs: TrainingInputs, settings: Npo) -> TrainedWeights:
    """Negative preference optimisation (Zhang et al., 2404.05868): forget text is what is never preferred.

    L = w (2 / b) mean log(1 + (p(x) / p_ref(x))^b) + a R(retain), with p(x) the probability of a whole forget sequence
    and p_ref that of the model as it was. As b goes to 0 it becomes gradient ascent; for b > 0 L >= 0.
    """
    reference_nll: dict[int, Tensor] = {}
    """Of each forget row, computed when it is first drawn."""

    def forget_term(batch: TokenBatch, reference: ReferenceWeights) -> Tensor:
        nll_B = sequence_losses(next_token_logits(inputs.model, batch), batch)
        for i in batch.index:
            if i not in reference_nll:  # Alone, so that its bits do not depend on its neighbours, nor on a resume.
                row = inputs.forget.batch([i])
                with reference():
                    reference_nll[i] = sequence_losses(next_token_logits(inputs.model, row), row)[0]
        return npo_loss(nll_B, torch.stack([reference_nll[i] for i in batch.index]), settings.beta)

    return _train_beside_retain(inputs, settings, "npo", forget_term)


def npo_loss(nll_B: Tensor, reference_nll_B: Tensor, beta: float) -> Tensor:
    """(2 / b) mean log(1 + (p / p_ref)^b), from negative log-likelihoods of sequences, []."""
    return 2 / beta * F.softplus(beta * (reference_nll_B - nll_B)).mean()


def unlearn_simnpo(inputs: TrainingInputs, settings: SimNpo) -> TrainedWeights:
    """SimNPO (Fan et al., 2410.07163): NPO without a reference model, by the likelihood per token.

    L = -w (2 / b) mean log sigmoid(b NLL(x) / |x| - g) + a R(retain).
    """

    def forget_term(batch: TokenBatch, _reference: ReferenceWeights) -> Tensor:
        nll_B = sequence_losses(next_token_logits(inputs.model, batch), batch)
        return simnpo_loss(nll_B, batch.mask_BL[:, 1:].sum(-1), settings.beta, settings.gamma)

    return _train_beside_retain(inputs, settings, "simnpo", forget_term)


def simnpo_loss(nll_B: Tensor, n_tokens_B: Tensor, beta: float, gamma: float) -> Tensor:
    """-(2 / b) mean log sigmoid(b NLL / |x| - g), []."""
    return -2 / beta * F.logsigmoid(beta * nll_B / n_tokens_B - gamma).mean()


def _train_beside_retain(
    inputs: TrainingInputs,
    settings: GradDiff | Npo | SimNpo,
    name: str,
    forget_term: Callable[[TokenBatch, ReferenceWeights], Tensor],
    *,
    sign: int = 1,
) -> TrainedWeights:
    """Train by L = sign w T(forget) + a R(retain), with T the term that is called `name` among the losses."""
    trainable = trainable_parameters(inputs.model, settings, seed=inputs.seed)
    reference = ReferenceWeights(trainable.parameters)

    def loss(batches: Batches) -> dict[str, Tensor]:
        forget = forget_term(batches.forget, reference)
        retain = retain_term(inputs.model, reference, batches.retain, settings.retain_loss)
        total = sign * settings.forget_weight * forget + settings.retain_weight * retain
        return {"loss": total, name: forget.detach(), "retain": retain.detach()}

    return train(inputs, trainable, loss)


def unlearn_scrub(inputs: TrainingInputs, settings: Scrub) -> TrainedWeights:
    """SCRUB (Kurmanji et al., 2302.09880): a student leaves its teacher on forget text, follows it on retain text.

    The teacher is the model as it was. Max steps raise KL(teacher || student) on forget text; min steps lower
    a KL(teacher || student) + g NLL on retain text. They take turns; the last steps are all min steps, which repair.
    """
    trainable = trainable_parameters(inputs.model, settings, seed=inputs.seed)
    teacher = ReferenceWeights(trainable.parameters)

    def divergence_from_teacher(batch: TokenBatch, logits_BLV: Tensor) -> Tensor:
        with teacher():
            teacher_BLV = next_token_logits(inputs.model, batch)
        return divergence(teacher_BLV, logits_BLV, batch, temperature=settings.temperature)

    def loss(batches: Batches) -> dict[str, Tensor]:
        if is_max_step(batches.step, settings):
            forget_kl = divergence_from_teacher(batches.forget, next_token_logits(inputs.model, batches.forget))
            return {"loss": -forget_kl, "forget_kl": forget_kl.detach()}
        logits_BLV = next_token_logits(inputs.model, batches.retain)
        retain_kl = divergence_from_teacher(batches.retain, logits_BLV)
        retain_nll = mean_loss(logits_BLV, batches.retain)
        total = settings.kl_weight * retain_kl + settings.nll_weight * retain_nll
        return {"loss": total, "retain_kl": retain_kl.detach(), "retain_nll": retain_nll.detach()}

    return train(inputs, trainable, loss)


def is_max_step(step: int, settings: Scrub) -> bool:
    """Whether a step, counted from 0, is one on forget text."""
    last = 2 * settings.steps // 3 if settings.last_max_step is None else settings.last_max_step
    return step < last and step % (settings.max_steps + settings.min_steps) < settings.max_steps


def unlearn_finetune(inputs: TrainingInputs, settings: Finetune) -> TrainedWeights:
    """Plain training on `inputs.forget`: L = NLL(text) of the tokens that count. No way to unlearn.

    With it a benchmark's *target* is made of a base model (forget and retain text), and the *reference* that never read
    what is to be forgotten (retain text alone). It is called like every method's function; `inputs.retain` is not read.
    """
    trainable = trainable_parameters(inputs.model, settings, seed=inputs.seed)
    first = torch.tensor(inputs.forget.first or [0] * len(inputs.forget.rows), device=inputs.device)

    def loss(batches: Batches) -> dict[str, Tensor]:
        batch = batches.forget
        position_L = torch.arange(1, batch.ids_BL.shape[1], device=inputs.device)
        counts_BL = batch.mask_BL[:, 1:] & (position_L >= first[list(batch.index), None])
        losses_BL = token_losses(next_token_logits(inputs.model, batch), batch)
        return {"loss": (losses_BL * counts_BL).sum() / counts_BL.sum()}

    return train(inputs, trainable, loss, n_steps=n_steps(settings, len(inputs.forget.rows)))


def n_steps(settings: Finetune, n_rows: int) -> int:
    """Steps of the optimiser: as many as are set, or else as the epochs need; the last may go beyond them."""
    rows_per_step = settings.batch_size * settings.accumulation
    return settings.steps or max(1, math.ceil(settings.epochs * n_rows / rows_per_step))


def unlearn_ssd(inputs: TrainingInputs, settings: Ssd) -> TrainedWeights:
    """Selective synaptic dampening (Foster et al., 2308.07707): weights that matter to forget text are made smaller.

    With F the diagonal of the Fisher information, the mean over sequences of the squared gradient of their loss: where
    F_forget > a F_retain, w <- w min(l F_retain / F_forget, 1). No training: a backward pass a row of text.
    """
    named = [(name, parameter.requires_grad_(True)) for name, parameter in inputs.model.named_parameters()]
    forget = fisher_diagonal(inputs, inputs.forget, settings.n_rows, "forget")
    retain = fisher_diagonal(inputs, inputs.retain, settings.n_rows, "retain")
    n_dampened = 0
    with torch.no_grad():
        for number, (_, parameter) in enumerate(named):
            factor = dampening_factors(forget[number], retain[number], settings.alpha, settings.dampening)
            n_dampened += int((factor < 1).sum())
            parameter.mul_(factor)
            parameter.requires_grad_(False)
    n_parameters = sum(parameter.numel() for _, parameter in named)
    return TrainedWeights([name for name, _ in named], n_parameters, n_dampened, losses=[])


def dampening_factors(forget: Tensor, retain: Tensor, alpha: float, dampening: float) -> Tensor:
    """What each weight is multiplied with: 1 where it matters no more than `alpha` times as much to forget text."""
    is_specific = forget > alpha * retain
    beta = (dampening * retain / forget.clamp(min=torch.finfo(forget.dtype).tiny)).clamp(max=1.0)
    return torch.where(is_specific, beta, 1.0)


def fisher_diagonal(inputs: TrainingInputs, text: TrainingRows, n_rows: int, role: str) -> list[Tensor]:
    """Mean squared gradient of the loss of a row, for each parameter in the model's order."""
    parameters = list(inputs.model.parameters())
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    index = text.draws(min(n_rows, len(text.rows)), inputs.seed)
    for done, i in enumerate(index):
        batch = text.batch([i])
        loss = mean_loss(next_token_logits(inputs.model, batch), batch)
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        for total, grad in zip(sums, grads, strict=True):
            total += grad.square()
        inputs.job.progress(f"importances, {role}, rows", done + 1, len(index))
    if not all(bool(torch.isfinite(total).all()) for total in sums):
        raise DsgError(f"A gradient on {role} text is not finite.", "Check the weights.")
    return [total / len(index) for total in sums]
