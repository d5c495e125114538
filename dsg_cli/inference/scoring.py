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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dsg_cli.data.batches import TokenBatch, pad_rows
from dsg_cli.data.tokens import Request, special_ids
from dsg_cli.errors import DsgError
from dsg_cli.guardrail.guarded import guarded, last_decisions
from dsg_cli.guardrail.runtime.guardrail import GuardrailModule
from dsg_cli.inference.wrappers import Wrapped, WrapperModule, has_filter, wrap
from dsg_cli.intervals import wilson
from dsg_cli.job import ALONE, Report, Workers, silent
from dsg_cli.models.language_model import LoadedModel, devices_of
from dsg_cli.models.residuals import OomSplitter
from dsg_cli.workspace.checkpoints import Checkpoint, State
from dsg_cli.workspace.files import at_safe_points
from dsg_cli.workspace.results import Json

Note = Callable[[TokenBatch], Sequence[Any]]
"""Called after each forward pass: a JSON value for each of its rows."""

Measure = Callable[[Tensor, Tensor], Any]
"""Log-probabilities [C, V] and target ids [C] of a continuation -> a JSON value."""


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
    split_on_oom = OomSplitter()
    n_tokens, total = sum(map(len, inputs[: n_batches * batch_size])), sum(map(len, inputs))

    def state() -> State:
        return {"requests": digest, "n_batches": n_batches, "scores": [[i, *one] for i, one in found.items()]}

    with at_safe_points():
        for start in range(n_batches * batch_size, len(inputs), batch_size):
            rows = inputs[start : start + batch_size]
            if workers.owns(start // batch_size):
                asked = [[(i, requests[i].continuation) for i in by_input[row]] for row in rows]
                batch = pad_rows([list(row) for row in rows], pad, special, device)
                found |= _scored(model, batch, asked, split_on_oom, note, measure)
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
    split_on_oom: OomSplitter,
    note: Note | None,
    measure: Measure | None,
) -> dict[int, list[Any]]:
    """The requests of one batch: number -> log-likelihood, whether it is greedy, and the note on its row.

    Args:
        model: A causal language model.
        whole: The batch.
        asked: Of each row, numbers and continuations of the requests that share it.
        split_on_oom: Halves what does not fit.
        note: What to note of each row.
        measure: What to measure of each continuation's tokens.
    """
    lengths = whole.mask_BL.sum(-1).tolist()
    n_tail = [max(len(continuation) for _, continuation in several) for several in asked]
    positions_P = _positions(lengths, n_tail)

    def forward(batch: TokenBatch) -> Tensor:
        return _logits(model, batch, positions_P[positions_P < batch.ids_BL.shape[1]])

    found: dict[int, list[Any]] = {}
    for batch, logits_BPV in split_on_oom(whole, forward):
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
    """Log-likelihood of a continuation, or of its end where its beginning was cut off, and whether it is greedy."""
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


KEY_BYTES = 16

Known = Mapping[bytes, tuple[float, bool]]
"""Answers by `request_key`: log-likelihood, and whether the continuation is greedy."""


@dataclass(frozen=True)
class Decision:
    """What gates and filters made of one input."""

    n_tokens: int
    statistic: float
    """Of the gate nearest to firing; without any, of the filter nearest to refusing."""
    gated: bool
    """A gate fired, or a filter refused."""
    edit: float
    """Largest change of a token's residual, relative to its norm."""


@dataclass
class Scorer:
    """A model, guarded and wrapped or not, that is asked in batches."""

    loaded: LoadedModel
    guardrails: Sequence[GuardrailModule]
    batch_size: int
    max_length: int
    what: str = "scoring"
    wrappers: Sequence[WrapperModule] = ()
    bos: int | None = None
    """Token that the refusal of a wrapper begins with."""
    known: Known = field(default_factory=dict)
    workers: Workers = ALONE
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    report: Report = silent
    n_tokens: int = 0
    n_calls: int = 0
    n_known: int = 0
    """Requests that were answered without the model."""
    answers: dict[bytes, tuple[float, bool]] = field(default_factory=dict)
    """Of everything that was asked."""

    def __call__(
        self, requests: Sequence[Request], measure: Measure | None = None
    ) -> tuple[list[Score], list[Decision | None]]:
        """The scores of requests and, under guardrails or behind filters, what those decided.

        With something to measure, every request is asked: what is known holds log-likelihoods only.

        The guardrails are put on here: filters read the model without them, and the caller has checked that it is the
        model that they were made for.
        """
        wrapped = self._wrapped(requests)
        requests = [one.request for one in wrapped]
        keys = [request_key(request, self.max_length) for request in requests]
        unknown = [i for i, key in enumerate(keys) if measure is not None or key not in self.known]
        with guarded(self.loaded.model, self.guardrails, allow_mismatch=True):
            found = score(
                self.loaded.model,
                [requests[i] for i in unknown],
                pad=self.loaded.tokenizer.pad_token_id or 0,
                special=special_ids(self.loaded.tokenizer),
                batch_size=self.batch_size,
                max_length=self.max_length,
                device=str(self.loaded.model.device),
                note=self._note if self.guardrails else None,
                measure=measure,
                what=self.what,
                workers=self.workers,
                checkpoint=self.checkpoint,
                name=f"{self.what}/{self.n_calls}",
                report=self.report,
            )
        self.n_calls += 1
        self.n_tokens += sum(map(len, {requests[i].inputs(self.max_length) for i in unknown}))
        self.n_known += len(requests) - len(unknown)
        asked = dict(zip(unknown, found, strict=True))
        scores = [asked[i] if i in asked else Score(*self.known[key]) for i, key in enumerate(keys)]
        self.answers |= {key: (one.loglikelihood, one.is_greedy) for key, one in zip(keys, scores, strict=True)}
        return scores, [self._decision(*one) for one in zip(wrapped, scores, strict=True)]

    def _wrapped(self, requests: Sequence[Request]) -> list[Wrapped]:
        return wrap(
            self.wrappers,
            self.loaded.model,
            self.loaded.tokenizer,
            requests,
            batch_size=self.batch_size,
            bos=self.bos,
            workers=self.workers,
            report=self.report,
        )

    def _decision(self, wrapped: Wrapped, found: Score) -> Decision | None:
        n_tokens = len(wrapped.request.inputs(self.max_length))
        if found.note is not None:
            statistic, is_gated, edit = found.note
            return Decision(n_tokens, statistic, is_gated or wrapped.is_refused, edit)
        if not has_filter(self.wrappers):
            return None
        assert wrapped.statistic is not None
        return Decision(n_tokens, wrapped.statistic, wrapped.is_refused, 0.0)

    def _note(self, _batch: TokenBatch) -> list[tuple[float, bool, float]]:
        return last_decisions(self.guardrails)


def request_key(request: Request, max_length: int) -> bytes:
    """What the model reads and is asked for, as a digest."""
    inputs, continuation = request.inputs(max_length), request.continuation
    content = array("q", (len(inputs), *inputs, *continuation)).tobytes()
    return hashlib.sha256(content).digest()[:KEY_BYTES]


def answers_to_tensors(answers: Known) -> dict[str, Tensor]:
    """Answers as an artifact stores them."""
    keys = sorted(answers)
    return {
        "base_request": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).reshape(-1, KEY_BYTES)
        if keys
        else torch.zeros(0, KEY_BYTES, dtype=torch.uint8),
        "base_loglikelihood": torch.tensor([answers[key][0] for key in keys], dtype=torch.float64),
        "base_is_greedy": torch.tensor([answers[key][1] for key in keys], dtype=torch.bool),
    }


def answers_from_tensors(tensors: Mapping[str, Tensor]) -> dict[bytes, tuple[float, bool]]:
    """The inverse."""
    keys = [bytes(row) for row in tensors["base_request"].tolist()]
    values, greedy = tensors["base_loglikelihood"].tolist(), tensors["base_is_greedy"].tolist()
    return {key: (value, is_greedy) for key, value, is_greedy in zip(keys, values, greedy, strict=True)}


@dataclass(frozen=True)
class SideBySide:
    """An evaluation of two models on the same questions."""

    results: dict[str, Json]
    """bench -> side -> metrics"""
    gate: dict[str, Json]
    rows: list[Json]
    """One a question."""
    n_tokens: int
    answers: Known = field(default_factory=dict)
    """Of the base model, for a later evaluation."""
    n_known: int = 0
    """Requests of the base model that an earlier evaluation had answered."""
    found: dict[str, Any] = field(default_factory=dict)
    """lm-eval's own results of each side."""
    question_ids: dict[str, list[str]] = field(default_factory=dict)
    """Questions that the base model knows, of the benches that count only those."""
    asked: dict[str, str] = field(default_factory=dict)
    """Bench on free text -> digest of all that was asked."""
    scores: dict[str, Json] = field(default_factory=dict)
    """Such a bench -> scores of a model that never saw what is forgotten."""
    refused: dict[str, Json] = field(default_factory=dict)
    """Such a bench -> metrics that could not be computed, and why."""


def counts(k: int, n: int, metric: str = "acc") -> Json:
    """How many, and the Wilson interval of the share."""
    low, high = wilson(k, n)
    return {f"{metric}_count": k, f"{metric}_low": low, f"{metric}_high": high}


def gate_rate(rows: Sequence[Json]) -> Json:
    """Share of questions that were gated, their number, and how large a change that made.

    `edit` is the mean over gated questions of the largest change of a token's residual, relative to its norm.
    """
    edits = [row["edit"] for row in rows if row["gated"]]
    return {"rate": len(edits) / len(rows), "n": len(rows), "edit": sum(edits) / len(edits) if edits else 0.0}
