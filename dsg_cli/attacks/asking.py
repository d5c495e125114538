"""Accuracy and gate rate on a list of questions, guarded or not: what every attack measures at every point."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from dsg_cli.artifacts import Json
from dsg_cli.benches.tasks import Question
from dsg_cli.guardrail import GuardrailModule, guarded
from dsg_cli.scoring import Request, encode_pair, score
from dsg_cli.tokens import TokenBatch, special_ids

Change = Callable[[tuple[int, ...], int], tuple[int, ...]]
"""The context's token ids and the question's number -> the ids that are asked instead."""


def ask(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    guardrail: GuardrailModule | None,
    batch_size: int,
    max_length: int,
    change: Change | None = None,
) -> Json:
    """`{"acc": ..., "gate_rate": ...}`; the gate rate only under a guardrail, over inputs."""
    requests: list[Request] = []
    for number, question in enumerate(questions):
        for choice in question.choices:
            request = encode_pair(tokenizer, question.context, choice)
            context = change(request.context, number) if change is not None else request.context
            requests.append(Request(context, request.continuation))
    gated: list[torch.Tensor] = []

    def note(_batch: TokenBatch) -> None:
        if guardrail is not None and guardrail.last_gated_B is not None:
            gated.append(guardrail.last_gated_B)

    with guarded(model, guardrail) if guardrail is not None else contextlib.nullcontext():
        scores = score(
            model,
            requests,
            pad=tokenizer.pad_token_id or 0,
            special=special_ids(tokenizer),
            batch_size=batch_size,
            max_length=max_length,
            device=str(next(model.parameters()).device),
            after_batch=note,
        )
    right, start = 0, 0
    for question in questions:
        values = [found.loglikelihood for found in scores[start : start + len(question.choices)]]
        right += values.index(max(values)) == question.answer
        start += len(question.choices)
    measured: Json = {"acc": right / len(questions)}
    if gated:
        measured["gate_rate"] = float(torch.cat(gated).float().mean())
    return measured
