"""Batches that an attacker trains on, and one step of training."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsg_cli.attacks.asking import Change
from dsg_cli.attacks.target import Material, Target
from dsg_cli.benches.tasks import Question
from dsg_cli.errors import DsgError
from dsg_cli.scoring import encode_pair
from dsg_cli.tokens import TokenBatch, pad_rows, special_ids, with_bos

UNRELATED_TOKENS = 128
"""Of each benign text, at most."""


def training_batch(target: Target, material: Material) -> TokenBatch:
    """The attacker's questions with their right answers in one right-padded batch."""
    pairs = [encode_pair(target.tokenizer, q.context, q.choices[q.answer], bos=target.bos) for q in material.known]
    return _padded(target, [list(pair.context + pair.continuation)[-target.max_length :] for pair in pairs])


def unrelated_batch(target: Target, material: Material) -> TokenBatch:
    """As many benign texts as the attacker knows questions, drawn with the seed.

    Raises:
        DsgError: There is none.
    """
    length = min(UNRELATED_TOKENS, target.max_length - 1)
    texts = [text[:length] for text in material.benign if len(text) > 1]
    if not texts:
        raise DsgError("There is no benign text to train on.", "Take `unrelated` out of attack.relearn_data.")
    drawn = random.Random(target.seed).sample(texts, min(len(texts), len(material.known)))
    return _padded(target, [with_bos(text, target.bos) for text in drawn])


def _padded(target: Target, rows: Sequence[list[int]]) -> TokenBatch:
    return pad_rows(rows, target.tokenizer.pad_token_id or 0, special_ids(target.tokenizer), target.device)


@dataclass(frozen=True)
class AnswerBatch:
    """Questions with their right answers."""

    tokens: TokenBatch
    answer_BL: Tensor
    """True for tokens of the answer."""


def answer_batch(target: Target, questions: Sequence[Question], change: Change) -> AnswerBatch:
    """Questions whose contexts are changed as they will be when they are asked, with their right answers."""
    rows, starts = [], []
    for number, question in enumerate(questions):
        pair = encode_pair(target.tokenizer, question.context, question.choices[question.answer], bos=target.bos)
        context = change(pair.context, number)
        rows.append([*context, *pair.continuation])
        starts.append(len(context))
    tokens = _padded(target, rows)
    position_L = torch.arange(tokens.ids_BL.shape[1], device=target.device)
    return AnswerBatch(tokens, tokens.mask_BL & (position_L >= torch.tensor(starts, device=target.device)[:, None]))


def answer_losses(model: PreTrainedModel, batch: AnswerBatch) -> Tensor:
    """Negative log-likelihood of each answer, [B]."""
    tokens = batch.tokens
    logits_BLV = model(input_ids=tokens.ids_BL, attention_mask=tokens.mask_BL.long(), use_cache=False).logits[:, :-1]
    wanted_BL = tokens.ids_BL[:, 1:].masked_fill(~batch.answer_BL[:, 1:], -100)
    return F.cross_entropy(logits_BLV.float().transpose(1, 2), wanted_BL, reduction="none").sum(-1)


def next_token_loss(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """Mean cross-entropy of every token but the first of each row."""
    logits_BLV = model(input_ids=batch.ids_BL, attention_mask=batch.mask_BL.long(), use_cache=False).logits[:, :-1]
    target_BL = batch.ids_BL[:, 1:].masked_fill(~batch.mask_BL[:, 1:], -100)
    return F.cross_entropy(logits_BLV.flatten(0, 1).float(), target_BL.flatten())


def training_step(
    model: PreTrainedModel, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, batch: TokenBatch
) -> float:
    """One step of next-token prediction on a batch; its loss before the step."""
    loss = next_token_loss(model, batch)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return loss.item()
