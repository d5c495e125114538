"""Texts to batches in another thread, packed rows, batches that do not fit, and mixtures of corpora."""

from __future__ import annotations

import threading

import pytest
import torch
from conftest import make_sae, refuses

from dsg_cli.data.batches import batches, stream_batches
from dsg_cli.data.corpora import Corpus
from dsg_cli.data.tokens import draw_pieces, encode, packed
from dsg_cli.errors import DsgError
from dsg_cli.guardrail.statistics import feature_statistics, mix
from dsg_cli.models.residuals import OomSplitter
from dsg_cli.models.sae import load_encoder, read_sae

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = [" ".join(f"w{(i * j) % 50}" for j in range(1, 5 + i % 40)) for i in range(1, 600)]


def rows_of(batches):
    return sorted(
        ids[: int(mask.sum())].tolist() for b in batches for ids, mask in zip(b.ids_BL, b.mask_BL, strict=True)
    )


def test_a_stream_holds_what_plain_batches_hold(tokenizer):
    plain = rows_of(batches(encode(tokenizer, TEXTS, bos=2), tokenizer))
    assert rows_of(stream_batches(tokenizer, TEXTS, bos=2, seq_len=100)) == plain
    some = rows_of(stream_batches(tokenizer, TEXTS, bos=2, seq_len=100, max_tokens=500))
    assert 500 <= sum(map(len, some)) < 600
    cut = rows_of(stream_batches(tokenizer, TEXTS, bos=2, seq_len=10))
    assert max(map(len, cut)) == 10 and all(row[0] == 2 for row in cut)


def test_a_stream_ends_its_thread_and_passes_errors_on(tokenizer):
    before = threading.active_count()
    stream = stream_batches(tokenizer, TEXTS * 50, bos=2, seq_len=100)
    next(stream)
    stream.close()
    assert threading.active_count() == before
    with pytest.raises(TypeError):
        list(stream_batches(tokenizer, [*TEXTS, None], bos=2, seq_len=100))
    assert threading.active_count() == before


def test_packed_rows_are_full_and_joined_with_eos(tokenizer):
    documents = [[2, 10, 11], [2, 12], [2, 13, 14, 15, 16]]
    assert list(packed(documents, 5, bos=2, eos=1)) == [[2, 10, 11, 1, 12], [2, 1, 13, 14, 15]]
    assert list(packed([[10, 11], [12]], 2, bos=None, eos=None)) == [[10, 11]]
    rows = rows_of(stream_batches(tokenizer, TEXTS, bos=2, seq_len=64, is_packed=True))
    assert {len(row) for row in rows} == {64}
    n_tokens = sum(len(ids) for ids in encode(tokenizer, TEXTS, bos=None)) + len(TEXTS)
    assert len(rows) == n_tokens // 63
    with pytest.raises(DsgError, match="does not fill one row of 64"):
        list(stream_batches(tokenizer, ["w1 w2"], bos=2, seq_len=64, is_packed=True))


def statistics(model, folder, tokenizer, texts, limit=None):
    """Of texts, on a machine that holds `limit` tokens at once."""
    source = read_sae(str(folder))
    widest = []

    def note(_module, _args, kwargs):
        n_tokens = kwargs["input_ids"].numel()
        if limit is not None and n_tokens > limit:
            raise torch.OutOfMemoryError("pretended")
        widest.append(n_tokens)

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        stream = stream_batches(tokenizer, texts, bos=2, seq_len=100)
        return feature_statistics(
            model, source.site, load_encoder(source, device="cpu"), stream, total_tokens=1
        ), widest
    finally:
        handle.remove()


def test_what_does_not_fit_is_halved_and_nothing_is_lost(model, tokenizer, tmp_path):
    make_sae(tmp_path)
    whole, _ = statistics(model, tmp_path, tokenizer, TEXTS)
    halved, widest = statistics(model, tmp_path, tokenizer, TEXTS, limit=200)
    assert halved.n_tokens == whole.n_tokens and max(widest) <= 200 and len(widest) > 20
    torch.testing.assert_close(halved.mean_square_F, whole.mean_square_F, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(halved.norms.sort().values, whole.norms.sort().values)
    refuses(r"A single sequence of \d+ tokens does not fit", statistics, model, tmp_path, tokenizer, TEXTS, limit=20)


def test_what_was_too_large_is_not_tried_again(tokenizer):
    tried = []

    def compute(batch):
        tried.append(len(batch.index))
        if len(batch.index) > 4:
            raise torch.OutOfMemoryError
        return batch.index

    split_on_oom = OomSplitter()
    (batch,) = batches([[2, 10]] * 16, tokenizer)
    for _ in range(2):
        assert [i for _, index in split_on_oom(batch, compute) for i in index] == list(batch.index)
    assert tried == [16, 8, *[4] * 4, *[4] * 4]
    with pytest.raises(RuntimeError, match="another"):
        list(split_on_oom(batch, lambda _: (_ for _ in ()).throw(RuntimeError("another"))))


def test_a_mixture_without_weights_is_one_corpus_and_with_weights_has_its_shares(model, tokenizer, tmp_path):
    make_sae(tmp_path)
    parts = [TEXTS[:100], TEXTS[100:110]]
    together, _ = statistics(model, tmp_path, tokenizer, [text for part in parts for text in part])
    each = [statistics(model, tmp_path, tokenizer, part)[0] for part in parts]
    pooled = mix(each, [None, None])
    torch.testing.assert_close(pooled.mean_square_F, together.mean_square_F, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(pooled.rate_F, together.rate_F)
    assert pooled.median_residual_norm == pytest.approx(together.median_residual_norm, rel=1e-5)
    weighted = mix(each, [3.0, None])
    torch.testing.assert_close(weighted.mean_F, 0.75 * each[0].mean_F + 0.25 * each[1].mean_F)
    assert len(weighted.norms) == pytest.approx(len(each[1].norms) * 4, abs=2)


def pieces(tokenizer, weights, **options):
    corpora = [
        Corpus(name, TEXTS[start::2], "", weight=w) for name, start, w in zip("ab", (0, 1), weights, strict=True)
    ]
    settings = {"bos": 2, "lengths": (4, 8), "at_most": 10_000, "seed": 0} | options
    return draw_pieces(tokenizer, corpora, "calibrate", **settings)


def test_pieces_of_a_mixture_come_in_its_shares(tokenizer):
    plain = pieces(tokenizer, (None, None))
    counts = [sum(piece.corpus == name for piece in plain) for name in "ab"]
    assert min(counts) > 50 and all(piece.ids[0] == 2 and 5 <= len(piece.ids) <= 9 for piece in plain)
    mixed = pieces(tokenizer, (4.0, 1.0))
    shares = [sum(piece.corpus == name for piece in mixed) for name in "ab"]
    assert shares[0] == pytest.approx(4 * shares[1], rel=0.05) and max(shares) <= max(counts)
    few = pieces(tokenizer, (None, None), at_most=60)
    assert 30 <= len(few) <= 120
    full = pieces(tokenizer, (None, None), lengths=(20, 20), is_packed=True)
    assert {len(piece.ids) for piece in full} == {21} and any(1 in piece.ids for piece in full)
