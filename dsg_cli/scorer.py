"""Ask a model for log-likelihoods, note what gates and filters decide, and do not ask again what is known."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsg_cli.checkpoints import Checkpoint
from dsg_cli.guardrail import GuardrailModule, guarded, last_decisions
from dsg_cli.model import LoadedModel
from dsg_cli.progress import Report, silent
from dsg_cli.scoring import Measure, Request, Score, score
from dsg_cli.tokens import TokenBatch, special_ids
from dsg_cli.workers import ALONE, Workers
from dsg_cli.wrapper import Wrapped, WrapperModule, has_filter, wrap

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
