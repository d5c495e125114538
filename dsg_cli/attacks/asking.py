"""Accuracy and gate rate on questions, guarded and wrapped or not: what every attack measures at every point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedTokenizerBase

from dsg_cli.artifacts import Json
from dsg_cli.benches.tasks import Question
from dsg_cli.calibration import wilson
from dsg_cli.checkpoints import Checkpoint
from dsg_cli.guardrail import GuardrailModule, guarded, last_decisions
from dsg_cli.progress import Report, silent
from dsg_cli.scoring import Request, Score, encode_pair, score
from dsg_cli.tokens import TokenBatch, special_ids
from dsg_cli.workers import ALONE, Workers
from dsg_cli.wrapper import WrapperModule, has_filter, wrap

Change = Callable[[tuple[int, ...], int], tuple[int, ...]]
"""The context's token ids and the question's number -> the ids that are asked instead."""


def ask(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    guardrails: Sequence[GuardrailModule],
    bos: int | None,
    batch_size: int,
    max_length: int,
    change: Change | None = None,
    wrappers: Sequence[WrapperModule] = (),
    workers: Workers = ALONE,
    checkpoint: Checkpoint | None = None,
    name: str = "",
    report: Report = silent,
) -> Json:
    """`{"acc", "low", "high", "n", "gate_rate"}`: accuracy with its 95 % Wilson interval, of n questions; under a
    guardrail or behind a filter also the share of questions with a choice that was gated or refused.

    Wrappers act on what `change` has made of a question, and filters read the model without its guardrails.

    What has been asked is kept in the checkpoint under that name, by which progress is reported too.
    """
    requests = requests_of(tokenizer, questions, bos=bos, change=change)
    wrapped = wrap(wrappers, model, tokenizer, requests, batch_size=batch_size, bos=bos, workers=workers, report=report)

    def note(_batch: TokenBatch) -> list[bool]:
        return [is_gated for _, is_gated, _ in last_decisions(guardrails)]

    # Attacks change the model's weights; that it was the right one at first has been checked when it was loaded.
    with guarded(model, guardrails, allow_mismatch=True):
        scores = score(
            model,
            [one.request for one in wrapped],
            pad=tokenizer.pad_token_id or 0,
            special=special_ids(tokenizer),
            batch_size=batch_size,
            max_length=max_length,
            device=str(next(model.parameters()).device),
            note=note if guardrails else None,
            workers=workers,
            checkpoint=checkpoint,
            what=f"asking {name}",
            name=name,
            report=report,
        )
    decided = [bool(found.note) or one.is_refused for found, one in zip(scores, wrapped, strict=True)]
    found = outcomes(questions, scores, decided)
    right, n_gated = sum(one.is_right for one in found), sum(one.is_gated for one in found)
    low, high = wilson(right, len(questions))
    measured: Json = {"acc": right / len(questions), "low": low, "high": high, "n": len(questions)}
    return measured | ({"gate_rate": n_gated / len(questions)} if guardrails or has_filter(wrappers) else {})


class Outcome(NamedTuple):
    """What came of one question."""

    is_right: bool
    is_gated: bool
    """One of its choices was gated or refused."""


def requests_of(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], *, bos: int | None, change: Change | None = None
) -> list[Request]:
    """A request for each choice of each question, in their order; arguments as for `ask`."""
    requests: list[Request] = []
    for number, question in enumerate(questions):
        for choice in question.choices:
            request = encode_pair(tokenizer, question.context, choice, bos=bos)
            context = change(request.context, number) if change is not None else request.context
            requests.append(Request(context, request.continuation))
    return requests


def outcomes(questions: Sequence[Question], scores: Sequence[Score], decided: Sequence[bool]) -> list[Outcome]:
    """What came of each question, from the scores of its choices and whether each was gated or refused."""
    found: list[Outcome] = []
    start = 0
    for question in questions:
        own = slice(start, start + len(question.choices))
        values = [one.loglikelihood for one in scores[own]]
        found.append(Outcome(values.index(max(values)) == question.answer, any(decided[own])))
        start += len(question.choices)
    return found


def chance_of(questions: Sequence[Question]) -> float:
    """Accuracy without any knowledge; of four choices where there is no question."""
    sizes = [len(question.choices) for question in questions] or [4]
    return sum(1 / n for n in sizes) / len(sizes)
