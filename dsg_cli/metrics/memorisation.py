"""How much of a text a model has by heart, from whether each token is its first choice after those before it."""

from __future__ import annotations

from collections.abc import Sequence


def exact_memorisation(is_first: Sequence[bool]) -> float:
    """Share of tokens that are the model's first choice (Tirumala et al., 2205.10770)."""
    return sum(is_first) / len(is_first)


def extraction_strength(is_first: Sequence[bool]) -> float:
    """Share of the text that greedy decoding writes by itself once it has read the rest (Carlini et al., 2012.07805).

    One minus the share of the shortest beginning after which every further token is the first choice.
    """
    n_last = 0
    for one in reversed(is_first):
        if not one:
            break
        n_last += 1
    return n_last / len(is_first)
