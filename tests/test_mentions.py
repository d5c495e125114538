"""Names in forget text, and those that nobody has in their place."""

import re

import pytest
from dsg_cli.methods.mentions import find_mentions, with_unknown_names
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dsg_cli.errors import DsgError
from dsg_cli.methods.text import Text

BOS, SPECIAL, SEED = 2, (0, 1, 2), 5
TEXTS = [
    "Marta lives in Lisbon, and Marta likes Oslo; Nobody knows why Lisbon is near Oslo.",
    "We met Karl and Marta. Karl said: Berlin and Oslo are far from Oslo",
    "nothing here",
]


@pytest.mark.parametrize("seed", range(6))
def test_a_name_becomes_the_same_name_that_nobody_has_everywhere(seed):
    names, made = with_unknown_names(TEXTS, seed)
    assert names == ["Berlin", "Karl", "Lisbon", "Marta", "Nobody", "Oslo"] and made[2] == TEXTS[2]
    assert (names, made) == with_unknown_names(TEXTS, seed)
    assert made != with_unknown_names(TEXTS, seed + 1)[1]
    became: dict[str, set[str]] = {}
    for before, after in zip(TEXTS, made, strict=True):
        pieces, others = re.split(r"(\w+)", before), re.split(r"(\w+)", after)
        for old, new in zip(pieces, others, strict=True):
            became.setdefault(old, set()).add(new)
    assert all(len(new) == 1 for new in became.values())
    new = {old: next(iter(one)) for old, one in became.items()}
    assert all((old != new[old]) == (old in names) for old in new)  # Also "Marta" and "Karl" that begin sentences.
    assert not {new[name] for name in names} & set(names) and len({new[name] for name in names}) == len(names)
    for name in names:  # The first half of one, the second of another, and vowels if that is a name.
        half = name[: len(name) // 2]
        ends = [other[len(other) // 2 :] for other in names]
        assert any(re.fullmatch(f"{half}{end}[aeiou]*", new[name]) for end in ends)
    with pytest.raises(DsgError, match="no names"):
        with_unknown_names(["one Name only. The rest is none"], seed)


@pytest.mark.parametrize("bos", [None, BOS])
@pytest.mark.parametrize(("longest", "seed"), [(0, 20), (120, SEED)])
def test_mentions_are_where_names_end_and_rows_grow_no_longer(bos, longest, seed):
    letters = " .;,abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ:"
    vocab = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3} | {letter: i + 4 for i, letter in enumerate(letters)}
    fast = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, **special)
    head = [] if bos is None else [bos]
    before = [*TEXTS, "x" * longest]
    forget = Text([[*head, *map(vocab.get, one)] for one in before], [0, 0, 1, 1], [1.0, 3.0], 0, SPECIAL, "cpu")
    found = find_mentions(tokenizer, forget, bos=bos, seed=seed)
    names, made = with_unknown_names(before, seed)
    n = max(map(len, forget.rows))
    fit = [[a.end() - 1 + len(head) < n for a in re.finditer(r"\w+", one)] for one in made]
    assert all(map(all, fit)) == bool(longest)  # Made-up names are longer here: without room, some are cut off.
    for rows, ends, texts in zip(found.rows, found.ends, (before, made), strict=True):
        assert rows.rows == [[*head, *map(vocab.get, one)][:n] for one in texts]
        assert (rows.corpus, rows.weights, rows.pad, rows.special) == (forget.corpus, forget.weights, 0, SPECIAL)
        for ends_of_row, text_of_row, original, fits in zip(ends, texts, before, fit, strict=True):
            words = re.findall(r"\w+", original)
            is_name = [word in names and fitting for word, fitting in zip(words, fits, strict=True)]
            words = [one for one, wanted in zip(re.finditer(r"\w+", text_of_row), is_name, strict=True) if wanted]
            assert ends_of_row == [one.end() - 1 + len(head) for one in words]
    batch, at_BL = found.unknown([2, 0])
    assert [row[mask].tolist() for row, mask in zip(batch.ids_BL, batch.mask_BL, strict=True)] == [
        found.rows[1].rows[2],
        found.rows[1].rows[0],
    ]
    assert [one.nonzero().flatten().tolist() for one in at_BL] == [[], found.ends[1][0]]
