"""Gate statistics of held-out retain text to a threshold with its guarantee."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import NormalDist

import torch

from dsg_cli.errors import DsgError


def cut_pieces(row: list[int], rng: random.Random, *, lengths: Sequence[int], n_head: int) -> list[list[int]]:
    """Cut a document into consecutive pieces of random lengths.

    A threshold holds for texts of the lengths it was set on: rows of 1024 tokens say little about a question of 30.

    Args:
        row: Token ids of a document.
        rng: Where lengths come from.
        lengths: Of pieces, `n_head` not counted, each as likely as the others; a rest shorter than all is dropped.
        n_head: Leading tokens (BOS) that every piece repeats.
    """
    head, body = row[:n_head], row[n_head:]
    pieces, start, shortest = [], 0, min(lengths)
    while len(body) - start >= shortest:
        length = rng.choice(lengths)
        pieces.append(head + body[start : start + length])
        start += length
    return pieces


def percentile_threshold(statistics: Sequence[float], alpha: float) -> float:
    """The plain (1 - alpha)-quantile, interpolated, as the paper takes it: it promises nothing where n is small."""
    if not statistics:
        raise DsgError("There is no piece of retain text to set a threshold on.", "Give more retain text.")
    return float(torch.quantile(torch.tensor(sorted(statistics), dtype=torch.float64), 1 - alpha))


def conformal_threshold(statistics: Sequence[float], alpha: float, *, what: str = "retain text") -> float:
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
            f"{n} pieces of {what} cannot set a threshold at alpha {alpha:g}; "
            f"at least {pieces_needed(alpha)} are needed.",
            "Give more of it, a larger --alpha, or take all retain text together (--set calibrate.guarantee=pooled).",
        )
    return sorted(statistics)[rank - 1]


def threshold_of(
    statistics: Sequence[tuple[str, float]], alpha: float, *, is_each: bool, is_conformal: bool = True
) -> float:
    """A threshold from the statistics of several corpora.

    Args:
        statistics: Corpus and statistic of each piece.
        alpha: Rate of false positives.
        is_each: Whether the rate is to hold for each corpus, which takes the largest of their thresholds, or for all
            pieces together, where text near the forgotten domain may have most of the false positives.
        is_conformal: With the guarantee, or the plain percentile.

    Raises:
        DsgError: alpha out of range, or too few pieces.
    """
    groups: dict[str, list[float]] = {} if statistics else {"retain text": []}
    for corpus, value in statistics:
        groups.setdefault(corpus if is_each else "retain text", []).append(value)
    if not is_conformal:
        return max(percentile_threshold(values, alpha) for values in groups.values())
    return max(
        conformal_threshold(values, alpha, what=name) for name, values in groups.items() or [("retain text", [])]
    )


def rate_above(threshold: float, statistics: Sequence[float]) -> dict[str, float]:
    """`{n, rate, low, high}`: share of statistics above a threshold, with its exact 95 % interval."""
    n_above = sum(value > threshold for value in statistics)
    low, high = clopper_pearson(n_above, len(statistics))
    return {"n": len(statistics), "rate": n_above / max(len(statistics), 1), "low": low, "high": high}


def pieces_needed(alpha: float) -> int:
    """The fewest pieces that can set a threshold."""
    return math.ceil(round(1 / alpha, 9)) - 1


def clopper_pearson(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact confidence interval of a rate of k in n; (0, 1) if n is 0."""
    from scipy.special import betaincinv  # Of scipy.stats's binomtest the same, which takes half a second to import.

    tail = (1 - confidence) / 2
    low = float(betaincinv(k, n - k + 1, tail)) if k > 0 else 0.0
    high = float(betaincinv(k + 1, n - k, 1 - tail)) if k < n else 1.0
    return low, high


def wilson(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a rate of k in n; (0, 1) if n is 0."""
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate, shrink = k / n, 1 + z * z / n
    middle = (rate + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return (0.0 if k == 0 else middle - half), (1.0 if k == n else middle + half)
