"""Log-likelihoods of continuations, as lm-eval asks for them, in batches whose true lengths are known.

lm-eval pads on the right with id 0 and sends no mask; a gate that averages over a sequence would then move with the
batch. Here every batch carries its mask, and requests that share their input (four one-token choices of one
question) share one forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dsg_cli.errors import DsgError
from dsg_cli.progress import Report, silent
from dsg_cli.tokens import TokenBatch, pad_rows, with_bos


@dataclass(frozen=True)
class Request:
    """Score `continuation` after `context` (token ids; neither is empty)."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def inputs(self, max_length: int) -> tuple[int, ...]:
        """What the model reads: all but the last token, cut on the left to `max_length`."""
        return (self.context + self.continuation)[-(max_length + 1) :][:-1]


@dataclass(frozen=True)
class Score:
    """The answer to a request."""

    loglikelihood: float
    is_greedy: bool
    """Every token of the continuation is the model's first choice."""
    batch: int
    """Index of the batch it was computed in, and"""
    row: int
    """its row there: where an observer finds what it noted."""


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str, *, bos: int | None) -> Request:
    """A request from text, as lm-eval encodes it: both together, cut where the context alone ends; `bos` in front.

    Spaces at the end of the context move to the continuation. An empty context is a lone BOS (or EOS).

    Raises:
        DsgError: The context is empty and the tokenizer has neither BOS nor EOS.
    """
    n_spaces = len(context) - len(context.rstrip())
    if n_spaces:
        context, continuation = context[:-n_spaces], context[-n_spaces:] + continuation
    if not context:
        prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if prefix is None:
            raise DsgError("A question has no context, and the tokenizer has neither BOS nor EOS to start from.")
        return Request((prefix,), tuple(tokenizer(continuation, add_special_tokens=False)["input_ids"]))
    whole = with_bos(tokenizer(context + continuation)["input_ids"], bos)
    head = with_bos(tokenizer(context)["input_ids"], bos)
    return Request(tuple(head), tuple(whole[len(head) :]))


@torch.inference_mode()
def score(
    model: nn.Module,
    requests: Sequence[Request],
    *,
    pad: int,
    special: tuple[int, ...],
    batch_size: int,
    max_length: int,
    device: str = "cpu",
    after_batch: Callable[[TokenBatch], None] | None = None,
    what: str = "scoring",
    report: Report = silent,
) -> list[Score]:
    """Score requests in batches of similar lengths, longest first.

    Args:
        model: A causal language model, guarded or not.
        requests: What to score.
        pad: Id to pad with; masked, so any will do.
        special: Ids that are never counted.
        batch_size: Sequences in a batch.
        max_length: Tokens the model can read.
        device: Where the model is.
        after_batch: Called after each forward pass, in the order of `Score.batch`.
        what: Name of the work, for progress.
        report: Progress.

    Returns:
        One score a request, in their order.

    Raises:
        DsgError: A log-likelihood is not finite: a broken model must not pass for one that has unlearned.
    """
    by_input: dict[tuple[int, ...], list[int]] = {}
    for i, request in enumerate(requests):
        by_input.setdefault(request.inputs(max_length), []).append(i)
    inputs = sorted(by_input, key=lambda ids: (-len(ids), ids))
    scores: dict[int, Score] = {}
    for batch_index, start in enumerate(range(0, len(inputs), batch_size)):
        rows = inputs[start : start + batch_size]
        batch = pad_rows([list(row) for row in rows], pad, special, device)
        logits_BLV = model(input_ids=batch.ids_BL, attention_mask=batch.mask_BL.long(), use_cache=False).logits
        if after_batch is not None:
            after_batch(batch)
        for row_index, row in enumerate(rows):
            for i in by_input[row]:
                loglikelihood, is_greedy = _one(logits_BLV[row_index, : len(row)], requests[i].continuation)
                if not math.isfinite(loglikelihood):
                    raise DsgError(
                        f"A log-likelihood is {loglikelihood}: the model is broken, not unlearned.",
                        "Check the weights, lower --strength, or try --dtype float32.",
                    )
                scores[i] = Score(loglikelihood, is_greedy, batch_index, row_index)
        report(what, min(start + batch_size, len(inputs)), len(inputs))
    return [scores[i] for i in range(len(requests))]


def _one(logits_LV: Tensor, continuation: tuple[int, ...]) -> tuple[float, bool]:
    tail_CV = logits_LV[-len(continuation) :].float().log_softmax(-1)
    target_C = torch.tensor(continuation, device=logits_LV.device)[-len(tail_CV) :]
    chosen_C = tail_CV.gather(-1, target_C[:, None]).squeeze(-1)
    return float(chosen_C.sum()), bool((tail_CV.argmax(-1) == target_C).all())
