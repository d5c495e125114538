"""Scores that tell text a model was trained on from other text, and how well they do.

Every score is larger for text that the model finds likelier. Log-probabilities are those of a text's tokens after the
first, in nats.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np

RESAMPLES = 500


def loss_score(logprobs: Sequence[float]) -> float:
    """Mean log-probability of a token."""
    return _mean(logprobs)


def zlib_score(logprobs: Sequence[float], text: str) -> float:
    """Log-probability of the text for each byte that zlib needs for it (Carlini et al., 2012.07805)."""
    return sum(logprobs) / len(zlib.compress(text.encode()))


def min_k(scores: Sequence[float], share: float) -> float:
    """Mean of the lowest share of the tokens' scores.

    Of log-probabilities, Min-K% (Shi et al., 2310.16789); of standardised ones, Min-K%++ (Zhang et al., 2404.02936).
    A share that makes less than one token takes one.
    """
    return _mean(sorted(scores)[: max(1, int(len(scores) * share))])


def standardised(logprob: float, mean: float, variance: float) -> float:
    """A token's log-probability in standard deviations of what the model expects in its place (Min-K%++)."""
    return (logprob - mean) / math.sqrt(max(variance, 1e-6))


def auc(higher: Sequence[float], lower: Sequence[float]) -> float:
    """How often a score of the first exceeds one of the second, ties counted half; 0.5 if scores tell nothing.

    Raises:
        ValueError: One of the two is empty.
    """
    from sklearn.metrics import roc_auc_score

    labels = [1] * len(higher) + [0] * len(lower)
    return float(roc_auc_score(labels, [*higher, *lower]))


def auc_interval(higher: Sequence[float], lower: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the AUC, each of the two drawn anew by itself."""
    rng = np.random.default_rng(seed)
    firsts, seconds = np.asarray(higher), np.asarray(lower)
    found = []
    for _ in range(RESAMPLES):
        drawn = rng.choice(firsts, len(firsts))
        others = np.sort(rng.choice(seconds, len(seconds)))
        below = np.searchsorted(others, drawn, "left")
        not_above = np.searchsorted(others, drawn, "right")
        found.append(float((below + not_above).mean()) / 2 / len(seconds))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def privleak(auc_unlearned: float, auc_retrained: float) -> float:
    """How far an AUC is from that of a model that never saw the text, relative to it (MUSE, 2407.06460).

    Both AUCs are of holdout against forget text, as MUSE has them: small where the forget text is known. So the metric
    is negative for a model that unlearned too little and positive for one that betrays it by unlearning too much.
    """
    return (auc_unlearned - auc_retrained) / auc_retrained


def _mean(values: Sequence[float]) -> float:
    if not values:
        raise ValueError("A text of fewer than two tokens has no score.")
    return float(sum(values) / len(values))
