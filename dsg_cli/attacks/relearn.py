"""Relearning: fine-tune the guarded model on a few forgotten facts and ask for the others.

What comes back was hidden, not gone. The guard stays on while the attacker trains and when the model is asked;
beside it, the same attack on the unguarded model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsg_cli.artifacts import Json
from dsg_cli.attacks.asking import ask
from dsg_cli.benches.tasks import Question
from dsg_cli.checkpoints import Checkpoint
from dsg_cli.errors import DsgError
from dsg_cli.guardrail import GuardrailModule, guarded
from dsg_cli.model import devices_of
from dsg_cli.progress import Report, silent
from dsg_cli.scoring import Request, encode_pair
from dsg_cli.tokens import pad_rows, special_ids
from dsg_cli.workers import ALONE, Workers

THREAT_MODEL = "A customer of a fine-tuning API that keeps the guard on; all weights are trained."


def relearn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    guardrails: Sequence[GuardrailModule],
    *,
    attacker_knows: Sequence[Question],
    forget: Sequence[Question],
    utility: Sequence[Question],
    steps: Sequence[int],
    learning_rate: float,
    bos: int | None,
    batch_size: int,
    max_length: int,
    workers: Workers = ALONE,
    checkpoint: Checkpoint | None = None,
    report: Report = silent,
) -> list[Json]:
    """Train a copy of the model on the attacker's questions with their answers; measure as it goes.

    Args:
        model: The model, unguarded; it is not changed.
        tokenizer: Its tokenizer.
        guardrails: What guards it.
        attacker_knows: Forget questions that the attacker trains on.
        forget: Other forget questions, which are asked.
        utility: Questions that must stay answered; may be empty.
        steps: Optimiser steps at which to measure, ascending; 0 is before the attack.
        learning_rate: Of AdamW on all weights.
        bos: Token that every sequence begins with.
        batch_size: Sequences in a batch when asking.
        max_length: Tokens the model can read.
        workers: Who attacks: one side each, for training cannot be shared; all get the whole curve.
        checkpoint: What has been asked so far. A run that goes on trains again, and asks only what is missing.
        report: Progress.

    Returns:
        `[{x: step, guarded: {forget_acc, gate_rate, utility_acc, loss}, unguarded: {...}}]`
    """
    if len(devices_of(model)) > 1:
        raise DsgError("A model that is spread over several devices cannot be fine-tuned here.", "Take a larger one.")
    sides: dict[str, Sequence[GuardrailModule]] = {"unguarded": (), "guarded": guardrails}
    pairs = [encode_pair(tokenizer, q.context, q.choices[q.answer], bos=bos) for q in attacker_knows]
    batch = _training_batch(tokenizer, pairs, max_length, str(next(model.parameters()).device))
    measured: dict[str, list[Json]] = {}
    for number, (side, guards) in enumerate(sides.items()):
        if not workers.owns(number):
            continue
        attacked = copy.deepcopy(model).float().requires_grad_(True)
        optimizer = torch.optim.AdamW(attacked.parameters(), lr=learning_rate)
        options: dict[str, Any] = {"guardrails": guards, "bos": bos, "batch_size": batch_size, "max_length": max_length}
        options |= {"checkpoint": checkpoint, "report": report}
        loss, n_done = float("nan"), 0
        measured[side] = []
        for step in steps:
            while n_done < step:
                with guarded(attacked, guards, allow_mismatch=True):
                    loss = _step(attacked, optimizer, *batch)
                n_done += 1
                report(f"relearning, {side}", n_done, max(steps))
            names = {role: f"{side}/{step}/{role}" for role in ("forget", "utility")}
            of_forget = ask(attacked, tokenizer, forget, name=names["forget"], **options)
            point: Json = {"forget_acc": of_forget.pop("acc"), **of_forget}
            if utility:
                kept = ask(attacked, tokenizer, utility, name=names["utility"], **options)
                point["utility_acc"] = kept["acc"]
            measured[side].append(point | ({"loss": loss} if n_done else {}))
    of_all = {side: points for several in workers.gathered(measured) for side, points in several.items()}
    return [{"x": step, **{side: of_all[side][i] for side in sides}} for i, step in enumerate(steps)]


def _training_batch(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Request], max_length: int, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Questions with their right answers in one right-padded batch: ids [B, L], mask [B, L]."""
    rows = [list(pair.context + pair.continuation)[-max_length:] for pair in pairs]
    batch = pad_rows(rows, tokenizer.pad_token_id or 0, special_ids(tokenizer), device)
    return batch.ids_BL, batch.mask_BL


def _step(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, ids_BL: torch.Tensor, mask_BL: torch.Tensor
) -> float:
    logits_BLV = model(input_ids=ids_BL, attention_mask=mask_BL.long(), use_cache=False).logits[:, :-1]
    target_BL = ids_BL[:, 1:].masked_fill(~mask_BL[:, 1:], -100)
    loss = F.cross_entropy(logits_BLV.flatten(0, 1).float(), target_BL.flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()
