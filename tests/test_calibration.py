"""The threshold and its guarantee."""

import math
import random

import numpy as np
import pytest
from dsg_cli.calibration import (
    clopper_pearson,
    conformal_threshold,
    cut_pieces,
    percentile_threshold,
    pieces_needed,
    rate_above,
    threshold_of,
)

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


def test_the_number_of_pieces_needed_is_the_least_that_works():
    for alpha in (0.5, 0.3, 0.1, 0.05, 0.03, 0.01, 1 / 3):
        n = pieces_needed(alpha)
        assert conformal_threshold(list(range(n)), alpha) == n - 1
        with pytest.raises(DsgError, match=f"at least {n} are needed"):
            conformal_threshold(list(range(n - 1)), alpha, what="lab-near")


def test_coverage_holds_for_each_corpus():
    """200 draws of a mixture in which one corpus lies higher: its own rate is kept only by the guarantee for each."""
    rng = np.random.default_rng(1)
    alpha, rates = 0.1, {True: [], False: []}
    for _ in range(200):
        drawn = [("far", x) for x in rng.normal(0, 1, 300)] + [("near", x) for x in rng.normal(1, 1, 60)]
        fresh_near = rng.normal(1, 1, 500)
        for is_each in rates:
            rates[is_each].append(rate_above(threshold_of(drawn, alpha, is_each=is_each), fresh_near.tolist())["rate"])
    error = np.std(rates[True]) / np.sqrt(200)
    assert alpha - 1 / 61 - 3 * error <= np.mean(rates[True]) <= alpha + 3 * error
    assert np.mean(rates[False]) > 2 * alpha


def test_the_papers_percentile_is_the_plain_one():
    values = list(range(101))
    assert percentile_threshold(values, 0.05) == 95.0
    pairs = [("a", float(value)) for value in values]
    assert threshold_of(pairs, 0.05, is_each=True, is_conformal=False) == 95.0
    assert threshold_of(pairs, 0.05, is_each=True) == 96.0
    with pytest.raises(DsgError, match="no piece"):
        threshold_of([], 0.05, is_each=True, is_conformal=False)
    with pytest.raises(DsgError, match="0 pieces of retain text"):
        threshold_of([], 0.05, is_each=True)


def test_lengths_are_drawn_from_those_given():
    pieces = cut_pieces(list(range(500)), random.Random(0), lengths=[9, 9, 30], n_head=0)
    assert {len(piece) for piece in pieces[:-1]} == {9, 30}


def test_pieces_are_consecutive_and_of_the_lengths_asked_for():
    row = [2, *range(10, 210)]
    pieces = cut_pieces(row, random.Random(0), lengths=range(8, 33), n_head=1)
    assert all(piece[0] == 2 and piece.count(2) == 1 for piece in pieces)
    joined = [token for piece in pieces for token in piece[1:]]
    assert joined == row[1 : 1 + len(joined)] and len(row) - 1 - len(joined) < 8
    assert all(8 <= len(piece) - 1 <= 32 for piece in pieces[:-1])
    assert cut_pieces([2, 5, 6], random.Random(0), lengths=range(8, 33), n_head=1) == []


@pytest.mark.parametrize(("k", "n"), [(0, 20), (3, 50), (50, 50)])
def test_interval_is_the_exact_one(k, n):
    """Its ends are the rates at which k or more, and k or fewer, happen with probability 0.025."""

    def at_most(count, rate):
        return sum(math.comb(n, i) * rate**i * (1 - rate) ** (n - i) for i in range(count + 1))

    low, high = clopper_pearson(k, n)
    assert (low == 0) if k == 0 else 1 - at_most(k - 1, low) == pytest.approx(0.025)
    assert (high == 1) if k == n else at_most(k, high) == pytest.approx(0.025)
    assert clopper_pearson(0, 0) == (0.0, 1.0)
