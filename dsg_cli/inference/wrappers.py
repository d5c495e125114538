"""What stands between whoever asks and a model that stays as it is: a text in front of prompts, or a filter that
refuses prompts or answers.

Filters see what the user sent, before any prefix. A request that is refused is answered as if the model had been given
the refusal in place of the context, so that the answer tells nothing of the question.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from dsg_cli.artifacts import Wrapper
from dsg_cli.errors import DsgError
from dsg_cli.model import context_length
from dsg_cli.progress import Report, silent
from dsg_cli.scoring import Request
from dsg_cli.tokens import encode, special_ids
from dsg_cli.workers import ALONE, Workers
from dsg_cli.wrapper_module import LARGEST, WrapperModule, has_filter, on_side, statistics_of, wrapper_from_artifact

__all__ = [
    "Verdict",
    "Wrapped",
    "WrapperModule",
    "has_filter",
    "judged",
    "on_side",
    "prefix_ids",
    "prompt_with",
    "refuses_answer",
    "refuses_prompt",
    "wrap",
    "wrapper_from_artifact",
]


@dataclass(frozen=True)
class Wrapped:
    """What the model is asked instead of a request."""

    request: Request
    statistic: float | None
    """Of the filter nearest to refusing; None without filters."""
    is_refused: bool


@dataclass(frozen=True)
class Verdict:
    """What filters make of a prompt, or of a prompt and its answer."""

    statistic: float | None
    refusal: str | None
    """The text of the first filter that refuses; None if none does."""


def wrap(
    wrappers: Sequence[WrapperModule],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    *,
    batch_size: int,
    bos: int | None,
    workers: Workers = ALONE,
    report: Report = silent,
) -> list[Wrapped]:
    """What the model is asked instead of each request, for scoring by log-likelihood.

    Args:
        wrappers: In the order in which they act.
        model: Whose residuals classifiers read, without any guardrail on it.
        tokenizer: Its own.
        requests: As they would be asked without wrappers.
        batch_size: Texts that a classifier reads at once; results depend on it by rounding only.
        bos: Token that a refusal begins with.
        workers: Who reads; each gets all.
        report: Progress.

    Raises:
        DsgError: A prefix and a continuation are together longer than what the model reads, or a classifier was made
            for another width.
    """
    verdicts = judged(wrappers, model, tokenizer, requests, batch_size=batch_size, workers=workers, report=report)
    prefix = prefix_ids(wrappers, tokenizer)
    room = context_length(model.config) if prefix else 0
    refusals = {
        text: tuple(encode(tokenizer, [text], bos=bos)[0]) for text in {one.refusal for one in verdicts} if text
    }
    found = []
    for request, verdict in zip(requests, verdicts, strict=True):
        if verdict.refusal is not None:
            context = refusals[verdict.refusal]
        else:
            context = _in_front(prefix, request, tokenizer, bos, room) if prefix else request.context
        request = Request(context, request.continuation)
        found.append(Wrapped(request, verdict.statistic, verdict.refusal is not None))
    return found


def judged(
    wrappers: Sequence[WrapperModule],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    *,
    batch_size: int = 1,
    workers: Workers = ALONE,
    report: Report = silent,
) -> list[Verdict]:
    """What the filters among some wrappers make of each request; every distinct text is read once."""
    room = context_length(model.config)
    values: list[list[tuple[float, Wrapper]]] = [[] for _ in requests]
    for wrapper in (one for one in wrappers if one.is_filter):
        texts = [_read_by(wrapper.body, request)[-room:] for request in requests]
        distinct = list(dict.fromkeys(texts))
        found = statistics_of(
            wrapper, model, tokenizer, distinct, batch_size=batch_size, workers=workers, report=report
        )
        known = dict(zip(distinct, (v if math.isfinite(v) else LARGEST for v in found), strict=True))
        for own, text in zip(values, texts, strict=True):
            own.append((known[text], wrapper.body))
    return [
        Verdict(
            max(own, key=lambda one: one[0] - one[1].threshold)[0] if own else None,
            next((body.refusal for value, body in own if value > body.threshold), None),
        )
        for own in values
    ]


def prefix_ids(wrappers: Sequence[WrapperModule], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """All that is put in front of prompts, in the order of wrappers."""
    texts = [wrapper.body.text for wrapper in wrappers if not wrapper.is_filter]
    return tuple(token for ids in encode(tokenizer, texts, bos=None) for token in ids)


def prompt_with(
    wrappers: Sequence[WrapperModule], ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, bos: int | None
) -> list[int]:
    """A prompt with the prefixes after its BOS."""
    n_head = _n_head(ids, tokenizer, bos)
    return [*ids[:n_head], *prefix_ids(wrappers, tokenizer), *ids[n_head:]]


def refuses_prompt(
    wrappers: Sequence[WrapperModule], model: nn.Module, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]
) -> str | None:
    """The refusal that a prompt is answered with, or None; `ids` are what the user sent, without prefixes."""
    return judged(on_side(wrappers, "input"), model, tokenizer, [Request(tuple(ids), ())])[0].refusal


def refuses_answer(
    wrappers: Sequence[WrapperModule],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    answer: Sequence[int],
) -> str | None:
    """The refusal that takes the place of a whole answer, or None."""
    return judged(on_side(wrappers, "output"), model, tokenizer, [Request(tuple(ids), tuple(answer))])[0].refusal


def _read_by(body: Wrapper, request: Request) -> tuple[int, ...]:
    """What a filter reads of a request."""
    if body.side == "input":
        return request.context
    return request.continuation if body.rule == "keywords" else request.context + request.continuation


def _n_head(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, bos: int | None) -> int:
    """1 if a prompt begins with BOS, or with the token that stands for it where there is none."""
    return int(bool(ids) and ids[0] in {bos, *special_ids(tokenizer)})


def _in_front(
    prefix: tuple[int, ...], request: Request, tokenizer: PreTrainedTokenizerBase, bos: int | None, room: int
) -> tuple[int, ...]:
    """A context behind a prefix; where both are too long for the model, the context loses its beginning.

    Raises:
        DsgError: They would be too long without the context.
    """
    n_head = _n_head(request.context, tokenizer, bos)
    head, sent = request.context[:n_head], request.context[n_head:]
    n_left = room + 1 - len(head) - len(prefix) - len(request.continuation)
    if n_left < 0 or (n_left == 0 and sent):
        raise DsgError(
            f"The text in front of prompts has {len(prefix)} tokens; with a continuation of "
            f"{len(request.continuation)} it leaves no room in the {room} that the model reads.",
            "Make it shorter (methods.prompt.text, or fewer questions in methods.in_context).",
        )
    return (*head, *prefix, *sent[max(0, len(sent) - n_left) :])
