"""Benches whose answers are free text or the likelihood of given text: what all of them have in common.

Each is a list of items that a model writes or reads, and a few functions that make metrics of what came of them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dsg_cli.data.tokens import Request, as_chat, encode, encode_pair
from dsg_cli.errors import DsgError
from dsg_cli.evals.metrics import (
    EvalResult,
    exact_memorisation,
    extraction_strength,
    gate_rate,
    is_gibberish,
    is_refusal,
    loss_score,
    min_k,
    natural_limits,
    repetition,
    rouge,
    standardised,
    zlib_score,
)
from dsg_cli.guardrail.guarded import check_causal
from dsg_cli.inference.generation import Prompt, generate
from dsg_cli.inference.scoring import UNDECIDED, AnswerCache, GuardedModel
from dsg_cli.inference.wrappers import prefix_ids
from dsg_cli.job import PLAIN_JOB, Job
from dsg_cli.settings import EvalSection
from dsg_cli.workspace.body import Json


@dataclass(frozen=True)
class Item:
    """One thing that is asked of a model: to write on from a context, or to read a text after it."""

    id: str
    part: str
    """Of the bench, such as `knowmem_forget`."""
    context: str
    target: str
    """What should be written, or what is read."""
    role: str = ""
    """What it is within its question, where a question has several items."""
    n_new: int = 0
    """Tokens to write at most; 0 reads the target."""
    stop: tuple[str, ...] = ()
    """What is written ends before the first of these."""
    is_judged: bool = False
    """Whether what is written is judged as language, too."""
    is_forget: bool = False
    """Whether it asks for what should be forgotten: a guardrail's gate should open."""


PartResults = Mapping[str, Sequence[tuple[Item, Json]]]
"""Part -> its items with what came of each, of one model."""


class TextBench(ABC):
    """A bench on free text: items that a model writes or reads, and metrics of what comes of them."""

    name: str
    metrics: Any
    """Names of what it measures, a tuple."""
    relative: tuple[str, ...] = ()
    """Those of them that need a model that never saw what is to be forgotten."""

    @abstractmethod
    def items(self) -> list[Item]: ...

    @abstractmethod
    def compute(self, results: PartResults) -> Json:
        """Metrics of one model, with intervals where there are any."""

    def scores(self, results: PartResults) -> Json:  # noqa: ARG002
        """What later evaluations need of a model that never saw what is to be forgotten."""
        return {}

    def relative_to(self, results: PartResults, scores: Json) -> Json:  # noqa: ARG002
        """Metrics of one model that need such scores."""
        return {}


LOGIT_BYTES = 2**31
"""Of logits in a batch of texts, in float32; a text longer than that is read alone."""

SHARES = {"min_k_20": 0.2, "min_k_40": 0.4}

Results = dict[str, list[Json]]
"""Bench -> what came of each of its items, of one model."""


@dataclass(frozen=True)
class FreeText:
    """Benches on free text, and how their items are put."""

    benches: Sequence[TextBench]
    bos: int | None
    chat: bool = False
    """Put contexts in the tokenizer's chat template."""

    @functools.cached_property
    def items(self) -> dict[str, Sequence[Item]]:
        return {bench.name: bench.items() for bench in self.benches}

    def digests(self) -> dict[str, str]:
        """Bench -> digest of all its items and of how they are put."""
        digests = {}
        for name, items in self.items.items():
            fields = [dataclasses.asdict(item) for item in items]
            for item in fields:
                item["is_free"] = item.pop("is_judged")  # As digests in earlier artifacts have it.
            content = json.dumps([f"{self.bos}/{self.chat}", *fields], sort_keys=True)
            digests[name] = hashlib.sha256(content.encode()).hexdigest()
        return digests

    def context_ids(self, tokenizer: PreTrainedTokenizerBase, item: Item) -> list[int]:
        """Token ids of a context as the user sends it."""
        if self.chat:
            return encode(tokenizer, [as_chat(tokenizer, item.context)], bos=None)[0]
        return encode(tokenizer, [item.context], bos=self.bos)[0]

    def pair(self, tokenizer: PreTrainedTokenizerBase, item: Item) -> Request:
        if not self.chat or not item.context:
            return encode_pair(tokenizer, item.context, item.target, bos=self.bos)
        target = encode(tokenizer, [item.target.lstrip()], bos=None)[0]
        return Request(tuple(self.context_ids(tokenizer, item)), tuple(target))


def check_room(free: FreeText, *models: GuardedModel) -> None:
    """Refuse gates that cannot guard writing, and prompts that leave no room for it, before anything is computed."""
    writes = [(name, item) for name, items in free.items.items() for item in items if item.n_new]
    if writes:
        check_causal(guard.gate.form for model in models for guard in model.guardrails)
    tokenizer, room = models[0].tokenizer, models[0].max_length
    n_prefix = max(len(prefix_ids(model.wrappers, tokenizer)) for model in models)
    for name, item in writes:
        n = len(free.context_ids(tokenizer, item)) + n_prefix
        if n + item.n_new > room:
            raise DsgError(
                f"{name}, {item.id}: a prompt of {n} tokens and {item.n_new} to be written are more than the {room} "
                "that the model reads.",
                "Take a model with a longer context.",
            )


def _results_of(
    side: str, model: GuardedModel, base: GuardedModel, free: FreeText, job: Job, known: Results
) -> tuple[Results, int]:
    """What comes of every item of every bench, and tokens that were read and written for it."""
    results: Results = {}
    n_tokens = 0
    for bench in free.benches:
        if bench.name in known:
            results[bench.name] = known[bench.name]
            continue
        items = free.items[bench.name]
        written = [i for i, item in enumerate(items) if item.n_new]
        read = [i for i, item in enumerate(items) if not item.n_new]
        of_item: dict[int, Json] = {}
        for numbers, compute in ((written, _write), (read, _read)):
            if numbers:
                values, n = compute(side, model, base, [items[i] for i in numbers], free, job)
                of_item |= dict(zip(numbers, values, strict=True))
                n_tokens += n
        results[bench.name] = [of_item[i] for i in range(len(items))]
    return results, n_tokens


def _write(
    side: str, model: GuardedModel, base: GuardedModel, items: Sequence[Item], free: FreeText, job: Job
) -> tuple[list[Json], int]:
    tokenizer = model.tokenizer
    prompts = [Prompt(tuple(free.context_ids(tokenizer, item)), item.n_new, item.stop) for item in items]
    completions = generate(model, prompts, job.named(f"{side} model, writing"))
    refusals = [wrapper.body.refusal for wrapper in model.wrappers]
    results: list[Json] = []
    for item, completion in zip(items, completions, strict=True):
        truth = item.target
        if item.is_judged:  # Of a longer text, as much as may be written.
            truth = str(tokenizer.decode(encode(tokenizer, [truth], bos=None)[0][: item.n_new]))
        l_f1, l_recall = rouge(truth, completion.text)
        results.append(
            {
                "rouge_l": l_f1,
                "rouge_l_recall": l_recall,
                "n_tokens": len(completion.token_ids),
                "repetition": repetition(completion.token_ids),
                "refusal": is_refusal(completion.text, refusals),
                **(completion.decision or UNDECIDED).row(),
                "text": completion.text,
            }
        )
    n_tokens = sum(completion.n_tokens for completion in completions)
    judged = [i for i, item in enumerate(items) if item.is_judged]
    if not judged:
        return results, n_tokens
    job = job.named(f"{side} model, as the base reads it")
    cache = AnswerCache()

    def losses_per_token(requests: Sequence[Request]) -> list[float]:
        scores = base.loglikelihoods(requests, job, cache=cache)
        return [-score.loglikelihood / len(r.continuation) for score, r in zip(scores, requests, strict=True)]

    natural = []
    for i in judged:
        ids = encode(tokenizer, [items[i].target], bos=None)[0][: items[i].n_new]
        natural += [Request(prompts[i].ids, tuple(ids))] if ids else []
    limits = natural_limits(losses_per_token(natural), [repetition(request.continuation) for request in natural])
    continued = [i for i in judged if completions[i].token_ids]
    written = [Request(prompts[i].ids, completions[i].token_ids) for i in continued]
    loss_of = dict(zip(continued, losses_per_token(written), strict=True))
    for i in judged:
        results[i]["gibberish"] = is_gibberish(loss_of.get(i), results[i]["repetition"], limits)
    return results, n_tokens + cache.n_tokens


def _read(
    side: str, model: GuardedModel, _base: GuardedModel, items: Sequence[Item], free: FreeText, job: Job
) -> tuple[list[Json], int]:
    tokenizer, room = model.tokenizer, model.max_length
    wholes = [free.pair(tokenizer, item) for item in items]
    # A text longer than the context is read as far as it fits.
    requests = [Request(pair.context, pair.continuation[: max(1, room + 1 - len(pair.context))]) for pair in wholes]
    longest = max(len(request.inputs(room)) for request in requests)
    size = max(1, min(model.batch_size, LOGIT_BYTES // (4 * longest * len(tokenizer))))
    cache = AnswerCache()
    model, job = dataclasses.replace(model, batch_size=size), job.named(f"{side} model, reading")
    scores = model.loglikelihoods(requests, job, measure=_measure, cache=cache)
    results = []
    for item, whole, request, score in zip(items, wholes, requests, scores, strict=True):
        total = -score.measured["loss"] * score.measured["n_tokens"]
        text = item.target
        if len(request.continuation) < len(whole.continuation):
            text = str(tokenizer.decode(list(request.continuation)))
        zlib_of_text = {"zlib_score": zlib_score([total], text)}
        results.append(score.measured | zlib_of_text | (score.decision or UNDECIDED).row())
    return results, cache.n_tokens


def _measure(tail_CV: Tensor, target_C: Tensor) -> Json:
    """What is kept of a text's tokens: losses in nats, scores of membership and of memorisation."""
    logprob_C = tail_CV.gather(-1, target_C[:, None])[:, 0]
    probability_CV = tail_CV.exp()
    finite_CV = tail_CV.clamp(min=torch.finfo(tail_CV.dtype).min / 4)
    mean_C = (probability_CV * finite_CV).nan_to_num(0.0).sum(-1)
    square_C = (probability_CV * finite_CV.clamp(min=-1e6).square()).sum(-1)
    logprobs = logprob_C.tolist()
    expected = zip(logprobs, mean_C.tolist(), (square_C - mean_C.square()).tolist(), strict=True)
    relative = [standardised(*values) for values in expected]
    is_first = (tail_CV.argmax(-1) == target_C).tolist()
    return {
        "n_tokens": len(logprobs),
        "loss": -loss_score(logprobs),
        "loss_score": loss_score(logprobs),
        **{name: min_k(logprobs, share) for name, share in SHARES.items()},
        "min_k_plus_20": min_k(relative, 0.2),
        "exact_memorisation": exact_memorisation(is_first),
        "extraction_strength": extraction_strength(is_first),
    }


@dataclass(frozen=True)
class Reference:
    """What is known of a model that never saw what is to be forgotten."""

    source: str
    digest: str = ""
    """Of its weights, where they are known."""
    model: GuardedModel | None = None
    """If it is evaluated here."""
    scores: Mapping[str, Json] = field(default_factory=dict)
    """Bench -> its scores, where they are stored."""
    results: Mapping[str, Json] = field(default_factory=dict)
    """Bench -> its metrics, where they are."""


def evaluate_texts(
    base: GuardedModel,
    unlearned: GuardedModel,
    free: FreeText,
    settings: EvalSection,
    job: Job = PLAIN_JOB,
    *,
    reference: Reference | None = None,
    known: Results | None = None,
) -> EvalResult:
    """Evaluate the base model, bare, and the unlearned one; each of the job's workers gets the whole result.

    Metrics that need a model that never saw what is to be forgotten are left out without a `reference`, and `refused`
    of the result says why. `known` is what an earlier evaluation found of the same items of the base model.
    """
    check_room(free, base, unlearned)
    of_side: dict[str, Results] = {}
    of_side["base"], n_base = _results_of("base", base, base, free, job, known or {})
    of_side["unlearned"], n_unlearned = _results_of("unlearned", unlearned, base, free, job, {})
    result = EvalResult(n_tokens=n_base + n_unlearned, asked=free.digests())
    if reference is not None and reference.model is not None:
        check_room(free, reference.model)
        needing = dataclasses.replace(free, benches=[bench for bench in free.benches if bench.relative])
        of_side["reference"], n = _results_of("reference", reference.model, base, needing, job, {})
        result.n_tokens += n
    for bench in free.benches:
        items, name = free.items[bench.name], bench.name
        parts = {side: _by_part(items, results[name]) for side, results in of_side.items() if name in results}
        metrics = {side: bench.compute(part) | {"n": len(items)} for side, part in parts.items()}
        scores: Json | None = None
        if bench.relative and reference is not None:
            scores = bench.scores(parts["reference"]) if "reference" in parts else reference.scores.get(name)
        if scores is not None:
            result.reference_scores[name] = dict(scores)
            if reference is not None and name in reference.results:
                metrics["reference"] = dict(reference.results[name])
            for side in ("base", "unlearned"):
                metrics[side] |= bench.relative_to(parts[side], scores)
        elif bench.relative:
            result.refused[name] = dict.fromkeys(bench.relative, "it needs a model that never saw what is forgotten")
        rows = _rows(name, items, of_side["base"][name], of_side["unlearned"][name], settings.samples)
        forget = [row for row, item in zip(rows, items, strict=True) if item.is_forget]
        result.gate[name] = gate_rate(forget or rows)
        for part, of_part in parts["unlearned"].items() if unlearned.guardrails or unlearned.wrappers else ():
            metrics["unlearned"][f"gated_{part}"] = sum(value["gated"] for _, value in of_part) / len(of_part)
        result.results[name] = metrics
        result.rows += rows
    return result


def _by_part(items: Sequence[Item], results: Sequence[Json]) -> PartResults:
    parts: dict[str, list[tuple[Item, Json]]] = {}
    for item, result in zip(items, results, strict=True):
        parts.setdefault(item.part, []).append((item, result))
    return parts


def _rows(
    bench: str, items: Sequence[Item], base: Sequence[Json], unlearned: Sequence[Json], samples: bool
) -> list[Json]:
    rows = []
    for item, *results in zip(items, base, unlearned, strict=True):
        sides = dict(zip(("base", "unlearned"), results, strict=True))
        row: Json = {"bench": bench, "id": item.id, "group": item.part, "role": item.role}
        row |= {name: sides["unlearned"][name] for name in UNDECIDED.row()} | {"answer": None}
        for side, result in sides.items():
            row[side] = {name: value for name, value in result.items() if name not in (*UNDECIDED.row(), "text")}
        if samples:
            row |= {"context": item.context, "target": item.target}
            row |= {f"{side}_text": result["text"] for side, result in sides.items() if "text" in result}
        rows.append(row)
    return rows
