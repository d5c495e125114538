"""Contexts of features against a loop over all activations."""

import pytest
import torch
from conftest import LAYER, N_FEATURES, make_sae
from dsg_cli.contexts import AFTER, BEFORE, NOTHING, read_contexts
from dsg_cli.residuals import read_residual
from dsg_cli.runtime.sites import HookSite

from dsg_cli.errors import DsgError

SITE = HookSite(LAYER, "resid_post")
N = 3


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    return make_sae(tmp_path_factory.mktemp("sae"))


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(5)
    lengths = [1, 3, 8, 20, 40, 41, 2, 60, 5, 17]
    return [[2, *torch.randint(4, 64, (length,), generator=generator).tolist()] for length in lengths]


@pytest.fixture(scope="module")
def acts(model, sae, rows):
    """Of each row alone, [L, F]; 0 on BOS."""
    found = []
    for row in rows:
        ids = torch.tensor([row])
        acts_LF = sae.encode(read_residual(model, SITE, ids, torch.ones_like(ids))[0]).detach()
        acts_LF[0] = 0
        found.append(acts_LF)
    return found


@pytest.fixture(scope="module")
def found(model, tokenizer, sae, rows):
    return read_contexts(model, SITE, sae.encode, rows, tokenizer, n_contexts=N)


def test_rates_and_means_are_those_of_counted_tokens(found, acts, rows):
    all_TF = torch.cat([one[1:] for one in acts])
    assert found.n_tokens == len(all_TF) == sum(len(row) - 1 for row in rows)
    torch.testing.assert_close(found.rate_C.float(), (all_TF != 0).float().mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.mean_C.float(), all_TF.mean(0), atol=1e-4, rtol=1e-4)


def test_the_strongest_rows_of_each_feature(found, acts, rows):
    seen = 0
    for j in range(N_FEATURES):
        peaks = torch.stack([one[:, j].max() for one in acts])
        best = peaks.sort(descending=True).values[:N]
        torch.testing.assert_close(found.peak_CN[j], best.clamp(min=0), atol=1e-4, rtol=1e-4)
        for n in range(N):
            row = int(found.row_CN[j, n])
            if best[n] <= 1e-4:
                assert row == NOTHING and found.peak_CN[j, n] == 0
                continue
            seen += 1
            position = int(found.position_CN[j, n])
            torch.testing.assert_close(acts[row][position, j], found.peak_CN[j, n], atol=1e-4, rtol=1e-4)
            inside = range(max(0, position - BEFORE), min(len(rows[row]), position + AFTER + 1))
            kept = found.ids_CNW[j, n] != NOTHING
            assert found.ids_CNW[j, n][kept].tolist() == [rows[row][i] for i in inside]
            torch.testing.assert_close(found.acts_CNW[j, n][kept], acts[row][list(inside), j], atol=1e-4, rtol=1e-4)
            assert found.acts_CNW[j, n][~kept].eq(0).all()
            assert found.acts_CNW[j, n, BEFORE] == found.peak_CN[j, n]
    assert seen > N_FEATURES  # Of most features there is something to see.


def test_some_features_are_read_as_all_are(model, tokenizer, sae, rows, found):
    some = [7, 3, 40]
    of_some = read_contexts(model, SITE, lambda resid_TD: sae.encode(resid_TD)[:, some], rows, tokenizer, n_contexts=N)
    for name in ("rate_C", "mean_C", "peak_CN", "row_CN", "ids_CNW", "acts_CNW"):
        assert torch.equal(getattr(of_some, name), getattr(found, name)[some]), name


def test_text_without_a_token_that_counts_is_refused(model, tokenizer, sae):
    with pytest.raises(DsgError, match="no token that counts"):
        read_contexts(model, SITE, sae.encode, [[2], [2, 1]], tokenizer, n_contexts=N)


def test_activations_that_are_not_finite_are_refused(model, tokenizer, rows):
    with pytest.raises(DsgError, match="not finite"):
        read_contexts(model, SITE, lambda resid_TD: resid_TD / 0, rows, tokenizer, n_contexts=N)
