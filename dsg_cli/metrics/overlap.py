"""ROUGE of what a model wrote, as the rouge-score package computes it, without a stemmer."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rouge:
    """Shares of words in common with the true text."""

    l_f1: float
    """ROUGE-L: of the longest common subsequence."""
    l_recall: float
    one_recall: float
    """ROUGE-1: of words wherever they stand."""


def rouge(truth: str, written: str) -> Rouge:
    """ROUGE of a text against the true one."""
    found = _scorer().score(truth, written)
    return Rouge(float(found["rougeL"].fmeasure), float(found["rougeL"].recall), float(found["rouge1"].recall))


@functools.cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
