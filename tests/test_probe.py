"""The sparse probe against plain statements of what it is."""

import pytest
import torch
from dsg_cli.probe import candidates, fit_probe
from dsg_cli.statistics import FeatureStatistics

from dsg_cli.errors import DsgError

N = 400


def tokens(seed=0):
    """Six features: 0 fires on forget text, 1 on retain text, 2 weakly on forget text, the others on both alike."""
    generator = torch.Generator().manual_seed(seed)
    forget, retain = (torch.rand(N, 6, generator=generator) for _ in range(2))
    forget[:, 1] = 0
    retain[:, 0] = 0
    forget[:, 2] += 0.1
    return forget, retain


def statistics(acts):
    acts = acts.double()
    return FeatureStatistics(len(acts), acts.square().mean(0), acts.mean(0), (acts > 0).double().mean(0), torch.ones(1))


def test_candidates_are_the_features_that_lie_farthest_apart():
    forget, retain = tokens()
    assert candidates(statistics(forget), statistics(retain), 2) == [0, 1]
    found = candidates(statistics(forget), statistics(retain), 3)
    together = torch.cat([forget, retain])
    distance = (forget.mean(0) - retain.mean(0)).abs() / together.std(0)
    assert found == sorted(distance.argsort(descending=True)[:3].tolist())
    dead = torch.zeros(N, 6)
    assert candidates(statistics(dead), statistics(dead), 3) == []


def fitted(**changes):
    forget, retain = tokens()
    settings = {"n_features": 2, "ridge": 0.01} | changes
    return fit_probe(forget, [retain], [1.0], [10, 11, 12, 13, 14, 15], **settings)


def test_few_features_remain_with_the_right_signs():
    probe = fitted()
    assert probe.indices == [10, 11] and probe.weights[0] > 0 > probe.weights[1]
    assert [step["n_features"] for step in probe.path] == [6, 3, 2] and probe.path[-1]["balanced_accuracy"] > 0.97
    assert probe.n_tokens == 2 * N


def test_the_fit_is_the_minimum_of_its_loss():
    """A plain statement of the loss, whose gradient is zero at what was fitted."""
    forget, retain = tokens()
    probe = fitted(n_features=6)
    deviation = torch.cat([forget, retain]).double().std(0)
    w = (torch.tensor(probe.weights).double() * deviation).requires_grad_()
    b = torch.tensor(probe.bias).double().requires_grad_()

    def mean_loss(acts, sign):
        return torch.log1p(torch.exp(sign * ((acts.double() / deviation) @ w + b))).mean() / 2

    loss = mean_loss(forget, -1.0) + mean_loss(retain, 1.0)
    assert loss.item() == pytest.approx(probe.path[0]["loss"], rel=1e-4)
    (loss + 0.005 * w.square().sum()).backward()
    assert w.grad.abs().max() < 1e-4 and b.grad.abs() < 1e-4  # But for the rounding of weights.


def test_each_retain_corpus_counts_as_its_share_says():
    """Twice the tokens of a corpus, or each of them twice as heavy, is the same mixture only if shares say so."""
    forget, retain = tokens()
    once = fit_probe(forget, [retain[:100], retain[100:]], [1.0, 3.0], range(6), n_features=6, ridge=0.01)
    pooled = fit_probe(forget, [retain], [1.0], range(6), n_features=6, ridge=0.01)
    assert once.weights == pytest.approx(pooled.weights, rel=1e-4)
    other = fit_probe(forget, [retain[:100], retain[100:]], [9.0, 1.0], range(6), n_features=6, ridge=0.01)
    assert other.weights != pytest.approx(pooled.weights, rel=1e-3)


def test_without_tokens_or_without_differences_there_is_no_probe():
    forget, retain = tokens()
    with pytest.raises(DsgError, match="no tokens"):
        fit_probe(forget[:0], [retain], [1.0], range(6), n_features=2, ridge=0.01)
    same = torch.ones(5, 6)
    with pytest.raises(DsgError, match="tells forget text from retain"):
        fit_probe(same, [same], [1.0], range(6), n_features=2, ridge=0.01)
