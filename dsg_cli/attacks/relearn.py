"""Relearning: fine-tune the guarded model on a few forgotten facts and ask for the others.

What comes back was hidden, not gone. The guard stays on while the attacker trains and when the model is asked;
beside it, the same attack on the unguarded model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from dsg_cli.artifacts import Json
from dsg_cli.attacks.target import Material, Target, of_forget
from dsg_cli.benches.tasks import Question
from dsg_cli.errors import DsgError
from dsg_cli.guardrail import guarded
from dsg_cli.model import devices_of
from dsg_cli.scoring import encode_pair
from dsg_cli.tokens import TokenBatch, pad_rows, special_ids
from dsg_cli.workers import ALONE


def attack(target: Target, material: Material, *, steps: Sequence[int], learning_rate: float) -> list[Json]:
    """Train a copy of the model on the attacker's questions with their answers; measure as it goes.

    Workers take one side each, for training cannot be shared. A run that goes on trains again, and asks only what is
    missing.

    Args:
        target: What is attacked.
        material: The attacker trains on `known`; `forget` and, if there is any, `utility` are asked.
        steps: Optimiser steps at which to measure, ascending; 0 is before the attack.
        learning_rate: Of AdamW on all weights.

    Returns:
        Points whose sides also hold `utility_acc`, `gate_rate` and, after the first step, `loss`.
    """
    if len(devices_of(target.model)) > 1:
        raise DsgError("A model that is spread over several devices cannot be fine-tuned here.", "Take a larger one.")
    batch = training_batch(target, material)
    measured: dict[str, list[Json]] = {}
    for number, side in enumerate(("unguarded", "guarded")):
        if target.workers.owns(number):
            measured[side] = _one_side(target, material, batch, side, steps, learning_rate)
    of_all = {side: points for several in target.workers.gathered(measured) for side, points in several.items()}
    return [
        {"x": step, "variant": "", **{side: of_all[side][i] for side in ("guarded", "unguarded")}}
        for i, step in enumerate(steps)
    ]


def _one_side(
    target: Target, material: Material, batch: TokenBatch, side: str, steps: Sequence[int], learning_rate: float
) -> list[Json]:
    guards = target.guardrails if side == "guarded" else ()
    attacked = copy.deepcopy(target.model).float().requires_grad_(True)
    optimizer = torch.optim.AdamW(attacked.parameters(), lr=learning_rate)
    loss, n_done = float("nan"), 0
    points: list[Json] = []

    def ask(role: str, questions: Sequence[Question]) -> Json:
        name = f"{side}/{n_done}/{role}"
        return target.ask(questions, name=name, is_guarded=bool(guards), model=attacked, workers=ALONE)

    for step in steps:
        while n_done < step:
            with guarded(attacked, guards, allow_mismatch=True):
                loss = training_step(attacked, optimizer, batch)
            n_done += 1
            target.report(f"relearning, {side}", n_done, max(steps))
        point = of_forget(ask("forget", material.forget))
        if material.utility:
            point["utility_acc"] = ask("utility", material.utility)["acc"]
        points.append(point | ({"loss": loss} if n_done else {}))
    return points


def training_batch(target: Target, material: Material) -> TokenBatch:
    """The attacker's questions with their right answers in one right-padded batch."""
    pairs = [encode_pair(target.tokenizer, q.context, q.choices[q.answer], bos=target.bos) for q in material.known]
    rows = [list(pair.context + pair.continuation)[-target.max_length :] for pair in pairs]
    return pad_rows(rows, target.tokenizer.pad_token_id or 0, special_ids(target.tokenizer), target.device)


def training_step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, batch: TokenBatch) -> float:
    """One step of next-token prediction on a batch; its loss before the step."""
    logits_BLV = model(input_ids=batch.ids_BL, attention_mask=batch.mask_BL.long(), use_cache=False).logits[:, :-1]
    target_BL = batch.ids_BL[:, 1:].masked_fill(~batch.mask_BL[:, 1:], -100)
    loss = F.cross_entropy(logits_BLV.flatten(0, 1).float(), target_BL.flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()
