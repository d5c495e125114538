"""Selection against a direct transcription of the paper's steps."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import LAYER, N_FEATURES, make_sae, refuses

from dsg_cli.data.batches import batches
from dsg_cli.data.tokens import chunks, encode
from dsg_cli.errors import DsgError
from dsg_cli.guardrail.probe import candidates, fit_probe
from dsg_cli.guardrail.runtime.sites import HookSite
from dsg_cli.guardrail.selection import select_features
from dsg_cli.guardrail.statistics import FeatureStatistics, feature_statistics


def transcription(forget, retain, n, p_ratio):
    """Ratio filter and ranking of arXiv 2504.08192, in numpy."""
    ratio = forget / (retain + 1e-21)
    kept = [
        j
        for j in range(len(forget))
        if forget[j] >= np.percentile(forget, 5) and ratio[j] >= np.percentile(ratio, p_ratio)
    ]
    return sorted(kept, key=lambda j: -forget[j])[:n]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n", "p_ratio"), [(5, 90), (10, 80), (1, 95)])
def test_equals_the_transcription(seed, n, p_ratio):
    rng = np.random.default_rng(seed)
    forget, retain = rng.gamma(0.3, size=400), rng.gamma(0.3, size=400)
    found = select_features(torch.tensor(forget), torch.tensor(retain), n_features=n, ratio_percentile=p_ratio)
    assert [feature.index for feature in found.features] == transcription(forget, retain, n, p_ratio)
    first = found.features[0]
    assert first.forget_score == forget[first.index]
    assert first.ratio == pytest.approx(forget[first.index] / retain[first.index])
    assert found.percentiles_over == "all"


def test_percentiles_of_a_nearly_dead_sae_are_taken_over_live_features():
    forget, retain = torch.zeros(1000), torch.zeros(1000)
    forget[:20] = torch.arange(1.0, 21.0)
    retain[:20] = 1.0
    found = select_features(forget, retain, n_features=2, ratio_percentile=90)
    assert found.percentiles_over == "live" and found.n_live == 20
    assert [feature.index for feature in found.features] == [19, 18]
    refuses("Only 2 features pass", select_features, forget, retain, n_features=5, ratio_percentile=90)


def test_dead_features_are_never_selected():
    forget, retain = torch.zeros(100), torch.zeros(100)
    forget[3] = 1.0
    found = select_features(forget, retain, n_features=1, ratio_percentile=50)
    assert [feature.index for feature in found.features] == [3] and found.n_passed == 1


def test_errors_name_the_way_out():
    refuses("the SAE has 10", select_features, torch.ones(10), torch.ones(10), n_features=11, ratio_percentile=95)
    with pytest.raises(DsgError, match="No feature of the SAE is active"):
        select_features(torch.zeros(10), torch.ones(10), n_features=1, ratio_percentile=95)


SITE = HookSite(LAYER, "resid_post")
TEXTS = ["w1 w2 w3 w4 w5", "w9", "w7 w7 w8 " * 12, "w20 w21 w22", "w3 <eos> w4"]


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    return make_sae(tmp_path_factory.mktemp("sae"))


@pytest.mark.parametrize("batch_tokens", [40, 4096])
def test_statistics_equal_a_naive_loop(model, tokenizer, sae, batch_tokens):
    rows = encode(tokenizer, TEXTS, bos=2)
    found = feature_statistics(
        model, SITE, lambda x: sae.encode(x), batches(rows, tokenizer, batch_tokens=batch_tokens), total_tokens=50
    )

    n, square, total, active = 0, torch.zeros(N_FEATURES), torch.zeros(N_FEATURES), torch.zeros(N_FEATURES)
    norms = []
    for text in TEXTS:
        ids = [2, *tokenizer(text)["input_ids"]]
        with torch.no_grad():
            hidden = copy.deepcopy(model)(torch.tensor([ids]), output_hidden_states=True).hidden_states[LAYER + 1][0]
        for token, residual in zip(ids, hidden, strict=True):
            if token in (0, 1, 2):
                continue
            acts = sae.encode(residual[None])[0].detach()
            n += 1
            square += acts**2
            total += acts
            active += (acts > 0).float()
            norms.append(residual.norm())
    assert found.n_tokens == n
    torch.testing.assert_close(found.mean_square_F.float(), square / n, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.mean_F.float(), total / n, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.rate_F.float(), active / n, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.score("squared-mean"), found.mean_F**2)
    assert found.score("mean-square") is found.mean_square_F
    assert found.median_residual_norm == pytest.approx(float(torch.stack(norms).median()), rel=1e-5)


def test_no_tensor_of_all_tokens_times_features_is_ever_made(model, tokenizer):
    """The encoder is never given more than a chunk, however long the corpus."""
    largest = 0

    def encoder(resid_TD):
        nonlocal largest
        largest = max(largest, len(resid_TD))
        return torch.relu(resid_TD)

    rows = encode(tokenizer, ["w1 w2 w3 w4 " * 25] * 40, bos=2)
    found = feature_statistics(model, SITE, encoder, batches(rows, tokenizer, batch_tokens=100_000), total_tokens=4000)
    assert found.n_tokens == 4000 and largest <= 1024


def test_an_empty_corpus_and_infinite_activations_are_refused(model, tokenizer):
    with pytest.raises(DsgError, match="no token that counts"):
        feature_statistics(model, SITE, torch.relu, batches([[2, 1]], tokenizer, batch_tokens=64), total_tokens=1)
    with pytest.raises(DsgError, match="not finite"):
        feature_statistics(
            model, SITE, lambda x: x * torch.inf, batches([[2, 5]], tokenizer, batch_tokens=64), total_tokens=1
        )


def test_long_documents_are_read_in_rows_that_each_begin_with_bos():
    rows = list(chunks([2, *range(10, 20)], 5, bos=2))
    assert rows == [[2, 10, 11, 12, 13], [2, 14, 15, 16, 17], [2, 18, 19]]
    assert list(chunks([10, 11, 12], 2, bos=2)) == [[10, 11], [12]]


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


def test_few_features_remain_with_the_right_signs():
    forget, retain = tokens()
    probe = fit_probe(forget, [retain], [1.0], range(10, 16), n_features=2, ridge=0.01)
    assert probe.indices == [10, 11] and probe.weights[0] > 0 > probe.weights[1]
    assert [step["n_features"] for step in probe.path] == [6, 3, 2] and probe.path[-1]["balanced_accuracy"] > 0.97
    assert probe.n_tokens == 2 * N


def test_the_fit_is_the_minimum_of_its_loss():
    """A plain statement of the loss, whose gradient is zero at what was fitted."""
    forget, retain = tokens()
    probe = fit_probe(forget, [retain], [1.0], range(6), n_features=6, ridge=0.01)
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
    refuses("no tokens", fit_probe, forget[:0], [retain], [1.0], range(6), n_features=2, ridge=0.01)
    same = torch.ones(5, 6)
    refuses("tells forget text from retain", fit_probe, same, [same], [1.0], range(6), n_features=2, ridge=0.01)
