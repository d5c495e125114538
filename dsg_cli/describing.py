"""Descriptions of features from the text on which they are strongest: the words that are characteristic of it.

For SAEs that nobody has described, and without a network. Of each feature its N strongest contexts are read
(contexts.py). With p_n the peak of context n and p_1 the largest, a word in it weighs

    a / p_n                     by its own activation a, the largest of its tokens', so that a peak weighs 1
    s + (1 - s) a / p_n         with s = 0.25 up to the peak: what stands before it may be what it answers to

and as often as it stands there, the largest counts. Over contexts this is the frequency of the word for the feature,
`tf = sum_n p_n weight_n / sum_n p_n`, from 0 to 1; over features its rarity is `log((1 + C) / (1 + sum_j tf_j))` with C
features described. The score of a word is the product. A description has the words with at least a quarter of the best
word's score, the best first, at most ten: a feature that answers to one word is described by little else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from dsg_cli.contexts import BEFORE, NOTHING, Contexts
from dsg_cli.keywords import words_of
from dsg_cli.progress import Report, silent
from dsg_cli.ranking import STOP_WORDS

BEFORE_PEAK = 0.25
"""Weight of a word before the peak on which the feature is not active."""
SHARE_OF_BEST = 0.25
N_WORDS = 10


@dataclass(frozen=True)
class Description:
    """What a feature is about."""

    index: int
    description: str
    n: int
    """Tokens on which it is active."""
    rate: float
    """Their share of all counted tokens."""


def describe_features(
    contexts: Contexts, tokenizer: PreTrainedTokenizerBase, *, report: Report = silent
) -> list[Description]:
    """A description of every feature that fired on a word.

    Args:
        contexts: Of all features, feature 0 first.
        tokenizer: The model's.
        report: Progress.
    """
    n_features = len(contexts.rate_C)
    frequency: dict[int, dict[str, float]] = {}
    for j in range(n_features):
        if contexts.row_CN[j, 0] != NOTHING and (words := _frequencies(contexts, j, tokenizer)):
            frequency[j] = words
        report("describing features", j + 1, n_features)
    total: dict[str, float] = {}
    for words in frequency.values():
        for word, tf in words.items():
            total[word] = total.get(word, 0.0) + tf
    rarity = {word: math.log((1 + len(frequency)) / (1 + several)) for word, several in total.items()}
    return [
        Description(
            index=j,
            description=", ".join(_best({word: tf * rarity[word] for word, tf in words.items()})),
            n=round(float(contexts.rate_C[j]) * contexts.n_tokens),
            rate=float(contexts.rate_C[j]),
        )
        for j, words in frequency.items()
    ]


def _frequencies(contexts: Contexts, j: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Word -> tf, for one feature."""
    found: dict[str, float] = {}
    peaks = contexts.peak_CN[j].abs().tolist()
    for n, peak in enumerate(peaks):
        if not peak:
            break
        ids, acts = contexts.ids_CNW[j, n].tolist(), contexts.acts_CNW[j, n].abs().tolist()
        weights: dict[str, float] = {}
        for word, act, is_before in _words(ids, acts, tokenizer):
            least = BEFORE_PEAK if is_before else 0.0
            weights[word] = max(weights.get(word, 0.0), least + (1 - least) * act / peak)
        for word, weight in weights.items():
            if weight:
                found[word] = found.get(word, 0.0) + weight * peak / sum(peaks)
    return found


def _words(ids: list[int], acts: list[float], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, float, bool]]:
    """The words of a context, each with the largest activation of its tokens and whether it begins before the peak.

    A tokenizer's pieces are put together to what stands between white space.
    """
    places = [place for place, token in enumerate(ids) if token != NOTHING]
    runs: list[tuple[str, float, bool]] = []
    before, held = "", 0.0
    for number, place in enumerate(places, start=1):
        text = tokenizer.decode([ids[one] for one in places[:number]], skip_special_tokens=True)
        held = max(held, acts[place])
        if text.endswith("\ufffd") and number < len(places):
            continue  # Part of a character, whose other parts follow.
        piece, joins = text[len(before) :], bool(before) and not before[-1].isspace()
        if runs and joins and not piece[:1].isspace():
            run, act, is_before = runs[-1]
            runs[-1] = (run + piece, max(act, held), is_before)
        else:
            runs.append((piece, held, place <= BEFORE))
        before, held = text, 0.0
    for run, act, is_before in runs:
        for word in words_of(run):
            if word not in STOP_WORDS and any(map(str.isalpha, word)):
                yield word, act, is_before


def _best(scores: dict[str, float]) -> list[str]:
    order = sorted(scores, key=lambda word: (-scores[word], word))
    return [word for word in order[:N_WORDS] if scores[word] >= SHARE_OF_BEST * scores[order[0]]]
