"""Log-likelihoods of continuations, as lm-eval asks for them, in batches whose true lengths are known.

lm-eval pads on the right with id 0 and sends no mask; a gate that averages over a sequence would then move with the
batch. Here every batch carries its mask, and requests that share their input (four one-token choices of one
question) share one forward pass.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dsg_cli.checkpoints import Checkpoint, State
from dsg_cli.errors import DsgError
from dsg_cli.fitting import Fitting
from dsg_cli.interruption import at_safe_points
from dsg_cli.model import devices_of
from dsg_cli.progress import Report, silent
from dsg_cli.tokens import TokenBatch, pad_rows, with_bos
from dsg_cli.workers import ALONE, Workers

Note = Callable[[TokenBatch], Sequence[Any]]
"""Called after each forward pass: a JSON value for each of its rows."""
Measure = Callable[[Tensor, Tensor], Any]
"""Log-probabilities [C, V] and target ids [C] of a continuation -> a JSON value."""


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
    note: Any = None
    """What was noted of its row."""
    measured: Any = None
    """What was measured of its tokens."""


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
    note: Note | None = None,
    measure: Measure | None = None,
    what: str = "scoring",
    workers: Workers = ALONE,
    checkpoint: Checkpoint | None = None,
    name: str = "",
    report: Report = silent,
) -> list[Score]:
    """Score requests in batches of similar lengths, longest first, shared among workers.

    Args:
        model: A causal language model, guarded or not.
        requests: What to score.
        pad: Id to pad with; masked, so any will do.
        special: Ids that are never counted.
        batch_size: Sequences in a batch.
        max_length: Tokens the model can read.
        device: Where the model is.
        note: What to note of each row.
        measure: What to measure of each continuation's tokens.
        what: Name of the work, for progress.
        workers: Who computes; each gets the scores of all.
        checkpoint: Where the work goes on from, and is kept,
        name: under this name.
        report: Progress.

    Returns:
        One score a request, in their order.

    Raises:
        DsgError: A log-likelihood is not finite: a broken model must not pass for one that has unlearned.
    """
    checkpoint = checkpoint or Checkpoint()
    by_input: dict[tuple[int, ...], list[int]] = {}
    for i, request in enumerate(requests):
        by_input.setdefault(request.inputs(max_length), []).append(i)
    inputs = sorted(by_input, key=lambda ids: (-len(ids), ids))
    digest = requests_digest(requests)
    kept = checkpoint.entry(name) or {}
    if kept.get("requests") != digest:
        kept = {}
    n_batches = int(kept.get("n_batches", 0))
    found: dict[int, list[Any]] = {i: one for i, *one in kept.get("scores", [])}
    fit = Fitting()
    n_tokens, total = sum(map(len, inputs[: n_batches * batch_size])), sum(map(len, inputs))

    def state() -> State:
        return {"requests": digest, "n_batches": n_batches, "scores": [[i, *one] for i, one in found.items()]}

    with at_safe_points():
        for start in range(n_batches * batch_size, len(inputs), batch_size):
            rows = inputs[start : start + batch_size]
            if workers.owns(start // batch_size):
                asked = [[(i, requests[i].continuation) for i in by_input[row]] for row in rows]
                batch = pad_rows([list(row) for row in rows], pad, special, device)
                found |= _scored(model, batch, asked, fit, note, measure)
            n_batches = start // batch_size + 1
            n_tokens += sum(map(len, rows))
            report(f"{what}, tokens", n_tokens, total)
            checkpoint.reached(name, state)
    checkpoint.keep(name, state())
    for several in workers.gathered(list(found.items())) if workers.n > 1 else ():
        found |= dict(several)
    return [Score(*found[i]) for i in range(len(requests))]


def requests_digest(requests: Sequence[Request]) -> str:
    """Of everything that is asked, in its order."""
    digest = hashlib.sha256()
    for one in requests:
        digest.update(array("q", (len(one.context), len(one.continuation), *one.context, *one.continuation)).tobytes())
    return digest.hexdigest()


def _scored(
    model: nn.Module,
    whole: TokenBatch,
    asked: Sequence[Sequence[tuple[int, tuple[int, ...]]]],
    fit: Fitting,
    note: Note | None,
    measure: Measure | None,
) -> dict[int, list[Any]]:
    """The requests of one batch: number -> log-likelihood, whether it is greedy, and the note on its row.

    Args:
        model: A causal language model.
        whole: The batch.
        asked: Of each row, numbers and continuations of the requests that share it.
        fit: Halves what does not fit.
        note: What to note of each row.
        measure: What to measure of each continuation's tokens.
    """
    lengths = whole.mask_BL.sum(-1).tolist()
    n_tail = [max(len(continuation) for _, continuation in several) for several in asked]
    positions_P = _positions(lengths, n_tail)

    def forward(batch: TokenBatch) -> Tensor:
        return _logits(model, batch, positions_P[positions_P < batch.ids_BL.shape[1]])

    found: dict[int, list[Any]] = {}
    for batch, logits_BPV in fit(whole, forward):
        notes = note(batch) if note is not None else [None] * len(batch.index)
        for row_index, i_row in enumerate(batch.index):
            first = int(torch.searchsorted(positions_P, max(0, lengths[i_row] - n_tail[i_row])))
            n_kept = min(n_tail[i_row], lengths[i_row])
            tail_CV = logits_BPV[row_index, first : first + n_kept].float().log_softmax(-1)
            for i, continuation in asked[i_row]:
                found[i] = [*_one(tail_CV, continuation), notes[row_index], _measured(tail_CV, continuation, measure)]
    return found


def _positions(lengths: Sequence[int], n_tail: Sequence[int]) -> Tensor:
    """Every position of a batch at which some row predicts a token of a continuation, ascending."""
    needed = {p for length, n in zip(lengths, n_tail, strict=True) for p in range(max(0, length - n), length)}
    return torch.tensor(sorted(needed))


def _logits(model: nn.Module, batch: TokenBatch, positions_P: Tensor) -> Tensor:
    """Logits at those positions only: with a vocabulary of 256k they cost more than many layers."""
    options = {"input_ids": batch.ids_BL, "attention_mask": batch.mask_BL.long(), "use_cache": False}
    has_choice = "logits_to_keep" in inspect.signature(model.forward).parameters
    if has_choice and len(devices_of(model)) > 1:
        # Positions would lie on another device than the last layer; a number of last ones lies nowhere.
        first = int(positions_P.min())
        return model(**options, logits_to_keep=batch.ids_BL.shape[1] - first).logits[:, positions_P - first]
    positions_P = positions_P.to(batch.ids_BL.device)
    if has_choice:
        return model(**options, logits_to_keep=positions_P).logits
    return model(**options).logits[:, positions_P]


def _one(tail_CV: Tensor, continuation: tuple[int, ...]) -> tuple[float, bool]:
    """Log-likelihood of a continuation, or of its end where its beginning was cut off, and whether it is greedy.

    Raises:
        DsgError: The log-likelihood is not finite.
    """
    tail_CV, target_C = _aligned(tail_CV, continuation)
    loglikelihood = float(tail_CV.gather(-1, target_C[:, None]).sum())
    if not math.isfinite(loglikelihood):
        raise DsgError(
            f"A log-likelihood is {loglikelihood}: the model is broken, not unlearned.",
            "Check the weights, lower --strength, or try --dtype float32.",
        )
    return loglikelihood, bool((tail_CV.argmax(-1) == target_C).all())


def _measured(tail_CV: Tensor, continuation: tuple[int, ...], measure: Measure | None) -> Any:
    return measure(*_aligned(tail_CV, continuation)) if measure is not None else None


def _aligned(tail_CV: Tensor, continuation: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Log-probabilities at the tokens of a continuation, and the tokens."""
    tail_CV = tail_CV[-len(continuation) :]
    return tail_CV, torch.tensor(continuation, device=tail_CV.device)[-len(tail_CV) :]
