"""Dilution: harmless text in front of a question lowers the share of hot tokens until the gate stays shut."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from dsg_cli.artifacts import Json
from dsg_cli.attacks.asking import ask
from dsg_cli.benches.tasks import Question
from dsg_cli.checkpoints import Checkpoint
from dsg_cli.errors import DsgError
from dsg_cli.guardrail import GuardrailModule
from dsg_cli.progress import Report, silent
from dsg_cli.scoring import encode_pair
from dsg_cli.workers import ALONE, Workers

THREAT_MODEL = "Someone who may send prompts to the guarded model, and knows no more."


def dilute(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    guardrails: Sequence[GuardrailModule],
    questions: Sequence[Question],
    benign: Sequence[list[int]],
    lengths: Sequence[int],
    *,
    bos: int | None,
    batch_size: int,
    max_length: int,
    workers: Workers = ALONE,
    checkpoint: Checkpoint | None = None,
    report: Report = silent,
) -> list[Json]:
    """Ask the forget questions after more and more benign tokens; length 0 is plain evaluation.

    Args:
        model: The model, unguarded.
        tokenizer: Its tokenizer.
        guardrails: What guards it.
        questions: On the forgotten knowledge.
        benign: Token ids, without BOS, of texts on something else; question i is put behind text i.
        lengths: How many tokens are put in front, a point of the curve each.
        bos: Token that every sequence begins with.
        batch_size: Sequences in a batch.
        max_length: Tokens the model can read.
        workers: Who asks; each gets the whole curve.
        checkpoint: Where asking goes on from, and is kept.
        report: Progress.

    Raises:
        DsgError: The benign texts are too short for the longest dilution, or it does not fit the model.
    """
    longest = max(lengths)
    usable = [text for text in benign if len(text) >= longest]
    if not usable:
        raise DsgError(
            f"No benign text has {longest} tokens; the longest has {max(map(len, benign), default=0)}.",
            "Lower attack.dilution_lengths.",
        )
    pairs = [encode_pair(tokenizer, q.context, choice, bos=bos) for q in questions for choice in q.choices]
    n_asked = max(len(pair.context) + len(pair.continuation) - 1 for pair in pairs)
    if longest + n_asked > max_length:
        raise DsgError(
            f"{longest} benign tokens and a question of {n_asked} do not fit in the {max_length} that the model reads.",
            "Lower attack.dilution_lengths.",
        )
    curve = []
    for length in lengths:

        def change(context: tuple[int, ...], number: int, length: int = length) -> tuple[int, ...]:
            n_head = int(bos is not None and context[:1] == (bos,))
            prefix = usable[number % len(usable)][:length]
            return (*context[:n_head], *prefix, *context[n_head:])

        point: Json = {"x": length}
        for side, guards in (("guarded", guardrails), ("unguarded", ())):
            found = ask(
                model,
                tokenizer,
                questions,
                guardrails=guards,
                bos=bos,
                batch_size=batch_size,
                max_length=max_length,
                change=change,
                workers=workers,
                checkpoint=checkpoint,
                name=f"{side}/{length}",
                report=report,
            )
            point[side] = {f"forget_{key}" if key == "acc" else key: value for key, value in found.items()}
        curve.append(point)
    return curve
