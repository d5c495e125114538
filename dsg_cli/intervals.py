"""Confidence intervals of shares, medians and areas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist


def rate_above(threshold: float, statistics: Sequence[float]) -> dict[str, float]:
    """`{n, rate, low, high}`: share of statistics above a threshold, with its exact 95 % interval."""
    n_above = sum(value > threshold for value in statistics)
    low, high = clopper_pearson(n_above, len(statistics))
    return {"n": len(statistics), "rate": n_above / max(len(statistics), 1), "low": low, "high": high}


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


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % interval of the median: the narrowest pair of order statistics, alike from both ends, that has it.

    Of fewer than six values no pair has; it is then the smallest and the largest.
    """
    from scipy.stats import binom

    ordered, n = sorted(values), len(values)
    k = 0
    while 2 * (k + 2) <= n and 2 * binom.cdf(k + 1, n, 0.5) <= 0.05:
        k += 1
    # The median lies below the (k+1)-th smallest value with a chance of P(at most k of n lie below the median).
    return ordered[k], ordered[n - 1 - k]
