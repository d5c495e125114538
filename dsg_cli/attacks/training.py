"""Batches that an attacker trains on, and one step of training."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsg_cli.attacks.target import Material, Target
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
