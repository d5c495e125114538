"""Few-shot: relearning in context, from other questions on the forgotten knowledge with their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from dsg_cli.artifacts import Json
from dsg_cli.attacks.dilution import check_room
from dsg_cli.attacks.target import Material, Target


def attack(target: Target, material: Material, *, counts: Sequence[int]) -> list[Json]:
    """Ask the forget questions after more and more examples; 0 examples is plain evaluation.

    Args:
        target: What is attacked.
        material: Its `forget` is asked after the first questions of `known` with their right answers; those must be
            as many as the largest count.
        counts: How many examples, a point of the curve each.

    Raises:
        DsgError: So many examples do not fit the model.
    """
    between = separator(target.tokenizer)
    examples = [question.context + question.choices[question.answer] + between for question in material.known]
    asked = {
        count: [replace(question, context="".join(examples[:count]) + question.context) for question in material.forget]
        for count in counts
    }
    check_room(target, asked[max(counts)], 0, "attack.few_shot_counts")
    return [target.point(count, questions) for count, questions in asked.items()]


def separator(tokenizer: PreTrainedTokenizerBase) -> str:
    """A blank line, or a space where the tokenizer does not know line ends."""
    ids = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    return " " if tokenizer.unk_token_id in ids else "\n\n"
