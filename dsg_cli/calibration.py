"""Gate statistics of held-out retain text to a threshold with its guarantee."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from dsg_cli.errors import DsgError


def cut_pieces(row: list[int], rng: random.Random, *, shortest: int, longest: int, n_head: int) -> list[list[int]]:
    """Cut a document into consecutive pieces of random lengths.

    A threshold holds for texts of the lengths it was set on: rows of 1024 tokens say little about a question of 30.

    Args:
        row: Token ids of a document.
        rng: Where lengths come from.
        shortest: Fewest tokens of a piece, `n_head` not counted; a shorter rest is dropped.
        longest: Most tokens of a piece.
        n_head: Leading tokens (BOS) that every piece repeats.
    """
    head, body = row[:n_head], row[n_head:]
    pieces, start = [], 0
    while len(body) - start >= shortest:
        length = rng.randint(shortest, longest)
        pieces.append(head + body[start : start + length])
        start += length
    return pieces


def conformal_threshold(statistics: Sequence[float], alpha: float) -> float:
    """The smallest threshold that a further statistic, drawn like these, exceeds with probability at most `alpha`.

    The ceil((n + 1)(1 - alpha))-th smallest of n (split conformal prediction), whatever their distribution; the plain
    percentile promises this only for large n. It assumes that statistics are exchangeable: where many pieces come
    from few documents, it holds for further pieces of such documents and less surely for new ones.

    Raises:
        DsgError: alpha out of range, or fewer than 1/alpha - 1 statistics.
    """
    if not 0 < alpha < 1:
        raise DsgError(f"alpha is {alpha:g}; it must lie between 0 and 1.")
    n = len(statistics)
    # The product is rounded first: in floating point (n + 1)(1 - alpha) may exceed an integer by an ulp.
    rank = math.ceil(round((n + 1) * (1 - alpha), 9))
    if rank > n:
        raise DsgError(
            f"{n} pieces of retain text cannot set a threshold at alpha {alpha:g}; "
            f"at least {math.ceil(1 / alpha) - 1} are needed.",
            "Give more retain text, or a larger --alpha.",
        )
    return sorted(statistics)[rank - 1]


def clopper_pearson(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact confidence interval of a rate of k in n; (0, 1) if n is 0."""
    from scipy.stats import binomtest

    if n == 0:
        return 0.0, 1.0
    interval = binomtest(k, n).proportion_ci(confidence, method="exact")
    return float(interval.low), float(interval.high)


def wilson(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a rate of k in n; (0, 1) if n is 0."""
    from scipy.stats import binomtest

    if n == 0:
        return 0.0, 1.0
    interval = binomtest(k, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)
