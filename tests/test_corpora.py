"""Corpora: reading, the parts that never share a document, and what is refused."""

import functools
import json
import operator

import pytest
from dsg_cli.corpora import Corpus, check_disjoint, check_no_shared_texts, load_corpora, load_corpus

from dsg_cli.errors import DsgError

TEXTS = [f"document number {i}" for i in range(400)]


def test_parts_are_disjoint_and_follow_from_the_text_alone():
    corpus = Corpus("x", TEXTS, "")
    parts = {part: corpus.part(part) for part in ("select", "calibrate", "fresh")}
    assert sorted(functools.reduce(operator.iadd, parts.values(), [])) == sorted(TEXTS)
    assert 160 < len(parts["select"]) < 240 and 80 < len(parts["calibrate"]) < 160 and 45 < len(parts["fresh"]) < 120
    reordered = Corpus("y", TEXTS[::-1] + TEXTS, "")
    assert set(reordered.part("calibrate")) == set(parts["calibrate"])


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_local_files(tmp_path, kind):
    path = tmp_path / f"c.{kind}"
    lines = [json.dumps({"text": text, "other": 1}) for text in TEXTS[:9]] + [""]
    path.write_text("\n".join(lines) if kind == "jsonl" else "\n\n".join(TEXTS[:9]))
    assert load_corpus(str(path)).texts == TEXTS[:9]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "is empty"),
        ("a.jsonl", b"\n\n", "is empty"),
        ("a.txt", b"one\n\ntwo", "2 different documents; at least 8"),
        ("a.txt", b"same\n\n" * 20, "1 different documents"),
        ("a.txt", b"\xff\xfe\x00bad", "not UTF-8"),
        ("a.txt", b"PK\x00\x03" * 9, "NUL bytes"),
        ("a.jsonl", b"hello\n", "line 1 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "x"}\n', 'line 2 has no "text" string; found: body'),
        ("a.jsonl", b'["x"]\n', "found: list"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "half of a surrogate pair"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DsgError, match=words):
        load_corpus(str(tmp_path / name))


def test_line_separators_inside_a_text_part_nothing(tmp_path):
    texts = [f"one\u2028two\x85three {i}" for i in range(9)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts), encoding="utf-8")
    assert load_corpus(str(path)).texts == texts


def test_the_same_text_under_two_names_is_found(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("\n\n".join(load_corpus("lab-hexes").texts[:100]))
    with pytest.raises(DsgError, match="1.. documents of lab-hexes are both"):
        check_no_shared_texts([load_corpus("lab-hexes")], [load_corpus(str(path))])
    check_no_shared_texts([load_corpus("lab-hexes")], [load_corpus("lab-retain")])


def test_unknown_names(tmp_path):
    with pytest.raises(DsgError, match="no corpus or file"):
        load_corpus("x" * 5000)
    with pytest.raises(DsgError, match="Did you mean lab-hexes") as error:
        load_corpus("lab-hexs")
    assert error.value.message == "There is no corpus or file named lab-hexs."
    with pytest.raises(DsgError, match="holds no corpus"):
        load_corpus(str(tmp_path))
    with pytest.raises(DsgError, match="No forget corpus is named"):
        load_corpora([], role="forget")


def test_nothing_may_be_both_forgotten_and_retained(tmp_path):
    check_disjoint(["lab-hexes"], ["lab-retain", "lab-ciphers"])
    with pytest.raises(DsgError, match="lab-hexes is named both"):
        check_disjoint(["lab-hexes"], ["lab-far", "lab-hexes"])
    with pytest.raises(DsgError, match="lab-near is named both"):
        check_disjoint(["lab-near"], ["lab-retain"])
    path = tmp_path / "a.txt"
    with pytest.raises(DsgError, match="both"):
        check_disjoint([str(path)], [str(tmp_path / "." / "a.txt")])


def test_limit_draws_the_same_documents_from_the_same_seed():
    one = load_corpora(["lab-hexes"], role="forget", limit=20, seed=1)[0].texts
    assert len(one) == 20
    assert one == load_corpora(["lab-hexes"], role="forget", limit=20, seed=1)[0].texts
    assert one != load_corpora(["lab-hexes"], role="forget", limit=20, seed=2)[0].texts
    with pytest.raises(DsgError, match="too small"):
        load_corpora(["lab-hexes"], role="forget", limit=3)
