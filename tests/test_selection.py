"""Selection against a direct transcription of the paper's steps."""

import numpy as np
import pytest
import torch
from dsg_cli.selection import select_features

from dsg_cli.errors import DsgError


def transcription(forget, retain, n, p_ratio):
    """METHOD, steps 3 and 4, in numpy."""
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
    with pytest.raises(DsgError, match="Only 2 features pass"):
        select_features(forget, retain, n_features=5, ratio_percentile=90)


def test_dead_features_are_never_selected():
    forget, retain = torch.zeros(100), torch.zeros(100)
    forget[3] = 1.0
    found = select_features(forget, retain, n_features=1, ratio_percentile=50)
    assert [feature.index for feature in found.features] == [3] and found.n_passed == 1


def test_errors_name_the_way_out():
    with pytest.raises(DsgError, match="the SAE has 10"):
        select_features(torch.ones(10), torch.ones(10), n_features=11, ratio_percentile=95)
    with pytest.raises(DsgError, match="No feature of the SAE is active"):
        select_features(torch.zeros(10), torch.ones(10), n_features=1, ratio_percentile=95)
