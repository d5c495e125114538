"""Ask a model for log-likelihoods, note what its gates decide, and do not ask again what is known."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsg_cli.checkpoints import Checkpoint
from dsg_cli.guardrail import GuardrailModule, last_decisions
from dsg_cli.model import LoadedModel
from dsg_cli.progress import Report, silent
from dsg_cli.scoring import Request, Score, score
from dsg_cli.tokens import TokenBatch, special_ids
from dsg_cli.workers import ALONE, Workers

KEY_BYTES = 16
Known = Mapping[bytes, tuple[float, bool]]
"""Answers by `request_key`: log-likelihood, and whether the continuation is greedy."""


@dataclass(frozen=True)
class Decision:
    """What the gate made of one input."""

    n_tokens: int
    statistic: float
    gated: bool
    edit: float
    """Largest change of a token's residual, relative to its norm."""


@dataclass
class Scorer:
    """A model, guarded or not, that is asked in batches."""

    loaded: LoadedModel
    guardrails: Sequence[GuardrailModule]
    batch_size: int
    max_length: int
    what: str = "scoring"
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

    def __call__(self, requests: Sequence[Request]) -> tuple[list[Score], list[Decision | None]]:
        """The scores of requests and, under guardrails, what the gates decided."""
        keys = [request_key(request, self.max_length) for request in requests]
        unknown = [i for i, key in enumerate(keys) if key not in self.known]
        found = score(
            self.loaded.model,
            [requests[i] for i in unknown],
            pad=self.loaded.tokenizer.pad_token_id or 0,
            special=special_ids(self.loaded.tokenizer),
            batch_size=self.batch_size,
            max_length=self.max_length,
            device=str(self.loaded.model.device),
            note=self._note if self.guardrails else None,
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
        lengths = [len(request.inputs(self.max_length)) for request in requests]
        decisions = [
            None if one.note is None else Decision(length, *one.note)
            for length, one in zip(lengths, scores, strict=True)
        ]
        return scores, decisions

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
