"""What a model writes and reads of free text (benches/text.py), and what is measured of each answer.

A side writes what it should write and reads what it should read, in batches, under its guardrails and behind its
wrappers. What it wrote freely is read by the base model, to tell language from gibberish.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsg_cli.artifacts import Json
from dsg_cli.benches.text import Item, TextBench, digest_of
from dsg_cli.checkpoints import Checkpoint
from dsg_cli.errors import DsgError
from dsg_cli.guardrail import GuardrailModule, check_causal
from dsg_cli.metrics.fluency import is_gibberish, is_refusal, natural_limits, repetition
from dsg_cli.metrics.membership import loss_score, min_k, standardised, zlib_score
from dsg_cli.metrics.memorisation import exact_memorisation, extraction_strength
from dsg_cli.metrics.overlap import rouge
from dsg_cli.model import LoadedModel, context_length
from dsg_cli.progress import Report, silent
from dsg_cli.scorer import Decision, Scorer
from dsg_cli.scoring import Request, encode_pair
from dsg_cli.tokens import as_chat, encode
from dsg_cli.workers import ALONE, Workers
from dsg_cli.wrapper import WrapperModule, prefix_ids
from dsg_cli.writing import Prompt, Writer

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
    """Refuse what cannot be asked of a model, before it is.

    Raises:
        DsgError: A prompt with what is to be written does not fit the model, or a gate cannot decide while text is
            written.
    """
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
