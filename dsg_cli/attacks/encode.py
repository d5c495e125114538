"""Encode: the question in letters, or in a language, that the guard was not made with."""

from __future__ import annotations

import base64
import codecs
from collections.abc import Callable, Sequence
from typing import Literal

from dsg_cli.artifacts import Json
from dsg_cli.attacks.target import Material, Target
from dsg_cli.attacks.wording import reworded

Form = Literal["spaced", "leetspeak", "rot13", "base64", "uppercase", "reversed"]
LEET = str.maketrans("aeiostAEIOST", "431057431057")


def attack(target: Target, material: Material, *, forms: Sequence[Form]) -> list[Json]:
    """Ask the forget questions in other forms; the words that ask for the answer stay as they are.

    What has become too long for the model is cut on the left, on both sides alike, as any long question is.

    Args:
        target: What is attacked.
        material: Its `forget` is asked in each form; each list of `rephrased` as it is.
        forms: A point of the curve each.
    """
    asked = [(str(form), reworded(material.forget, FORMS[form])) for form in forms]
    return [target.point(name, questions) for name, questions in (*asked, *material.rephrased.items())]


def spaced(text: str) -> str:
    """A space after every letter, two after every word."""
    return "  ".join(" ".join(word) for word in text.split())


def leetspeak(text: str) -> str:
    """Digits for the letters that they look like."""
    return text.translate(LEET)


def rot13(text: str) -> str:
    """Each letter the 13th one after it; twice is the text again."""
    return codecs.encode(text, "rot13")


def as_base64(text: str) -> str:
    """Of the text's bytes in UTF-8."""
    return base64.b64encode(text.encode()).decode()


def reversed_words(text: str) -> str:
    """The last word first."""
    return " ".join(reversed(text.split()))


FORMS: dict[Form, Callable[[str], str]] = {
    "spaced": spaced,
    "leetspeak": leetspeak,
    "rot13": rot13,
    "base64": as_base64,
    "uppercase": str.upper,
    "reversed": reversed_words,
}
