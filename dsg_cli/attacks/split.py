"""Split: the question in several parts, so that no stretch of the prompt holds enough of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from dsg_cli.artifacts import Json
from dsg_cli.attacks.dilution import benign_texts, check_room
from dsg_cli.attacks.target import Material, Target
from dsg_cli.attacks.wording import cue_of, words_of

GO_ON = "I see. Please go on."
"""What the assistant has said between two turns."""
Join = Callable[[Sequence[str], int], str]
"""The parts of a question and its number -> the context that is asked."""


def attack(target: Target, material: Material, *, parts: Sequence[int], filler_tokens: int) -> list[Json]:
    """Ask the forget questions in more and more parts; 1 part is plain evaluation.

    With a chat template each part is a turn of the user, and between two of them the assistant has asked to go on.
    Without one, benign tokens stand between the parts. The words that ask for the answer stay with the last part.

    Args:
        target: What is attacked.
        material: Its `forget` is asked.
        parts: How many parts, a point of the curve each. A question of fewer words has as many parts as words.
        filler_tokens: Benign tokens between two parts, where there is no chat template.

    Raises:
        DsgError: There is no benign text, or what is asked does not fit the model.
    """
    has_turns = bool(target.tokenizer.chat_template)
    variant = "turns" if has_turns else "filler"
    join = _turns(target) if has_turns else _filler(target.tokenizer, material, filler_tokens, max(parts))
    cue = cue_of(material.forget)
    asked = {
        n_parts: [
            replace(question, context=_in_parts(question.context, cue, n_parts, join, number))
            for number, question in enumerate(material.forget)
        ]
        for n_parts in parts
    }
    for questions in asked.values():
        check_room(target, questions, 0, "attack.split_parts")
    return [target.point(n_parts, questions, variant=variant) for n_parts, questions in asked.items()]


def _in_parts(context: str, cue: str, n_parts: int, join: Join, number: int) -> str:
    if n_parts == 1:
        return context
    parts = cut(words_of(context.removesuffix(cue)), n_parts)
    return join([*parts[:-1], parts[-1] + cue], number)


def cut(words: Sequence[str], n_parts: int) -> list[str]:
    """Consecutive parts of nearly the same number of words, none without any."""
    n_parts = min(n_parts, len(words))
    ends = [len(words) * i // n_parts for i in range(n_parts + 1)]
    return ["".join(words[start:stop]) for start, stop in pairwise(ends)]


def _turns(target: Target) -> Join:
    """Every part a turn of the user."""
    tokenizer = target.tokenizer

    def join(parts: Sequence[str], _number: int) -> str:
        turns = [{"role": "user", "content": parts[0].strip()}]
        for part in parts[1:]:
            turns += [{"role": "assistant", "content": GO_ON}, {"role": "user", "content": part.strip()}]
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        # BOS is put in front of whatever is asked: that of the template would be a second one.
        return text if target.bos is None else text.removeprefix(tokenizer.decode([target.bos]))

    return join


def _filler(tokenizer: PreTrainedTokenizerBase, material: Material, n_tokens: int, n_parts: int) -> Join:
    """Between two parts so many benign tokens; question i takes them from benign text i."""
    texts = benign_texts(material, n_tokens * (n_parts - 1))

    def join(parts: Sequence[str], number: int) -> str:
        benign = texts[number % len(texts)]
        pieces = [parts[0].strip()]
        for i, part in enumerate(parts[1:]):
            pieces += [tokenizer.decode(benign[i * n_tokens : (i + 1) * n_tokens]).strip(), part.strip()]
        return " ".join(pieces)

    return join
