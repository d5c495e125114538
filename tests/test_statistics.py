"""Streaming statistics against a naive loop over a full encode."""

import copy

import pytest
import torch
from conftest import LAYER, N_FEATURES, make_sae
from dsg_cli.runtime.sites import HookSite
from dsg_cli.statistics import feature_statistics
from dsg_cli.tokens import batches, chunks, encode

from dsg_cli.errors import DsgError

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
