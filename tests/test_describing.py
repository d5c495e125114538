"""Descriptions made from text: what a feature fires on is what it is described by."""

import random

import pytest
import torch
from dsg_cli.contexts import AFTER, BEFORE, NOTHING, Contexts, read_contexts
from dsg_cli.describing import BEFORE_PEAK, N_WORDS, SHARE_OF_BEST, describe_features
from dsg_cli.runtime.sites import HookSite

EMBEDDING = HookSite(0, "resid_pre")
FIRES_ON = [{"w5": 1.0}, {"w6": 2.0, "w7": 1.0}, {}, {"w8": -3.0}, {"w5": 1.0, "w9": 1.0}]
"""Feature -> words and its activation on them."""


@pytest.fixture(scope="module")
def rows(tokenizer):
    rng = random.Random(3)
    texts = [" ".join(f"w{rng.randrange(40)}" for _ in range(30)) for _ in range(60)]
    return [[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]


@pytest.fixture(scope="module")
def found(model, tokenizer, rows):
    """Of features that see which word a token is: the embedding that is the nearest to the residual."""
    embedding_VD = model.get_input_embeddings().weight.detach()
    acts_VF = torch.zeros(len(embedding_VD), len(FIRES_ON))
    for j, words in enumerate(FIRES_ON):
        for word, act in words.items():
            acts_VF[tokenizer.convert_tokens_to_ids(word), j] = act

    def encode(resid_TD):
        return acts_VF[torch.cdist(resid_TD, embedding_VD).argmin(-1)]

    contexts = read_contexts(model, EMBEDDING, encode, rows, tokenizer, n_contexts=8)
    return {one.index: one for one in describe_features(contexts, tokenizer)}


def test_a_feature_is_described_by_the_word_on_which_it_fires(found):
    assert found[0].description.split(", ")[0] == "w5"
    assert found[3].description.split(", ")[0] == "w8"
    assert set(found) == {0, 1, 3, 4}  # A dead one is not described.
    assert found[4].description.split(", ")[:2] in (["w9", "w5"], ["w5", "w9"])


def test_the_peak_weighs_most(found):
    assert found[1].description.split(", ")[0] == "w6"


def test_counts_are_those_of_the_text(found, rows, tokenizer):
    w5, w6, w7 = (tokenizer.convert_tokens_to_ids(word) for word in ("w5", "w6", "w7"))
    n_tokens = sum(len(row) - 1 for row in rows)
    assert found[0].n == sum(row.count(w5) for row in rows)
    assert found[1].n == sum(row.count(w6) + row.count(w7) for row in rows)
    assert found[1].rate == pytest.approx(found[1].n / n_tokens)


class Pieces:
    """A tokenizer of word pieces; 9 is special."""

    pieces = ("vir", "us", " spreads", " the", " air", ", 12 ", "Böse\x1b", " ñandú", "-", "<s>")

    def decode(self, ids, skip_special_tokens):
        return "".join(self.pieces[i] for i in ids if i != 9)


def contexts_of(*features):
    """From the tokens of contexts, `(ids before, peak and after, activations)`, a list a feature."""
    n, width = max(map(len, features)), BEFORE + 1 + AFTER
    ids = torch.full((len(features), n, width), NOTHING)
    acts = torch.zeros(len(features), n, width)
    peaks, row = torch.zeros(len(features), n), torch.full((len(features), n), NOTHING)
    for j, several in enumerate(features):
        for k, (tokens, values) in enumerate(several):
            start = BEFORE - max(range(len(values)), key=lambda i: abs(values[i]))
            ids[j, k, start : start + len(tokens)] = torch.tensor(tokens)
            acts[j, k, start : start + len(tokens)] = torch.tensor(values)
            peaks[j, k], row[j, k] = max(values, key=abs), k
    rate = torch.full((len(features),), 0.25, dtype=torch.float64)
    return Contexts(100, rate, rate, peaks, row, row, ids, acts)


def words(*features):
    return {one.index: one.description.split(", ") for one in describe_features(contexts_of(*features), Pieces())}


def test_pieces_are_put_together_to_words():
    alone = [([9, 0, 1, 2, 3], [0.0, 0.2, 1.0, 0.0, 0.0])]
    other = [([4, 7, 8], [0.0, 1.0, 0.0])]
    assert words(alone, other) == {0: ["virus"], 1: ["ñandú", "air"]}
    # Numbers and stop words describe nothing; case and what no terminal should see go.
    assert words([([3, 5, 6], [1.0, 2.0, 3.0])], other)[0] == ["böse"]


class Bytes:
    """A tokenizer of bytes: a letter may take several tokens."""

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode("utf-8", "replace")


def test_letters_of_several_tokens_are_put_together():
    ids = list("a мир".encode())
    context = (ids, [0.0] * (len(ids) - 1) + [1.0])
    found = describe_features(contexts_of([context], [([98], [1.0])]), Bytes())
    assert found[0].description == "мир"


def test_words_before_the_peak_count_and_later_ones_only_by_their_activation():
    assert BEFORE_PEAK >= SHARE_OF_BEST
    found = words([([4, 2, 7], [0.0, 1.0, 0.0])], [([0, 1], [1.0, 1.0])])
    assert found[0] == ["spreads", "air"]
    assert words([([4, 2, 7], [0.0, 1.0, 0.5])], [([0, 1], [1.0, 1.0])])[0] == ["spreads", "ñandú", "air"]


def test_what_describes_every_feature_describes_none_well():
    shared = [([2, 0, 1], [0.0, 1.0, 1.0])]
    found = words(*[[*shared, ([2, 7], [0.0, 0.9])]] + [[*shared, *shared]] * 3)
    assert found[0][0] == "ñandú" and all(found[j][0] != "ñandú" for j in (1, 2, 3))


def test_descriptions_are_short_and_the_same_each_time(found, model, tokenizer):
    assert all(0 < len(one.description.split(", ")) <= N_WORDS for one in found.values())
    many = [([0, 1], [1.0, 1.0])]
    assert words(many, many) == words(many, many)
