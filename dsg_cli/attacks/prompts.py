"""Dilution: harmless text around a question lowers the share of hot tokens until the gate stays shut."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, get_args

from dsg_cli.artifacts import Json
from dsg_cli.attacks.asking import Change
from dsg_cli.attacks.target import Material, Target
from dsg_cli.benches.tasks import Question
from dsg_cli.errors import DsgError
from dsg_cli.scoring import encode_pair

Place = Literal["before", "after", "around"]
PLACES: tuple[Place, ...] = get_args(Place)


def attack(target: Target, material: Material, *, lengths: Sequence[int], places: Sequence[Place]) -> list[Json]:
    """Ask the forget questions among more and more benign tokens; length 0 is plain evaluation.

    Args:
        target: What is attacked.
        material: Its `forget` is asked; question i is put among the tokens of benign text i.
        lengths: How many benign tokens are added, a point of the curve each.
        places: `before` the question, `after` it (before the words with which every question ends, such as
            `Answer:`), or half of them at either place: a variant each.

    Raises:
        DsgError: There is no benign text, or the longest dilution does not fit the model.
    """
    check_room(target, material.forget, max(lengths), "attack.dilution_lengths")
    usable = benign_texts(material, max(lengths))
    n_cue = cue_length(target, material.forget)
    curve: list[Json] = []
    for place in places:
        for length in lengths:
            if length == 0 and place != places[0]:
                curve.append({**curve[0], "variant": place})
                continue
            change = _insert(target.bos, usable, length, place, n_cue)
            curve.append(target.point(length, material.forget, variant=place, change=change))
    return curve


def _insert(bos: int | None, texts: Sequence[list[int]], length: int, place: Place, n_cue: int) -> Change:
    """Benign tokens around the token ids of a context."""
    n_before = {"before": length, "after": 0, "around": length // 2}[place]

    def change(context: tuple[int, ...], number: int) -> tuple[int, ...]:
        n_head = int(bos is not None and context[:1] == (bos,))
        benign = texts[number % len(texts)][:length]
        cut = len(context) - n_cue
        return (*context[:n_head], *benign[:n_before], *context[n_head:cut], *benign[n_before:], *context[cut:])

    return change


def cue_length(target: Target, questions: Sequence[Question]) -> int:
    """Tokens with which every context ends: what tells the model to answer now."""
    tails = [contexts[::-1] for contexts in _contexts(target, questions)]
    shortest = min(map(len, tails)) - 1
    return next((i for i in range(shortest) if len({tail[i] for tail in tails}) > 1), shortest)


def benign_texts(material: Material, length: int) -> list[list[int]]:
    """Texts of at least so many benign tokens: documents that are long enough by themselves.

    Where there is none, each document is followed by the next ones, and after the last by the first again.

    Raises:
        DsgError: There is no benign text at all.
    """
    documents = [text for text in material.benign if text]
    if not documents:
        raise DsgError("There is no benign text to put around questions.", "Retain a larger corpus.")
    return [text for text in documents if len(text) >= length] or [
        _joined([*documents[i:], *documents[:i]], length) for i in range(len(documents))
    ]


def _joined(documents: Sequence[list[int]], length: int) -> list[int]:
    """Documents in a row, from the start again where they end, until there are so many tokens."""
    joined: list[int] = []
    for document in itertools.cycle(documents):
        joined += document
        if len(joined) >= length:
            break
    return joined[:length]


def check_room(target: Target, questions: Sequence[Question], n_more: int, setting: str) -> None:
    """Refuse to make questions longer than the model can read.

    Args:
        target: What is asked.
        questions: As they would be asked, but for `n_more` further tokens.
        n_more: Tokens.
        setting: What made them so long.

    Raises:
        DsgError: One would be.
    """
    pairs = [
        encode_pair(target.tokenizer, q.context, choice, bos=target.bos) for q in questions for choice in q.choices
    ]
    n_asked = n_more + max(len(pair.context) + len(pair.continuation) - 1 for pair in pairs)
    if n_asked > target.max_length:
        raise DsgError(
            f"A question with what is put around it has {n_asked} tokens; the model reads {target.max_length}.",
            f"Lower {setting}.",
        )


def _contexts(target: Target, questions: Sequence[Question]) -> list[tuple[int, ...]]:
    return [encode_pair(target.tokenizer, q.context, q.choices[0], bos=target.bos).context for q in questions]
