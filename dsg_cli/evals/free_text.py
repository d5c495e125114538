"""Benches whose answers are free text or the likelihood of given text: what all of them have in common.

Each is a list of items that a model writes or reads, and a few functions that make metrics of what came of them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from dsg_cli.data.tokens import Request, as_chat, encode, encode_pair
from dsg_cli.errors import DsgError
from dsg_cli.evals.metrics import (
    exact_memorisation,
    extraction_strength,
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
from dsg_cli.guardrail.guarded import check_causal, check_model
from dsg_cli.guardrail.runtime.guardrail import GuardrailModule
from dsg_cli.inference.generation import Prompt, Writer
from dsg_cli.inference.scoring import Decision, Scorer, SideBySide, gate_rate
from dsg_cli.inference.wrappers import WrapperModule, prefix_ids
from dsg_cli.job import ALONE, Report, Workers, silent
from dsg_cli.models.language_model import LoadedModel, context_length
from dsg_cli.workspace.checkpoints import Checkpoint
from dsg_cli.workspace.results import Json


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
    is_free: bool = False
    """Whether what is written is judged as language, too."""
    is_forget: bool = False
    """Whether it asks for what should be forgotten: a guardrail's gate should open."""


Found = Mapping[str, Sequence[tuple[Item, Json]]]
"""Part -> its items with what came of each (text_evaluation.py), of one side."""


class TextBench(Protocol):
    """A bench."""

    @property
    def name(self) -> str: ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what it measures."""
        ...

    @property
    def relative(self) -> tuple[str, ...]:
        """Those of them that need a model that never saw what is to be forgotten."""
        ...

    def items(self) -> Sequence[Item]: ...

    def measured(self, found: Found) -> Json:
        """Metrics of one side, with intervals where there are any."""
        ...

    def scores(self, found: Found) -> Json:
        """What later evaluations need of a model that never saw what is to be forgotten."""
        ...

    def relative_to(self, found: Found, scores: Json) -> Json:
        """Metrics of one side that need such scores."""
        ...


def digest_of(items: Sequence[Item], how: str) -> str:
    """Of everything that is asked, and of how it is."""
    content = json.dumps([how, *(asdict(item) for item in items)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def mean_of(name: str, values: Sequence[float], *, factor: float = 1.0) -> Json:
    """`{name, name_low, name_high}`: the mean and its 95 % interval by the normal approximation."""
    n = len(values)
    mean = sum(values) / n
    variance = sum((value - mean) ** 2 for value in values) / (n - 1) if n > 1 else math.nan
    half = 1.96 * math.sqrt(variance / n) if n > 1 else 0.0
    return {
        name: factor * mean,
        f"{name}_low": factor * (mean - half),
        f"{name}_high": factor * (mean + half),
    }


LOGIT_BYTES = 2**31
"""Of logits in a batch of texts, in float32; a text longer than that is read alone."""

SHARES = {"min_k_20": 0.2, "min_k_40": 0.4}

Results = dict[str, list[Json]]
"""Bench -> what came of each of its items, of one side."""


@dataclass(frozen=True)
class Side:
    """A model and what is on it."""

    name: str
    loaded: LoadedModel
    guardrails: Sequence[GuardrailModule] = ()
    wrappers: Sequence[WrapperModule] = ()


@dataclass(frozen=True)
class Texts:
    """Everything that is asked of every side, and how."""

    benches: Sequence[TextBench]
    bos: int | None
    batch_size: int = 32
    chat: bool = False
    """Put contexts in the tokenizer's chat template."""
    workers: Workers = ALONE
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    report: Report = silent

    @functools.cached_property
    def items(self) -> dict[str, Sequence[Item]]:
        """Bench -> all that is asked, made once."""
        return {bench.name: bench.items() for bench in self.benches}

    def digests(self) -> dict[str, str]:
        """Bench -> digest of all that is asked."""
        how = f"{self.bos}/{self.chat}"
        return {name: digest_of(items, how) for name, items in self.items.items()}


def check_texts(texts: Texts, loaded: LoadedModel, sides: Sequence[Side] = ()) -> None:
    """Refuse what cannot be asked of a model, before it is."""
    room = context_length(loaded.model.config)
    before = max((len(prefix_ids(side.wrappers, loaded.tokenizer)) for side in sides), default=0)
    writes = [(name, item) for name, items in texts.items.items() for item in items if item.n_new]
    if writes:
        check_causal(guard.gate.form for side in sides for guard in side.guardrails)
    for name, item in writes:
        n = len(_context_ids(loaded, item, texts)) + before
        if n + item.n_new > room:
            raise DsgError(
                f"{name}, {item.id}: a prompt of {n} tokens and {item.n_new} to be written are more than the {room} "
                "that the model reads.",
                "Take a model with a longer context.",
            )


def answers_of(side: Side, base: Side, texts: Texts, known: Results) -> tuple[Results, int]:
    """What came of every item of every bench, and tokens that were read and written for it."""
    room = context_length(side.loaded.model.config)
    writer = Writer(side.loaded, side.guardrails, side.wrappers, texts.batch_size, what=f"{side.name} model, writing")
    reader = Scorer(side.loaded, side.guardrails, texts.batch_size, room, what=f"{side.name} model, reading")
    judge = Scorer(base.loaded, (), texts.batch_size, room, what=f"{side.name} model, as the base reads it")
    reader.wrappers, reader.bos, reader.workers, judge.workers = side.wrappers, texts.bos, texts.workers, texts.workers
    for one in (writer, reader, judge):
        one.checkpoint, one.report = texts.checkpoint, texts.report
    results: Results = {}
    for bench in texts.benches:
        if bench.name in known:
            results[bench.name] = known[bench.name]
            continue
        items = texts.items[bench.name]
        written = [i for i, item in enumerate(items) if item.n_new]
        read = [i for i, item in enumerate(items) if not item.n_new]
        found: dict[int, Json] = dict(
            zip(written, _write(writer, judge, [items[i] for i in written], texts), strict=True)
        )
        found |= dict(zip(read, _read(reader, [items[i] for i in read], texts), strict=True))
        results[bench.name] = [found[i] for i in range(len(items))]
    return results, writer.n_tokens + reader.n_tokens + judge.n_tokens


def _write(writer: Writer, judge: Scorer, items: Sequence[Item], texts: Texts) -> list[Json]:
    loaded = writer.loaded
    prompts = [Prompt(tuple(_context_ids(loaded, item, texts)), item.n_new, item.stop) for item in items]
    refusals = [one.body.refusal for one in writer.wrappers]
    found: list[Json] = []
    answers = writer(prompts)
    for item, answer in zip(items, answers, strict=True):
        truth = item.target
        if item.is_free:  # Of a longer text, as much as may be written.
            truth = str(loaded.tokenizer.decode(encode(loaded.tokenizer, [truth], bos=None)[0][: item.n_new]))
        shared = rouge(truth, answer.text)
        found.append(
            {
                "rouge_l": shared.l_f1,
                "rouge_l_recall": shared.l_recall,
                "n_tokens": len(answer.ids),
                "repetition": repetition(answer.ids),
                "refusal": is_refusal(answer.text, refusals),
                **_decided(answer.decision),
                "text": answer.text,
            }
        )
    free = [i for i, item in enumerate(items) if item.is_free]
    limits_of = natural_limits(*_natural(judge, [items[i] for i in free], texts)) if free else (0.0, 0.0)
    continued = [(i, Request(prompts[i].ids, answers[i].ids)) for i in free if answers[i].ids]
    scores, _ = judge([request for _, request in continued])
    losses = {
        i: -one.loglikelihood / len(request.continuation) for (i, request), one in zip(continued, scores, strict=True)
    }
    for i in free:
        found[i]["gibberish"] = is_gibberish(losses.get(i), found[i]["repetition"], limits_of)
    return found


def _natural(judge: Scorer, items: Sequence[Item], texts: Texts) -> tuple[list[float], list[float]]:
    """Losses and repetitions of how the texts really go on, as the base model reads them."""
    loaded = judge.loaded
    requests = []
    for item in items:
        ids = encode(loaded.tokenizer, [item.target], bos=None)[0][: item.n_new]
        requests.append(Request(tuple(_context_ids(loaded, item, texts)), tuple(ids)))
    requests = [one for one in requests if one.continuation]
    scores, _ = judge(requests)
    losses = [-score.loglikelihood / len(one.continuation) for score, one in zip(scores, requests, strict=True)]
    return losses, [repetition(one.continuation) for one in requests]


def _read(reader: Scorer, items: Sequence[Item], texts: Texts) -> list[Json]:
    if not items:
        return []
    loaded, room = reader.loaded, reader.max_length
    wholes = [_pair(loaded, item, texts) for item in items]
    # A text longer than the context is read as far as it fits.
    requests = [Request(one.context, one.continuation[: max(1, room + 1 - len(one.context))]) for one in wholes]
    longest = max(len(one.inputs(room)) for one in requests)
    size = reader.batch_size
    reader.batch_size = max(1, min(size, LOGIT_BYTES // (4 * longest * len(loaded.tokenizer))))
    try:
        scores, decisions = reader(requests, _measure)
    finally:
        reader.batch_size = size
    found = []
    for item, whole, request, score, decided in zip(items, wholes, requests, scores, decisions, strict=True):
        measured = dict(score.measured)
        total = -measured["loss"] * measured["n_tokens"]
        text = item.target
        if len(request.continuation) < len(whole.continuation):
            text = str(loaded.tokenizer.decode(list(request.continuation)))
        found.append({**measured, "zlib_score": zlib_score([total], text), **_decided(decided)})
    return found


def _measure(tail_CV: Tensor, target_C: Tensor) -> Json:
    """What is kept of a text's tokens: losses in nats, scores of membership and of memorisation."""
    logprob_C = tail_CV.gather(-1, target_C[:, None])[:, 0]
    probability_CV = tail_CV.exp()
    finite_CV = tail_CV.clamp(min=torch.finfo(tail_CV.dtype).min / 4)
    mean_C = (probability_CV * finite_CV).nan_to_num(0.0).sum(-1)
    square_C = (probability_CV * finite_CV.clamp(min=-1e6).square()).sum(-1)
    logprobs = logprob_C.tolist()
    expected = zip(logprobs, mean_C.tolist(), (square_C - mean_C.square()).tolist(), strict=True)
    relative = [standardised(*one) for one in expected]
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


def _pair(loaded: LoadedModel, item: Item, texts: Texts) -> Request:
    if not texts.chat or not item.context:
        return encode_pair(loaded.tokenizer, item.context, item.target, bos=texts.bos)
    return Request(
        tuple(_context_ids(loaded, item, texts)), tuple(encode(loaded.tokenizer, [item.target.lstrip()], bos=None)[0])
    )


def _context_ids(loaded: LoadedModel, item: Item, texts: Texts) -> list[int]:
    """Token ids of a context as the user sends it."""
    if texts.chat:
        return encode(loaded.tokenizer, [as_chat(loaded.tokenizer, item.context)], bos=None)[0]
    return encode(loaded.tokenizer, [item.context], bos=texts.bos)[0]


def _decided(decision: Decision | None) -> Json:
    if decision is None:
        return {"length": 0, "statistic": 0.0, "gated": False, "edit": 0.0}
    return {
        "length": decision.n_tokens,
        "statistic": decision.statistic,
        "gated": decision.gated,
        "edit": decision.edit,
    }


@dataclass(frozen=True)
class Reference:
    """What is known of a model that never saw what is to be forgotten."""

    source: str
    digest: str = ""
    """Of its weights, where they are known."""
    loaded: LoadedModel | None = None
    """The model, if it is asked here."""
    scores: Mapping[str, Json] = field(default_factory=dict)
    """Bench -> its scores, where they are stored."""
    results: Mapping[str, Json] = field(default_factory=dict)
    """Bench -> its metrics, where they are."""


def evaluate_texts(
    base: Side,
    unlearned: Side,
    texts: Texts,
    *,
    reference: Reference | None = None,
    known: Results | None = None,
    samples: bool = False,
    allow_mismatch: bool = False,
) -> SideBySide:
    """Ask every bench of the base model and of the unlearned one.

    Args:
        base: The base model, whole.
        unlearned: The same or another model under guardrails and behind wrappers.
        texts: What is asked.
        reference: A model that never saw what is to be forgotten, or its scores; metrics that need it are left out
            without it, and `refused` of the result says why.
        known: Bench -> what an earlier evaluation found of the same items of the base model.
        samples: Keep what was asked and written in the rows.
        allow_mismatch: Also if the model is not the one that the guardrails were made for.
    """
    for guard in () if allow_mismatch else unlearned.guardrails:
        check_model(unlearned.loaded.model, guard)
    check_texts(texts, base.loaded, [base, unlearned])
    found: dict[str, Results] = {}
    found["base"], n_base = answers_of(base, base, texts, known or {})
    found["unlearned"], n_unlearned = answers_of(unlearned, base, texts, {})
    n_tokens = n_base + n_unlearned
    if reference is not None and reference.loaded is not None:
        check_texts(texts, reference.loaded)
        needing = dataclasses.replace(texts, benches=[bench for bench in texts.benches if bench.relative])
        found["reference"], n = answers_of(Side("reference", reference.loaded), base, needing, {})
        n_tokens += n
    results: dict[str, Json] = {}
    refused: dict[str, Json] = {}
    scores: dict[str, Json] = {}
    gate: dict[str, Json] = {}
    rows: list[Json] = []
    for bench in texts.benches:
        items = texts.items[bench.name]
        of_sides = {
            name: _by_part(items, several[bench.name]) for name, several in found.items() if bench.name in several
        }
        results[bench.name] = {name: bench.measured(one) | {"n": len(items)} for name, one in of_sides.items()}
        known_scores = _scores_of(bench, reference, of_sides.get("reference"))
        if known_scores is not None:
            scores[bench.name] = known_scores
            if reference is not None and bench.name in reference.results:
                results[bench.name]["reference"] = dict(reference.results[bench.name])
            for name in ("base", "unlearned"):
                results[bench.name][name] |= bench.relative_to(of_sides[name], known_scores)
        elif bench.relative:
            refused[bench.name] = dict.fromkeys(bench.relative, "it needs a model that never saw what is forgotten")
        of_bench = _rows(bench.name, items, found["base"][bench.name], found["unlearned"][bench.name], samples)
        rates = _gate_rates(of_bench, items)
        gate[bench.name] = gate_rate(
            [row for row, item in zip(of_bench, items, strict=True) if item.is_forget] or of_bench
        )
        results[bench.name]["unlearned"] |= rates if unlearned.guardrails or unlearned.wrappers else {}
        rows += of_bench
    return SideBySide(
        results=results,
        gate=gate,
        rows=rows,
        n_tokens=n_tokens,
        asked=texts.digests(),
        scores=scores,
        refused=refused,
    )


def _scores_of(bench: TextBench, reference: Reference | None, found: Found | None) -> Json | None:
    if not bench.relative or reference is None:
        return None
    if found is not None:
        return bench.scores(found)
    stored = reference.scores.get(bench.name)
    return None if stored is None else dict(stored)


def _by_part(items: Sequence[Item], results: Sequence[Json]) -> Found:
    found: dict[str, list[tuple[Item, Json]]] = {}
    for item, one in zip(items, results, strict=True):
        found.setdefault(item.part, []).append((item, one))
    return found


DECIDED = ("length", "statistic", "gated", "edit")


def _rows(
    bench: str, items: Sequence[Item], base: Sequence[Json], unlearned: Sequence[Json], samples: bool
) -> list[Json]:
    """One an item: numbers, and text only if it is asked for."""
    rows = []
    for item, before, after in zip(items, base, unlearned, strict=True):
        row: Json = {"bench": bench, "id": item.id, "group": item.part, "role": item.role}
        row |= {name: after[name] for name in DECIDED}
        row |= {"answer": None}
        for name, one in (("base", before), ("unlearned", after)):
            row[name] = {key: value for key, value in one.items() if key not in (*DECIDED, "text")}
        if samples:
            row |= {"context": item.context, "target": item.target}
            row |= {
                f"{name}_text": one["text"] for name, one in (("base", before), ("unlearned", after)) if "text" in one
            }
        rows.append(row)
    return rows


def _gate_rates(rows: Sequence[Json], items: Sequence[Item]) -> Json:
    """Share gated of each part."""
    parts: dict[str, list[bool]] = {}
    for row, item in zip(rows, items, strict=True):
        parts.setdefault(item.part, []).append(row["gated"])
    return {f"gated_{part}": sum(several) / len(several) for part, several in parts.items()}
