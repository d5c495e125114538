"""Words in a text: how many of some keywords it holds, and which words tell one text from another.

A word is a run of letters, digits and underscores with their marks, in one case and one Unicode form. Scripts that put
no spaces between words have long runs; a keyword is found there only as a run of its own. All of it takes time in
proportion to the text, whatever the text is.
"""

from __future__ import annotations

import functools
import math
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dsg_cli.documents import text_of
from dsg_cli.errors import DsgError

Phrase = tuple[str, ...]
"""The words of a keyword."""
MARKS_AT_MOST = 30
"""On one letter: putting an endless run of them in order takes the square of its length."""
ASCII_WORD = re.compile(r"\w+", re.ASCII)
FIRST_PLANE = 0xFFFF
PRIOR_WORDS = 1000.0
"""Of both texts together, which each of them is taken to have held before it is read."""


def words_of(text: str) -> list[str]:
    """The words of a text, in order."""
    if text.isascii():
        return ASCII_WORD.findall(text.lower())
    # A class of characters that reaches beyond the first plane takes a hundred times longer to look through.
    words, marks, invisible = _patterns(FIRST_PLANE if max(text) <= chr(FIRST_PLANE) else sys.maxunicode)
    text = marks.sub(lambda run: run[0][:MARKS_AT_MOST], text.translate(invisible))
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return words.findall(text)


@functools.cache
def _patterns(last: int) -> tuple[re.Pattern[str], re.Pattern[str], dict[int, None]]:
    """Of a word, of too many marks, and the characters that are not seen, such as a soft hyphen; all up to a last."""
    kinds: dict[str, list[str]] = {"M": [], "Cf": []}
    for character in map(chr, range(last + 1)):
        category = unicodedata.category(character)
        for kind, several in kinds.items():
            if category.startswith(kind):
                several.append(character)
    marks = "".join(kinds["M"])
    return (
        re.compile(rf"[\w{marks}]+"),
        re.compile(rf"[{marks}]{{{MARKS_AT_MOST},}}"),
        dict.fromkeys(map(ord, kinds["Cf"])),
    )


def phrases_of(keywords: Iterable[str]) -> frozenset[Phrase]:
    """Keywords as they are looked for; one may have several words."""
    return frozenset(phrase for phrase in (tuple(words_of(keyword)) for keyword in keywords) if phrase)


def n_found(text: str, phrases: frozenset[Phrase]) -> int:
    """How many different keywords a text holds, as whole words."""
    words = words_of(text)
    return sum(
        len(phrases.intersection(zip(*(words[i:] for i in range(length)), strict=False)))
        for length in {len(phrase) for phrase in phrases}
    )


def telling_words(forget: Iterable[str], retain: Iterable[str], n: int) -> list[str]:
    """The n words that most surely are more frequent in forget texts than in retain texts, the surest first.

    Raises:
        DsgError: No word is.
    """
    counts = [Counter(word for text in texts for word in words_of(text)) for texts in (forget, retain)]
    scores = log_odds(*counts)
    found = sorted((word for word, score in scores.items() if score > 0), key=lambda word: (-scores[word], word))
    if not found:
        raise DsgError("No word is more frequent in the forget text than in the retain text.", "Check both corpora.")
    return found[:n]


def log_odds(forget: Mapping[str, int], retain: Mapping[str, int]) -> dict[str, float]:
    """The log-odds ratio of each word between two texts, in units of its standard deviation.

    With y counts, n their sum and a prior of A words spread as both texts together, a = A (y_f + y_r) / (n_f + n_r):

        d = log (y_f + a) / (n_f + A - y_f - a)  -  log (y_r + a) / (n_r + A - y_r - a)
        z = d / sqrt(1 / (y_f + a) + 1 / (y_r + a))

    (Monroe, Colaresi and Quinn 2008, informative Dirichlet prior.) A word alone in both texts has 0.
    """
    n_forget, n_retain = sum(forget.values()), sum(retain.values())
    scores = {}
    for word in forget.keys() | retain.keys():
        y_forget, y_retain = forget.get(word, 0), retain.get(word, 0)
        prior = PRIOR_WORDS * (y_forget + y_retain) / (n_forget + n_retain)
        rest = [n + PRIOR_WORDS - y - prior for n, y in ((n_forget, y_forget), (n_retain, y_retain))]
        if min(rest) <= 0:
            scores[word] = 0.0
            continue
        ratio = math.log((y_forget + prior) / rest[0]) - math.log((y_retain + prior) / rest[1])
        scores[word] = ratio / math.sqrt(1 / (y_forget + prior) + 1 / (y_retain + prior))
    return scores


def read_keywords(path: str) -> list[str]:
    """Keywords from a file, one a line; empty lines do not count.

    Raises:
        DsgError: It cannot be read, is empty, or a line holds no word.
    """
    lines = [line.strip() for line in text_of(Path(path)).split("\n")]
    found: Sequence[str] = list(dict.fromkeys(line for line in lines if line))
    if not found:
        raise DsgError(f"{path} holds no keyword.", "Write one a line.")
    for keyword in found:
        if not words_of(keyword):
            raise DsgError(f"{path}: {keyword[:100]!r} holds no word.", "A keyword has letters or digits.")
    return list(found)
