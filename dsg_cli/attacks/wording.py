"""Questions in other words: what stays as it is are their choices, and the words that ask for the answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from dsg_cli.benches.tasks import Question

WORD = re.compile(r"\s*\S+|\s+$")
"""A word with the white space in front of it; what ends a text may be white space alone."""


def words_of(text: str) -> list[str]:
    """The words of a text; joined, they are the text again."""
    return WORD.findall(text)


def cue_of(questions: Sequence[Question]) -> str:
    """The words with which every context ends, such as `Answer:`, with the white space before them.

    They tell the model to answer now. Of each context at least one word is left. Where all contexts are the same,
    the cue is their last word.
    """
    contexts = sorted({question.context for question in questions})
    tails = [words_of(context)[::-1] for context in contexts]
    n_cue, at_most = 0, min(map(len, tails)) - 1
    if len(contexts) == 1:
        at_most = min(at_most, 1)
    while n_cue < at_most and len({tail[n_cue] for tail in tails}) == 1:
        n_cue += 1
    return "".join(reversed(tails[0][:n_cue]))


def reworded(questions: Sequence[Question], change: Callable[[str], str]) -> list[Question]:
    """The questions with other words before the cue: `change` makes them from those that stood there."""
    cue = cue_of(questions)
    return [replace(question, context=change(question.context.removesuffix(cue)) + cue) for question in questions]
