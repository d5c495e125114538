"""Log-likelihoods of continuations, as lm-eval asks for them, in batches whose true lengths are known.

lm-eval pads on the right with id 0 and sends no mask; a gate that averages over a sequence would then move with the
batch. Here every batch carries its mask, and requests that share their input (four one-token choices of one
question) share one forward pass.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dsg_cli.errors import DsgError
from dsg_cli.fitting import Fitting
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
    fit = Fitting()
    n_batches, n_tokens, total = 0, 0, sum(map(len, inputs))
    for start in range(0, len(inputs), batch_size):
        rows = inputs[start : start + batch_size]
        n_tail = [max(len(requests[i].continuation) for i in by_input[row]) for row in rows]
        positions_P = _positions([len(row) for row in rows], n_tail)

        def forward(batch: TokenBatch, positions_P: Tensor = positions_P) -> Tensor:
            return _logits(model, batch, positions_P[positions_P < batch.ids_BL.shape[1]])

        for batch, logits_BPV in fit(pad_rows([list(row) for row in rows], pad, special, device), forward):
            if after_batch is not None:
                after_batch(batch)
            for row_index, i_row in enumerate(batch.index):
                row = rows[i_row]
                first = int(torch.searchsorted(positions_P, max(0, len(row) - n_tail[i_row])))
                tail_CV = logits_BPV[row_index, first : first + min(n_tail[i_row], len(row))].float().log_softmax(-1)
                for i in by_input[row]:
                    scores[i] = Score(*_one(tail_CV, requests[i].continuation), n_batches, row_index)
            n_batches += 1
            n_tokens += int(batch.mask_BL.sum())
            report(f"{what}, tokens", n_tokens, total)
    return [scores[i] for i in range(len(requests))]


def _positions(lengths: Sequence[int], n_tail: Sequence[int]) -> Tensor:
    """Every position of a batch at which some row predicts a token of a continuation, ascending."""
    needed = {p for length, n in zip(lengths, n_tail, strict=True) for p in range(max(0, length - n), length)}
    return torch.tensor(sorted(needed))


def _logits(model: nn.Module, batch: TokenBatch, positions_P: Tensor) -> Tensor:
    """Logits at those positions only: with a vocabulary of 256k they cost more than many layers."""
    options = {"input_ids": batch.ids_BL, "attention_mask": batch.mask_BL.long(), "use_cache": False}
    positions_P = positions_P.to(batch.ids_BL.device)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(**options, logits_to_keep=positions_P).logits
    return model(**options).logits[:, positions_P]


def _one(tail_CV: Tensor, continuation: tuple[int, ...]) -> tuple[float, bool]:
    """Log-likelihood of a continuation, or of its end where its beginning was cut off, and whether it is greedy.

    Raises:
        DsgError: The log-likelihood is not finite.
    """
    tail_CV = tail_CV[-len(continuation) :]
    target_C = torch.tensor(continuation, device=tail_CV.device)[-len(tail_CV) :]
    loglikelihood = float(tail_CV.gather(-1, target_C[:, None]).sum())
    if not math.isfinite(loglikelihood):
        raise DsgError(
            f"A log-likelihood is {loglikelihood}: the model is broken, not unlearned.",
            "Check the weights, lower --strength, or try --dtype float32.",
        )
    return loglikelihood, bool((tail_CV.argmax(-1) == target_C).all())
