"""Terms that several losses are made of. Shapes: B sequences, L positions, V vocabulary.

The likelihood of a sequence is that of its tokens after the first, whatever the first is (BOS, mostly).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from dsg_cli.methods.reference import Reference
from dsg_cli.methods.settings import RetainLoss
from dsg_cli.tokens import TokenBatch


def logits_of(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """Logits that predict tokens 1 .. L-1, float32, [B, L-1, V]."""
    found = model(input_ids=batch.ids_BL, attention_mask=batch.mask_BL.long(), use_cache=False)
    logits_BLV: Tensor = found.logits[:, :-1].float()
    return logits_BLV


def token_losses(logits_BLV: Tensor, batch: TokenBatch) -> Tensor:
    """Negative log-likelihood of each token after the first, 0 at padding, [B, L-1]."""
    wanted_BL = batch.ids_BL[:, 1:].masked_fill(~batch.mask_BL[:, 1:], -100)
    return F.cross_entropy(logits_BLV.transpose(1, 2), wanted_BL, reduction="none")


def mean_loss(logits_BLV: Tensor, batch: TokenBatch) -> Tensor:
    """Negative log-likelihood per token, over all sequences together, []."""
    return token_losses(logits_BLV, batch).sum() / batch.mask_BL[:, 1:].sum()


def sequence_losses(logits_BLV: Tensor, batch: TokenBatch) -> Tensor:
    """Negative log-likelihood of each sequence, [B]."""
    return token_losses(logits_BLV, batch).sum(-1)


def divergence(teacher_BLV: Tensor, student_BLV: Tensor, batch: TokenBatch, *, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) per token, times the squared temperature as in distillation, []."""
    teacher, student = ((one / temperature).log_softmax(-1) for one in (teacher_BLV, student_BLV))
    kl_BL = (teacher.exp() * (teacher - student)).sum(-1)
    mask_BL = batch.mask_BL[:, 1:]
    return kl_BL[mask_BL].sum() / mask_BL.sum() * temperature**2


def retain_term(model: PreTrainedModel, reference: Reference, batch: TokenBatch, kind: RetainLoss) -> Tensor:
    """What keeps the rest of the model: `nll`, or `kl` from the model as it was, []."""
    if kind == "none":
        return torch.zeros((), device=batch.ids_BL.device)
    logits_BLV = logits_of(model, batch)
    if kind == "nll":
        return mean_loss(logits_BLV, batch)
    with reference():
        before_BLV = logits_of(model, batch)
    return divergence(before_BLV, logits_BLV, batch)
