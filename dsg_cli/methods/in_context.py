"""Show the model questions with their answers first: wrong ones on what it is to forget (2310.07579)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from dsg_cli.attacks.few_shot import separator
from dsg_cli.benches.tasks import Question
from dsg_cli.errors import DsgError
from dsg_cli.methods.settings import InContext
from dsg_cli.methods.wrapping import Made, Material, prefix


def make(settings: InContext, material: Material) -> Made:
    """Questions drawn with the seed, each with a choice, in an order that the seed decides.

    Raises:
        DsgError: There are fewer questions than are to be shown, or one has a single choice.
    """
    rng = random.Random(material.seed)
    tokenizer = material.loaded.tokenizer
    shown = [_wrong(question, rng) for question in _drawn([material.forget_questions], settings.n_forget, rng)]
    shown += [
        question.context + question.choices[question.answer]
        for question in _drawn(material.retain_questions, settings.n_retain, rng)
    ]
    rng.shuffle(shown)
    return prefix("in-context", separator(tokenizer).join(shown), material)


def _drawn(benches: Sequence[Sequence[Question]], n: int, rng: random.Random) -> list[Question]:
    """So many questions, of each bench in turn."""
    shuffled = [rng.sample(list(bench), len(bench)) for bench in benches]
    found: list[Question] = []
    while len(found) < n and any(shuffled):
        found += [bench.pop() for bench in shuffled if bench]
    if len(found) < n:
        raise DsgError(
            f"{n} questions are to be shown, and the benches have {len(found)}.",
            "Lower methods.in_context.n_forget or n_retain, or name other benches.",
        )
    return found[:n]


def _wrong(question: Question, rng: random.Random) -> str:
    wrong = [choice for i, choice in enumerate(question.choices) if i != question.answer]
    if not wrong:
        raise DsgError("A question of the forget bench has a single choice, which is right.", "Name another bench.")
    return question.context + rng.choice(wrong)
