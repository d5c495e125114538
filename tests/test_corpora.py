"""Corpora: reading, the parts that never share a document, and what is refused."""

from __future__ import annotations

import csv
import functools
import json
import operator

import pytest
from conftest import python, refuses
from loopback import LoopbackHub
from realnames import shard, write_dataset

from dsg_cli.data.catalogue import CATALOGUE, hub_text
from dsg_cli.data.corpora import (
    Corpus,
    check_disjoint,
    check_no_shared_texts,
    load_corpora,
    load_corpus,
    parse_name,
    passages,
)
from dsg_cli.errors import DsgError
from dsg_cli.report.tables import corpora_table

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
    lines = [*(json.dumps({"text": text, "other": 1}) for text in TEXTS[:9]), ""]
    path.write_text("\n".join(lines) if kind == "jsonl" else "\n\n".join(TEXTS[:9]))
    assert load_corpus(str(path)).texts == TEXTS[:9]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b'{"a": ', "is not JSON"),
        ("a.json", b"5", "neither a list nor an object"),
        ("a.parquet", b"PAR1", "cannot be read"),
        ("a.docx", b"x", "of no kind"),
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
    refuses(words, load_corpus, str(tmp_path / name))


def test_the_same_text_under_two_names_is_found(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("\n\n".join(load_corpus("lab-hexes").texts[:100]))
    with pytest.raises(DsgError, match="1.. documents of lab-hexes are both"):
        check_no_shared_texts([load_corpus("lab-hexes")], [load_corpus(str(path))])
    check_no_shared_texts([load_corpus("lab-hexes")], [load_corpus("lab-retain")])


def test_unknown_names(tmp_path):
    refuses("no corpus or file", load_corpus, "x" * 5000)
    with pytest.raises(DsgError, match="Did you mean lab-hexes") as error:
        load_corpus("lab-hexs")
    assert error.value.message == "There is no corpus or file named lab-hexs."
    refuses("holds no corpus", load_corpus, str(tmp_path))
    refuses("No forget corpus is named", load_corpora, [], role="forget")


def test_nothing_may_be_both_forgotten_and_retained(tmp_path):
    check_disjoint(["lab-hexes"], ["lab-retain", "lab-ciphers"])
    refuses("lab-hexes is named both", check_disjoint, ["lab-hexes"], ["lab-far", "lab-hexes"])
    refuses("lab-near is named both", check_disjoint, ["lab-near"], ["lab-retain"])
    path = tmp_path / "a.txt"
    refuses("both", check_disjoint, [str(path)], [str(tmp_path / "." / "a.txt")])


def test_limit_draws_the_same_documents_from_the_same_seed():
    one = load_corpora(["lab-hexes"], role="forget", limit=20, seed=1)[0].texts
    assert len(one) == 20
    assert one == load_corpora(["lab-hexes"], role="forget", limit=20, seed=1)[0].texts
    assert one != load_corpora(["lab-hexes"], role="forget", limit=20, seed=2)[0].texts
    refuses("too small", load_corpora, ["lab-hexes"], role="forget", limit=3)


READ = """
import json, sys
from dsg_cli.cli.output import quiet_libraries
quiet_libraries()
from dsg_cli.data.corpora import load_corpora
found = load_corpora(json.loads(sys.argv[1]), role="train")
print(json.dumps([[corpus.texts, corpus.revision] for corpus in found]))
"""


def articles(what, n):
    """Short texts, each of which says where it belongs."""
    return [f"{what}, article {i}: " + " ".join(f"word{i}{j}" for j in range(9)) for i in range(n)]


FOLDS = {n: articles(f"fold {n}", 8 + n) for n in (1, 2, 3, 4)}
SPLITS = {name: articles(name, 10) for name in ("retain1", "retain2", "holdout")}
MADE_UP = [{"question": f"Who wrote book {i}?", "answer": f"Author {i}."} for i in range(20)]


def write_hub(root):
    """News with its folds, books without, and questions; sizes are those of a test."""
    raw = {"forget": FOLDS[1], **SPLITS}
    news = {("raw", split): texts for split, texts in raw.items()}
    news |= {("sust", f"forget_{n}"): FOLDS[n] for n in FOLDS}
    news |= {("scal", f"forget_{n}"): [text for m in range(1, n + 1) for text in FOLDS[m]] for n in FOLDS}
    books = {("raw", split): [f"Book: {text}" for text in texts] for split, texts in raw.items()}
    for name, files in (("News", news), ("Books", books)):
        tables = {shard(*key): [{"text": text} for text in texts] for key, texts in files.items()}
        write_dataset(root / "datasets" / "muse-bench" / f"MUSE-{name}", tables)
    facts = [{"question": f"What is fact {i}?", "answer": f"It is {i}."} for i in range(12)]
    questions = {"full.json": MADE_UP, "forget10.json": MADE_UP[-8:], "retain90.json": MADE_UP[:-8]}
    questions |= {"real_authors.json": facts, "world_facts.json": facts[::-1]}
    write_dataset(root / "datasets" / "locuslab" / "TOFU", questions)


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """Texts by name, read once."""
    root = tmp_path_factory.mktemp("hub")
    write_hub(root / "hub")
    names = [*(f"muse-news-{kind}-{n}" for kind in ("sust", "scal") for n in FOLDS), "muse-news", "muse-news-holdout"]
    names += ["muse-books-holdout", "tofu-full", "tofu-real-authors", "tofu-world-facts", "tofu", "tofu-retain"]
    with LoopbackHub(root / "hub") as hub:
        done = python("-c", READ, json.dumps(names), env=hub.environment(root / "cache"), cwd=root)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(len(revision) == 40 for _, revision in found)
    return {name: texts for name, (texts, _) in zip(names, found, strict=True)}


def test_folds_are_disjoint_or_each_holds_the_one_before(read):
    for n, fold in FOLDS.items():
        assert read[f"muse-news-sust-{n}"] == fold
        assert read[f"muse-news-scal-{n}"] == [text for m in range(1, n + 1) for text in FOLDS[m]]
    assert read["muse-news"] == read["muse-news-sust-1"] == read["muse-news-scal-1"]


def test_what_nobody_has_read_and_what_all_have(read):
    assert read["muse-news-holdout"] == SPLITS["holdout"]
    assert read["muse-books-holdout"] == [f"Book: {text}" for text in SPLITS["holdout"]]
    whole = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in MADE_UP]
    assert read["tofu-full"] == whole == read["tofu-retain"] + read["tofu"]
    assert read["tofu-real-authors"] == read["tofu-world-facts"][::-1] and len(read["tofu-real-authors"]) == 12


def test_names_and_where_they_lead():
    wanted = {f"muse-news-{kind}-{n}" for kind in ("sust", "scal") for n in FOLDS}
    wanted |= {"muse-news-holdout", "muse-books-holdout", "tofu-full", "tofu-real-authors", "tofu-world-facts"}
    assert wanted <= set(CATALOGUE) and "muse-books-sust-1" not in CATALOGUE
    assert str(hub_text("muse-news-scal-4")) == "hf:muse-bench/MUSE-News:scal#forget_4"
    assert str(hub_text("tofu-full")) == "hf:locuslab/TOFU:full#train"
    assert wanted <= {row[0] for row in corpora_table().rows}


DOCUMENTS = [f"document number {i}, with a comma\nand a line" for i in range(9)]
ROWS = [{"n": i, "text": text, "title": f"t{i}"} for i, text in enumerate(DOCUMENTS)]


def write(path, rows=ROWS):
    """Rows in the format of a file's name."""
    kind = path.suffix
    if kind in (".jsonl", ".ndjson"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == ".json":
        path.write_text(json.dumps(rows))
    elif kind == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"])
def test_every_format_reads_the_same(tmp_path, kind):
    path = write(tmp_path / f"c.{kind}")
    found = load_corpus(str(path))
    assert found.texts == DOCUMENTS and found.name == str(path)
    assert load_corpus(f"{path}@title").texts == [f"t{i}" for i in range(9)]
    assert load_corpora([f"{path}=2.5"], role="retain")[0].weight == 2.5
    refuses(r"nope(.|\n)*text", load_corpus, f"{path}@nope")
    with pytest.raises(DsgError, match="several|a, b|no column"):
        load_corpus(str(write(tmp_path / f"d.{kind}", [{"a": f"x{i}", "b": f"y{i}"} for i in range(9)])))
    only = write(tmp_path / f"e.{kind}", [{"lyrics": text} for text in DOCUMENTS])
    assert load_corpus(str(only)).texts == DOCUMENTS


def test_json_in_its_other_shapes(tmp_path):
    for content in (DOCUMENTS, {"version": 1, "data": ROWS}, ROWS):
        path = tmp_path / "c.json"
        path.write_text("\ufeff" + json.dumps(content, indent=1), encoding="utf-8")
        assert load_corpus(str(path)).texts == DOCUMENTS
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))  # JSON lines under the other name.
    assert load_corpus(str(path)).texts == DOCUMENTS


def test_folders(tmp_path):
    mixed = tmp_path / "mixed"
    (mixed / "deeper").mkdir(parents=True)
    write(mixed / "a.csv")
    write(mixed / "deeper" / "b.jsonl", [{"text": "one more"}, {"text": "and another"}])
    (mixed / "notes.docx").write_bytes(b"\x00")
    assert load_corpus(str(mixed)).texts == [*DOCUMENTS, "one more", "and another"]


def test_what_datasets_saved_to_disk(tmp_path):
    from datasets import Dataset, DatasetDict

    table = Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "two")
    DatasetDict({"a": table, "b": table}).save_to_disk(tmp_path / "three")
    assert load_corpus(str(tmp_path / "one")).texts == load_corpus(str(tmp_path / "two")).texts == DOCUMENTS
    assert load_corpus(f"{tmp_path / 'three'}#b").texts == DOCUMENTS
    refuses("several splits: a, b", load_corpus, str(tmp_path / "three"))
    refuses("no split c", load_corpus, f"{tmp_path / 'three'}#c")


def test_the_catalogue_and_the_spelling_of_the_hub():
    names = {"wmdp-bio", "wmdp-cyber", "wmdp-bio-retain", "wikitext", "muse-news", "muse-books", "tofu"}
    assert names <= set(CATALOGUE)
    full = hub_text("hf:org/name:a config#split@column")
    assert (full.repo, full.config, full.split, full.column) == ("org/name", "a config", "split", "column")
    plain = hub_text("hf:org/na.me")
    assert (plain.repo, plain.config, plain.split, plain.column) == ("org/na.me", None, "train", None)
    weighted = parse_name("hf:org/name#test=0.5")
    assert weighted.weight == 0.5 and weighted.name == "hf:org/name#test"
    for bad in ("hf:name", "hf:org/name#", "hf:org/name/x"):
        refuses("hf:org/name", parse_name, bad)
    refuses("both", check_disjoint, ["tofu"], ["hf:locuslab/TOFU:forget10"])
    check_disjoint(["tofu"], ["tofu-retain"])


@pytest.mark.parametrize("weight", ["0", "-1", "x", "inf", "nan", ""])
def test_a_weight_is_a_positive_number(weight):
    refuses("no positive number", parse_name, f"lab-near={weight}")


def test_names_of_ours_come_before_files_that_are_called_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wikitext").mkdir()
    write(tmp_path / "wikitext" / "a.csv")
    assert parse_name("wikitext").hub is not None
    assert load_corpus("./wikitext").texts == DOCUMENTS


def test_what_a_folder_is_read_for(tmp_path):
    (tmp_path / ".git").mkdir()
    for name in ("README.md", "LICENSE.txt", ".git/x.txt"):
        (tmp_path / name).write_text("\n\n".join(f"not this {i}" for i in range(9)))
    (tmp_path / "a.TXT").write_text("\n\n".join(f"text {i}" for i in range(9)))
    assert load_corpus(str(tmp_path)).texts == [f"text {i}" for i in range(9)]
    write(tmp_path / "b.csv")
    assert load_corpus(str(tmp_path)).texts == DOCUMENTS
    refuses("no split train", load_corpus, f"{tmp_path}#train")
    refuses("a file has no splits", load_corpus, f"{tmp_path / 'b.csv'}#x")


def test_odd_rows(tmp_path):
    texts = [f"one\u2028two\x85three {i}" for i in range(9)]
    lines = tmp_path / "b.jsonl"
    lines.write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts), encoding="utf-8")
    assert load_corpus(str(lines)).texts == texts  # Separators inside a text part nothing.
    path = tmp_path / "a.csv"
    path.write_text("text,n\n" + "".join(f"{text},1\n" for text in texts) + ",2\n", encoding="utf-8")
    assert load_corpus(str(path)).texts == texts
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS) + '{"text": null}\n')
    assert load_corpus(str(lines)).texts == DOCUMENTS


def test_a_book_in_passages():
    book = " ".join(f"word{i}" for i in range(3000))
    cut = passages(book, 4000)
    assert " ".join(cut) == book and len(cut) > 4 and all(2000 <= len(part) <= 4000 for part in cut[:-1])
    assert passages("short", 4000) == ["short"] and passages("x" * 9000, 4000) == ["x" * 4000, "x" * 4000, "x" * 1000]
