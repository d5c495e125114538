"""A model with its guardrails and wrappers, and the log-likelihoods that it gives continuations.

    model = GuardedModel(loaded.model, loaded.tokenizer, bos, guardrails, wrappers, batch_size)
    scores = model.loglikelihoods(requests, job)            # one Score a request, with what gates and filters decided
    base = model.bare()                                     # the same model without them
    completions = generate(model, prompts, job)             # generation.py
    answers = grade(model, questions, job)                  # evals/questions.py

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
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsg_cli.data.batches import TokenBatch, pad_rows
from dsg_cli.data.tokens import Request, encode, special_ids
from dsg_cli.errors import DsgError
from dsg_cli.guardrail.guarded import guarded, last_decisions
from dsg_cli.guardrail.runtime.guardrail import GuardrailModule
from dsg_cli.inference.wrappers import LARGEST, WrapperModule, has_filter, in_front, n_matches, prefix_ids, read_by
from dsg_cli.job import PLAIN_JOB, Job
from dsg_cli.models.language_model import context_length, devices_of
from dsg_cli.models.residuals import OomSplitter, mean_residuals
from dsg_cli.workspace.body import Json
from dsg_cli.workspace.checkpoints import State
from dsg_cli.workspace.files import at_safe_points

Measure = Callable[[Tensor, Tensor], Any]
"""Log-probabilities [C, V] and target ids [C] of a continuation -> a JSON value."""

Answer = tuple[float, bool]
"""Log-likelihood of a continuation, and whether it is greedy."""


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

    def row(self) -> Json:
        return {"length": self.n_tokens, "statistic": self.statistic, "gated": self.gated, "edit": self.edit}


UNDECIDED = Decision(0, 0.0, False, 0.0)
"""Where nothing decides."""


@dataclass(frozen=True)
class Score:
    """The answer to a request."""

    loglikelihood: float
    is_greedy: bool
    """Every token of the continuation is the model's first choice."""
    decision: Decision | None = None
    """None without guardrails and filters."""
    measured: Any = None
    """What was measured of its tokens."""

    @property
    def is_blocked(self) -> bool:
        return self.decision is not None and self.decision.gated


@dataclass(frozen=True)
class Verdict:
    """What filters make of a prompt, or of a prompt and its answer."""

    statistic: float | None
    """Of the filter nearest to refusing; None without filters."""
    refusal: str | None
    """The text of the first filter that refuses; None if none does."""


def decision_of(n_tokens: int, gate: Sequence[Any] | None, verdict: Verdict) -> Decision | None:
    """From what gates decided (statistic, whether one fired, edit; None without any) and the verdict of filters."""
    is_refused = verdict.refusal is not None
    if gate is not None:
        statistic, is_gated, edit = gate
        return Decision(n_tokens, statistic, bool(is_gated) or is_refused, edit)
    return None if verdict.statistic is None else Decision(n_tokens, verdict.statistic, is_refused, 0.0)


@dataclass
class AnswerCache:
    """Answers of one model that earlier evaluations got, and all that it answers in this one."""

    known: Mapping[bytes, Answer] = field(default_factory=dict)
    """By `request_key`; a request that is here costs nothing."""
    answers: dict[bytes, Answer] = field(default_factory=dict)
    """Of every request of this evaluation."""
    n_known: int = 0
    """Requests that were answered without the model."""
    n_tokens: int = 0
    """Tokens that the model read."""


@dataclass(frozen=True, eq=False)
class GuardedModel:
    """A model with what acts on it: guardrails inside, wrappers around its prompts; with neither, a bare model.

    Guardrails are put on for each pass and are gone after it; filters read the model without them. Whether it is the
    model that they were made for is checked where they are loaded: attacks change its weights on purpose.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    bos: int | None = None
    """Token that every sequence begins with."""
    guardrails: Sequence[GuardrailModule] = ()
    wrappers: Sequence[WrapperModule] = ()
    """In the order in which they act."""
    batch_size: int = 32
    """Sequences in a batch; results depend on it by rounding only."""
    max_length: int = 0
    """Tokens that the model can read; by default what its configuration says."""

    def __post_init__(self) -> None:
        if not self.max_length:
            object.__setattr__(self, "max_length", context_length(self.model.config))

    @property
    def device(self) -> str:
        return str(next(self.model.parameters()).device)

    @property
    def decides(self) -> bool:
        """Whether anything decides about requests: guardrails or filters; a prefix alone does not."""
        return bool(self.guardrails) or has_filter(self.wrappers)

    def bare(self) -> GuardedModel:
        return replace(self, guardrails=(), wrappers=())

    def loglikelihoods(
        self,
        requests: Sequence[Request],
        job: Job = PLAIN_JOB,
        *,
        measure: Measure | None = None,
        cache: AnswerCache | None = None,
    ) -> list[Score]:
        """A score of each request, as the user sends it: in batches of similar lengths, shared among the job's workers.

        A request that a filter refuses is scored as if the model had been given the refusal in place of the context.
        With a `measure` of each continuation's tokens every request is computed: what the cache knows are
        log-likelihoods only. The cache also counts what is spent; the job keeps each list of requests by itself.
        """
        cache = cache if cache is not None else AnswerCache()
        assert not (cache.known and self.decides)  # Nothing is known of what gates and filters would decide.
        verdicts = self.verdicts(self.wrappers, requests, job)
        requests = self._wrapped(requests, verdicts)
        keys = [request_key(request, self.max_length) for request in requests]
        unknown = [i for i, key in enumerate(keys) if measure is not None or key not in cache.known]
        with guarded(self.model, self.guardrails, allow_mismatch=True):
            computed = _computed(self, [requests[i] for i in unknown], job, measure)
        cache.n_known += len(requests) - len(unknown)
        cache.n_tokens += sum(map(len, {requests[i].inputs(self.max_length) for i in unknown}))
        by_number = dict(zip(unknown, computed, strict=True))
        scores = []
        for i, (request, verdict) in enumerate(zip(requests, verdicts, strict=True)):
            loglikelihood, is_greedy, gate, measured = by_number.get(i) or (*cache.known[keys[i]], None, None)
            cache.answers[keys[i]] = (loglikelihood, is_greedy)
            decision = decision_of(len(request.inputs(self.max_length)), gate, verdict)
            scores.append(Score(loglikelihood, is_greedy, decision, measured))
        return scores

    def verdicts(
        self, wrappers: Sequence[WrapperModule], requests: Sequence[Request], job: Job = PLAIN_JOB
    ) -> list[Verdict]:
        """What the filters among some wrappers make of each request; every distinct text is read once."""
        room = context_length(self.model.config)
        values: list[list[tuple[float, WrapperModule]]] = [[] for _ in requests]
        for wrapper in (wrapper for wrapper in wrappers if wrapper.is_filter):
            texts = [read_by(wrapper.body, request)[-room:] for request in requests]
            distinct = list(dict.fromkeys(texts))
            statistics = self.filter_statistics(wrapper, distinct, job.named("filter"))
            of_text = dict(zip(distinct, (v if math.isfinite(v) else LARGEST for v in statistics), strict=True))
            for own, text in zip(values, texts, strict=True):
                own.append((of_text[text], wrapper))
        return [
            Verdict(
                max(own, key=lambda pair: pair[0] - pair[1].body.threshold)[0] if own else None,
                next((wrapper.body.refusal for value, wrapper in own if value > wrapper.body.threshold), None),
            )
            for own in values
        ]

    def filter_statistics(
        self, wrapper: WrapperModule, rows: Sequence[Sequence[int]], job: Job = PLAIN_JOB
    ) -> list[float]:
        """The statistic of each text: different keywords in it, or weight . mean residual + bias."""
        if wrapper.weight_D is None:
            texts = [str(self.tokenizer.decode(list(row), skip_special_tokens=True)) for row in rows]
            return [float(n_matches(text, wrapper.phrases)) for text in texts]
        assert wrapper.body.layer is not None
        layer, batch_size = wrapper.body.layer, self.batch_size
        mean_ND = mean_residuals(self.model, self.tokenizer, rows, layer=layer, batch_size=batch_size, job=job)
        if mean_ND.shape[1] != len(wrapper.weight_D):
            raise DsgError(
                f"The filter reads {len(wrapper.weight_D)} values a token; this model has {mean_ND.shape[1]}.",
                "Take the model that it was made for.",
            )
        value_N = (mean_ND.double() @ wrapper.weight_D.double() + wrapper.bias).tolist()
        special = set(special_ids(self.tokenizer))
        return [value if set(row) - special else -LARGEST for value, row in zip(value_N, rows, strict=True)]

    def _wrapped(self, requests: Sequence[Request], verdicts: Sequence[Verdict]) -> list[Request]:
        """What the model is given instead of each request: a refusal in place of its context, or prefixes before it."""
        prefix = prefix_ids(self.wrappers, self.tokenizer)
        texts = {verdict.refusal for verdict in verdicts if verdict.refusal is not None}
        refusals = {text: tuple(encode(self.tokenizer, [text], bos=self.bos)[0]) for text in texts}
        wrapped = []
        for request, verdict in zip(requests, verdicts, strict=True):
            context = request.context
            if verdict.refusal is not None:
                context = refusals[verdict.refusal]
            elif prefix:
                context = in_front(prefix, request, self.tokenizer, context_length(self.model.config))
            wrapped.append(Request(context, request.continuation))
        return wrapped


@torch.inference_mode()
def _computed(model: GuardedModel, requests: Sequence[Request], job: Job, measure: Measure | None) -> list[list[Any]]:
    """`[log-likelihood, is greedy, gate or None, measured]` of each request, the guardrails being on."""
    by_input: dict[tuple[int, ...], list[int]] = {}
    for i, request in enumerate(requests):
        by_input.setdefault(request.inputs(model.max_length), []).append(i)
    inputs = sorted(by_input, key=lambda ids: (-len(ids), ids))
    this = job.named(f"{job.name}/{requests_digest(requests)}")
    kept = this.kept() or {"n_batches": 0, "scores": []}
    n_batches: int = kept["n_batches"]
    scores: dict[int, list[Any]] = {i: values for i, *values in kept["scores"]}
    size, split_on_oom = model.batch_size, OomSplitter()
    n_tokens, total = sum(map(len, inputs[: n_batches * size])), sum(map(len, inputs))

    def state() -> State:
        return {"n_batches": n_batches, "scores": [[i, *values] for i, values in scores.items()]}

    with at_safe_points():
        for start in range(n_batches * size, len(inputs), size):
            rows = inputs[start : start + size]
            if job.workers.owns(start // size):
                continuations = [[(i, requests[i].continuation) for i in by_input[row]] for row in rows]
                scores |= _batch(model, rows, continuations, split_on_oom, measure)
            n_batches = start // size + 1
            n_tokens += sum(map(len, rows))
            job.progress(f"{job.name}, tokens", n_tokens, total)
            this.reached(state)
    this.keep(state())
    for shared in job.workers.gathered(list(scores.items())) if job.workers.n > 1 else ():
        scores |= dict(shared)
    return [scores[i] for i in range(len(requests))]


def _batch(
    model: GuardedModel,
    rows: Sequence[tuple[int, ...]],
    continuations: Sequence[Sequence[tuple[int, tuple[int, ...]]]],
    split_on_oom: OomSplitter,
    measure: Measure | None,
) -> dict[int, list[Any]]:
    """The requests of one batch by number; `continuations` are numbers and continuations of those that share a row."""
    tokenizer = model.tokenizer
    whole = pad_rows([list(row) for row in rows], tokenizer.pad_token_id or 0, special_ids(tokenizer), model.device)
    lengths = whole.mask_BL.sum(-1).tolist()
    n_tail = [max(len(continuation) for _, continuation in own) for own in continuations]
    # Every position at which some row predicts a token of a continuation.
    needed = {p for length, n in zip(lengths, n_tail, strict=True) for p in range(max(0, length - n), length)}
    positions_P = torch.tensor(sorted(needed))

    def forward(batch: TokenBatch) -> Tensor:
        return _logits(model.model, batch, positions_P[positions_P < batch.ids_BL.shape[1]])

    scores: dict[int, list[Any]] = {}
    for batch, logits_BPV in split_on_oom(whole, forward):
        gates = last_decisions(model.guardrails) if model.guardrails else [None] * len(batch.index)
        for row_index, i_row in enumerate(batch.index):
            first = int(torch.searchsorted(positions_P, max(0, lengths[i_row] - n_tail[i_row])))
            n_kept = min(n_tail[i_row], lengths[i_row])
            tail_CV = logits_BPV[row_index, first : first + n_kept].float().log_softmax(-1)
            for i, continuation in continuations[i_row]:
                scores[i] = _score(tail_CV, continuation, gates[row_index], measure)
    return scores


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


def _score(tail_CV: Tensor, continuation: tuple[int, ...], gate: Any, measure: Measure | None) -> list[Any]:
    """Of a continuation, or of its end where its beginning was cut off."""
    tail_CV = tail_CV[-len(continuation) :]
    target_C = torch.tensor(continuation, device=tail_CV.device)[-len(tail_CV) :]
    loglikelihood = float(tail_CV.gather(-1, target_C[:, None]).sum())
    if not math.isfinite(loglikelihood):
        raise DsgError(
            f"A log-likelihood is {loglikelihood}: the model is broken, not unlearned.",
            "Check the weights, lower --strength, or try --dtype float32.",
        )
    is_greedy = bool((tail_CV.argmax(-1) == target_C).all())
    return [loglikelihood, is_greedy, gate, measure(tail_CV, target_C) if measure is not None else None]


def requests_digest(requests: Sequence[Request]) -> str:
    """Of all requests, in their order."""
    digest = hashlib.sha256()
    for request in requests:
        context, continuation = request.context, request.continuation
        digest.update(array("q", (len(context), len(continuation), *context, *continuation)).tobytes())
    return digest.hexdigest()


KEY_BYTES = 16


def request_key(request: Request, max_length: int) -> bytes:
    """What the model reads and what it is to continue with, as a digest."""
    inputs, continuation = request.inputs(max_length), request.continuation
    content = array("q", (len(inputs), *inputs, *continuation)).tobytes()
    return hashlib.sha256(content).digest()[:KEY_BYTES]


def answers_to_tensors(answers: Mapping[bytes, Answer]) -> dict[str, Tensor]:
    """Answers by `request_key` as an artifact stores them."""
    keys = sorted(answers)
    digits = torch.tensor(list(b"".join(keys)), dtype=torch.uint8)
    return {
        "base_request": digits.reshape(-1, KEY_BYTES),
        "base_loglikelihood": torch.tensor([answers[key][0] for key in keys], dtype=torch.float64),
        "base_is_greedy": torch.tensor([answers[key][1] for key in keys], dtype=torch.bool),
    }


def answers_from_tensors(tensors: Mapping[str, Tensor]) -> dict[bytes, Answer]:
    """The inverse."""
    keys = [bytes(row) for row in tensors["base_request"].tolist()]
    values, greedy = tensors["base_loglikelihood"].tolist(), tensors["base_is_greedy"].tolist()
    return {key: (value, is_greedy) for key, value, is_greedy in zip(keys, values, greedy, strict=True)}
