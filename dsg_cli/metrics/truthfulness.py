"""TOFU's metrics (Maini et al., 2401.06121): how much likelier a true answer is than false ones of the same form.

Losses are means over the tokens of an answer, given the question, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def probability(loss: float) -> float:
    """Of an answer, to the power of one over its length."""
    return math.exp(-loss)


def probability_among(loss: float, other_losses: Sequence[float]) -> float:
    """Of the true answer among all that are offered."""
    true = probability(loss)
    return true / (true + sum(map(probability, other_losses)))


def truth_ratio(paraphrase_loss: float, perturbed_losses: Sequence[float]) -> float:
    """R: probability of false answers (their geometric mean) over that of the true one, in another wording.

    Near 0 for a model that knows the answer, about 1 for one that does not.
    """
    return math.exp(paraphrase_loss - sum(perturbed_losses) / len(perturbed_losses))


def balance(ratio: float) -> float:
    """1 where true and false answers are as likely; of what is to be forgotten, larger is better."""
    return min(ratio, 1 / ratio) if ratio > 0 else 0.0


def truthfulness(ratio: float) -> float:
    """1 where only the true answer is likely; of what is to be kept, larger is better."""
    return max(0.0, 1 - ratio)


def model_utility(values: Sequence[float]) -> float:
    """Harmonic mean of probability, ROUGE-L and truthfulness on everything that is to be kept; 0 if one is 0."""
    from scipy.stats import hmean

    return float(hmean(values)) if min(values) > 0 else 0.0


def forget_quality(ratios: Sequence[float], retrained: Sequence[float]) -> tuple[float, float]:
    """p-value and statistic of a two-sample Kolmogorov-Smirnov test of truth ratios on forget questions.

    Small p: the model can be told from one that never saw them.
    """
    from scipy.stats import ks_2samp

    found = ks_2samp(ratios, retrained)
    return float(found.pvalue), float(found.statistic)
