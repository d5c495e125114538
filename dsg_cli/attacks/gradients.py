"""What an attacker who searches with gradients minimises: the loss of answers, and how strongly the gate is excited.

A gate opens or stays shut, which has no slope. The number behind it has one, and whoever lowers it far enough keeps the
gate shut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dsg_cli.attacks.training import AnswerBatch, answer_losses
from dsg_cli.guardrail import GuardrailModule
from dsg_cli.residuals import replace_residual


def soft_statistic(guard: GuardrailModule, resid_BLD: Tensor, counted_BL: Tensor) -> Tensor:
    """The gate's statistic of whole sequences, [B], as a function with a slope.

    That of a `window` gate is as it is; in the others activations stand in the place of hot or not.
    """
    strength_BLK = guard.slice(resid_BLD).acts.abs()
    signal_BL = strength_BLK @ (guard.detect if guard.gate.form == "window" else guard.clamp.chosen)
    before_BC = guard.gate.initial_state(len(signal_BL), signal_BL.device)
    statistic_BL: Tensor = guard.gate.scan(signal_BL, counted_BL, before_BC)[0]
    return statistic_BL.amax(-1)


def losses_and_statistics(
    model: PreTrainedModel, guards: Sequence[GuardrailModule], batch: AnswerBatch
) -> tuple[Tensor, Tensor]:
    """Of the unguarded model: the loss of each answer, [B], and the sum of the guards' soft statistics, [B]."""
    found: list[Tensor] = []

    def watching(guard: GuardrailModule) -> Callable[[Tensor], Tensor]:
        def watch(resid_BLD: Tensor) -> Tensor:
            guard.to(resid_BLD.device)
            found.append(soft_statistic(guard, resid_BLD, batch.tokens.counted_BL.to(resid_BLD.device)))
            return resid_BLD

        return watch

    with ExitStack() as hooks:
        for guard in guards:
            hooks.enter_context(replace_residual(model, guard.read, watching(guard)))
        losses_B = answer_losses(model, batch)
    statistics_B = torch.zeros_like(losses_B)
    for one in found:
        statistics_B = statistics_B + one.to(losses_B.device)
    return losses_B, statistics_B


def against_the_gate(
    model: PreTrainedModel, guards: Sequence[GuardrailModule], gate_weight: float
) -> Callable[[AnswerBatch], Tensor]:
    """The mean loss of answers without the guard, and the mean statistic relative to that of the first batch; with no
    guards, the loss alone."""
    begun: list[Tensor] = []

    def objective(batch: AnswerBatch) -> Tensor:
        losses_B, statistics_B = losses_and_statistics(model, guards, batch)
        if not begun:
            begun.append(statistics_B.detach().mean().clamp(min=1e-6))
        return losses_B.mean() + gate_weight * statistics_B.mean() / begun[0]

    return objective
