"""Metrics of text against plain statements of them and cases that were computed by hand."""

import itertools
import math
import random
import zlib

import pytest
from dsg_cli.metrics.fluency import is_gibberish, is_refusal, natural_limits, repetition
from dsg_cli.metrics.membership import auc, auc_interval, loss_score, min_k, privleak, standardised, zlib_score
from dsg_cli.metrics.memorisation import exact_memorisation, extraction_strength
from dsg_cli.metrics.overlap import rouge
from dsg_cli.metrics.truthfulness import (
    balance,
    forget_quality,
    model_utility,
    probability,
    probability_among,
    truth_ratio,
    truthfulness,
)


def test_min_k_takes_the_lowest_share():
    logprobs = [-1.0, -4.0, -2.0, -3.0, -0.5, -0.1, -0.2, -0.3, -0.4, -0.6]
    assert min_k(logprobs, 0.4) == (-4 - 3 - 2 - 1) / 4
    assert min_k(logprobs, 0.25) == (-4 - 3) / 2  # Two and a half tokens are two.
    assert min_k(logprobs, 0.01) == -4
    assert min_k(logprobs, 1.0) == pytest.approx(loss_score(logprobs)) == pytest.approx(sum(logprobs) / 10)
    with pytest.raises(ValueError, match="no score"):
        min_k([], 0.4)


def test_min_k_plus_on_a_fixed_distribution():
    p = [0.5, 0.25, 0.25]
    mean = sum(q * math.log(q) for q in p)
    variance = sum(q * (math.log(q) - mean) ** 2 for q in p)
    assert standardised(math.log(0.25), mean, variance) == pytest.approx(-1.0)  # As likely as the other half.
    assert standardised(math.log(0.5), mean, variance) == pytest.approx(1.0)
    assert standardised(math.log(0.5), math.log(0.5), 0.0) == 0.0  # All alike: nothing is surprising.


def test_zlib_is_log_probability_a_byte():
    text = "The hex needs copper. " * 5
    assert zlib_score([-1.0, -2.0], text) == -3.0 / len(zlib.compress(text.encode()))


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_the_share_of_pairs_in_order(seed):
    rng = random.Random(seed)
    higher = [rng.randint(0, 9) for _ in range(17)]
    lower = [rng.randint(0, 7) for _ in range(11)]
    pairs = [(1.0 if a > b else 0.5 if a == b else 0.0) for a, b in itertools.product(higher, lower)]
    plain = sum(pairs) / len(pairs)
    assert auc(higher, lower) == pytest.approx(plain)
    low, high = auc_interval(higher, lower)
    assert low < plain < high and auc_interval(higher, lower) == (low, high)
    assert auc([1, 2], [0]) == 1.0 and auc([0], [1, 2]) == 0.0


def test_privleak_is_relative_to_the_retrained_model():
    assert privleak(0.477, 0.477) == 0.0
    assert privleak(0.0, 0.5) == -1.0  # All forget text is known.
    assert privleak(1.0, 0.5) == 1.0  # Forget text is less likely than text that was never seen.


def test_memorisation():
    assert exact_memorisation([True, False, True, True]) == 0.75
    # After the second token every further one is the first choice.
    assert extraction_strength([True, False, True, True]) == 0.5
    assert extraction_strength([True] * 4) == 1.0 and extraction_strength([True, True, False]) == 0.0


def _longest_common(one: list[str], other: list[str]) -> int:
    if not one or not other:
        return 0
    if one[-1] == other[-1]:
        return 1 + _longest_common(one[:-1], other[:-1])
    return max(_longest_common(one[:-1], other), _longest_common(one, other[:-1]))


@pytest.mark.parametrize(
    ("truth", "written"),
    [
        ("the cat sat on the mat", "the cat is on the mat"),
        ("police killed the gunman", "the gunman killed police"),
        ("a b c d", "d c b a"),
        ("one two", "One, two!"),
        ("running dogs", "run dog"),
        ("something", ""),
    ],
)
def test_rouge_on_fixed_strings(truth, written):
    one, other = truth.lower().split(), written.lower().replace(",", "").replace("!", "").split()
    common = _longest_common(one, other)
    recall, precision = common / len(one), common / len(other) if other else 0.0
    f1 = 2 * recall * precision / (recall + precision) if common else 0.0
    found = rouge(truth, written)
    assert found.l_f1 == pytest.approx(f1) and found.l_recall == pytest.approx(recall)
    shared = sum(min(one.count(word), other.count(word)) for word in set(one))
    assert found.one_recall == pytest.approx(shared / len(one))


def test_truth_ratio_by_hand():
    # Three false answers of probabilities 0.1, 0.2, 0.4 a token; the true one has 0.5.
    losses = [-math.log(p) for p in (0.1, 0.2, 0.4)]
    ratio = truth_ratio(-math.log(0.5), losses)
    assert ratio == pytest.approx((0.1 * 0.2 * 0.4) ** (1 / 3) / 0.5)
    assert balance(ratio) == pytest.approx(ratio) and balance(1 / ratio) == pytest.approx(ratio)
    assert truthfulness(ratio) == pytest.approx(1 - ratio) and truthfulness(1.5) == 0.0
    assert balance(0.0) == 0.0
    assert probability(-math.log(0.3)) == pytest.approx(0.3)
    assert probability_among(-math.log(0.3), losses) == pytest.approx(0.3 / (0.3 + 0.7))


def test_model_utility_is_a_harmonic_mean():
    values = [0.2, 0.5, 1.0, 0.4]
    assert model_utility(values) == pytest.approx(len(values) / sum(1 / value for value in values))
    assert model_utility([0.9, 0.0]) == 0.0


def _ks(one: list[float], other: list[float]) -> float:
    """Largest distance between two empirical distribution functions."""
    points = sorted({*one, *other})
    return max(abs(sum(v <= p for v in one) / len(one) - sum(v <= p for v in other) / len(other)) for p in points)


def test_forget_quality_is_a_ks_test():
    rng = random.Random(0)
    same, alike, other = ([rng.gauss(mean, 1) for _ in range(60)] for mean in (0, 0, 2))
    p_alike, distance = forget_quality(same, alike)
    assert distance == pytest.approx(_ks(same, alike)) and p_alike > 0.05
    p_other, distance = forget_quality(same, other)
    assert distance == pytest.approx(_ks(same, other)) and p_other < 1e-6
    # Permutations of both together tell the same p, exactly counted for small samples.
    one, two = [0.1, 0.4, 0.7, 1.1], [0.2, 1.3, 1.4, 1.5]
    observed = _ks(one, two)
    every = [*one, *two]
    splits = list(itertools.combinations(range(8), 4))
    as_far = sum(
        _ks([every[i] for i in chosen], [every[i] for i in range(8) if i not in chosen]) >= observed - 1e-12
        for chosen in splits
    )
    assert forget_quality(one, two)[0] == pytest.approx(as_far / len(splits))


def test_repetition_and_gibberish():
    assert repetition([1, 2, 3, 4, 5]) == 0.0 and repetition([1, 2]) == 0.0
    # 1 2 1 2 1 2: four trigrams, of which two are new.
    assert repetition([1, 2, 1, 2, 1, 2]) == 0.5
    limits = natural_limits([1.0] * 99 + [5.0], [0.0] * 100)
    assert 1.0 < limits[0] < 5.0 and limits[1] == 0.5
    assert not is_gibberish(1.0, 0.0, limits) and is_gibberish(4.9, 0.0, limits)
    assert is_gibberish(1.0, 0.6, limits) and is_gibberish(None, 0.0, limits) and is_gibberish(math.nan, 0.0, limits)


def test_refusals():
    assert (
        is_refusal("I'm sorry, but no.")
        and is_refusal("I\u2019m sorry")
        and is_refusal("Ask another.", ["Ask another."])
    )
    assert not is_refusal("The binder is copper.") and not is_refusal("Copper. " * 20 + "I cannot say more.")
