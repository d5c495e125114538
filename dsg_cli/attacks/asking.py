"""Accuracy and gate rate on questions, guarded and wrapped or not: what every attack measures at every point."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from dsg_cli.artifacts import Json
from dsg_cli.benches.tasks import Question
from dsg_cli.calibration import wilson
from dsg_cli.checkpoints import Checkpoint
from dsg_cli.guardrail import GuardrailModule, guarded, last_decisions
from dsg_cli.progress import Report, silent
from dsg_cli.scoring import Request, encode_pair, score
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
    requests: list[Request] = []
    for number, question in enumerate(questions):
        for choice in question.choices:
            request = encode_pair(tokenizer, question.context, choice, bos=bos)
            context = change(request.context, number) if change is not None else request.context
            requests.append(Request(context, request.continuation))

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
    right, n_gated, start = 0, 0, 0
    for question in questions:
        own = slice(start, start + len(question.choices))
        found = scores[own]
        values = [one.loglikelihood for one in found]
        right += values.index(max(values)) == question.answer
        n_gated += any(one.note for one in found) or any(one.is_refused for one in wrapped[own])
        start += len(question.choices)
    low, high = wilson(right, len(questions))
    measured: Json = {"acc": right / len(questions), "low": low, "high": high, "n": len(questions)}
    return measured | ({"gate_rate": n_gated / len(questions)} if guardrails or has_filter(wrappers) else {})
