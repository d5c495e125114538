"""The threshold and its guarantee."""

import math
import random

import numpy as np
import pytest

from dsg_cli.calibration import clopper_pearson, conformal_threshold, cut_pieces
from dsg_cli.errors import DsgError


def test_threshold_is_the_conformal_rank():
    values = [i / 100 for i in range(1, 100)]  # n = 99
    assert conformal_threshold(values, 0.05) == 0.95
    assert conformal_threshold(values[::-1], 0.10) == 0.90
    assert conformal_threshold(values[:19], 0.05) == 0.19


def test_coverage_by_simulation():
    """Over many draws a new value exceeds the threshold with probability at most alpha, and not much less."""
    rng = np.random.default_rng(0)
    alpha, n = 0.1, 59
    rates = []
    for _ in range(400):
        threshold = conformal_threshold(list(rng.beta(1, 5, n)), alpha)
        rates.append(float((rng.beta(1, 5, 2000) > threshold).mean()))
    error = np.std(rates) / np.sqrt(len(rates))
    assert alpha - 1 / (n + 1) - 3 * error <= np.mean(rates) <= alpha + 3 * error


def test_too_few_pieces_or_a_bad_alpha_are_refused():
    with pytest.raises(DsgError, match="18 pieces.*at least 19"):
        conformal_threshold([0.1] * 18, 0.05)
    for alpha in (0, 1, -1, 2):
        with pytest.raises(DsgError, match="between 0 and 1"):
            conformal_threshold([0.1] * 50, alpha)


def test_pieces_are_consecutive_and_of_the_lengths_asked_for():
    row = [2, *range(10, 210)]
    pieces = cut_pieces(row, random.Random(0), shortest=8, longest=32, n_head=1)
    assert all(piece[0] == 2 and piece.count(2) == 1 for piece in pieces)
    joined = [token for piece in pieces for token in piece[1:]]
    assert joined == row[1 : 1 + len(joined)] and len(row) - 1 - len(joined) < 8
    assert all(8 <= len(piece) - 1 <= 32 for piece in pieces[:-1])
    assert cut_pieces([2, 5, 6], random.Random(0), shortest=8, longest=32, n_head=1) == []


@pytest.mark.parametrize(("k", "n"), [(0, 20), (3, 50), (50, 50)])
def test_interval_is_the_exact_one(k, n):
    """Its ends are the rates at which k or more, and k or fewer, happen with probability 0.025."""

    def at_most(count, rate):
        return sum(math.comb(n, i) * rate**i * (1 - rate) ** (n - i) for i in range(count + 1))

    low, high = clopper_pearson(k, n)
    assert (low == 0) if k == 0 else 1 - at_most(k - 1, low) == pytest.approx(0.025)
    assert (high == 1) if k == n else at_most(k, high) == pytest.approx(0.025)
    assert clopper_pearson(0, 0) == (0.0, 1.0)
