"""Every format of a local corpus, how its text column is found, and names of data sets on the hub."""

import csv
import json

import pytest
from dsg_cli.catalogue import CATALOGUE, hub_text
from dsg_cli.corpora import check_disjoint, load_corpora, load_corpus, parse_name, passages

from dsg_cli.errors import DsgError

TEXTS = [f"document number {i}, with a comma\nand a line" for i in range(9)]
ROWS = [{"n": i, "text": text, "title": f"t{i}"} for i, text in enumerate(TEXTS)]


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
    assert found.texts == TEXTS and found.name == str(path)
    assert load_corpus(f"{path}@title").texts == [f"t{i}" for i in range(9)]
    assert load_corpora([f"{path}=2.5"], role="retain")[0].weight == 2.5
    with pytest.raises(DsgError, match=r"nope(.|\n)*text"):
        load_corpus(f"{path}@nope")
    with pytest.raises(DsgError, match="several|a, b|no column"):
        load_corpus(str(write(tmp_path / f"d.{kind}", [{"a": f"x{i}", "b": f"y{i}"} for i in range(9)])))
    only = write(tmp_path / f"e.{kind}", [{"lyrics": text} for text in TEXTS])
    assert load_corpus(str(only)).texts == TEXTS


def test_json_in_its_other_shapes(tmp_path):
    for content in (TEXTS, {"version": 1, "data": ROWS}, ROWS):
        path = tmp_path / "c.json"
        path.write_text("\ufeff" + json.dumps(content, indent=1), encoding="utf-8")
        assert load_corpus(str(path)).texts == TEXTS
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))  # JSON lines under the other name.
    assert load_corpus(str(path)).texts == TEXTS
    path.write_text('{"a": ')
    with pytest.raises(DsgError, match="is not JSON"):
        load_corpus(str(path))


def test_folders(tmp_path):
    mixed = tmp_path / "mixed"
    (mixed / "deeper").mkdir(parents=True)
    write(mixed / "a.csv")
    write(mixed / "deeper" / "b.jsonl", [{"text": "one more"}, {"text": "and another"}])
    (mixed / "notes.docx").write_bytes(b"\x00")
    assert load_corpus(str(mixed)).texts == [*TEXTS, "one more", "and another"]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(DsgError, match="cannot be read"):
        load_corpus(str(tmp_path / "bad.parquet"))


def test_what_datasets_saved_to_disk(tmp_path):
    from datasets import Dataset, DatasetDict

    table = Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "two")
    DatasetDict({"a": table, "b": table}).save_to_disk(tmp_path / "three")
    assert load_corpus(str(tmp_path / "one")).texts == load_corpus(str(tmp_path / "two")).texts == TEXTS
    assert load_corpus(f"{tmp_path / 'three'}#b").texts == TEXTS
    with pytest.raises(DsgError, match="several splits: a, b"):
        load_corpus(str(tmp_path / "three"))
    with pytest.raises(DsgError, match="no split c"):
        load_corpus(f"{tmp_path / 'three'}#c")


def test_the_catalogue_and_the_spelling_of_the_hub():
    assert {"wmdp-bio", "wmdp-cyber", "wmdp-bio-retain", "wikitext", "muse-news", "muse-books", "tofu"} <= set(
        CATALOGUE
    )
    full = hub_text("hf:org/name:a config#split@column")
    assert (full.repo, full.config, full.split, full.column) == ("org/name", "a config", "split", "column")
    plain = hub_text("hf:org/na.me")
    assert (plain.repo, plain.config, plain.split, plain.column) == ("org/na.me", None, "train", None)
    weighted = parse_name("hf:org/name#test=0.5")
    assert weighted.weight == 0.5 and weighted.name == "hf:org/name#test"
    for bad in ("hf:name", "hf:org/name#", "hf:org/name/x"):
        with pytest.raises(DsgError, match="hf:org/name"):
            parse_name(bad)
    with pytest.raises(DsgError, match="both"):
        check_disjoint(["tofu"], ["hf:locuslab/TOFU:forget10"])
    check_disjoint(["tofu"], ["tofu-retain"])


@pytest.mark.parametrize("weight", ["0", "-1", "x", "inf", "nan", ""])
def test_a_weight_is_a_positive_number(weight):
    with pytest.raises(DsgError, match="no positive number"):
        parse_name(f"lab-near={weight}")


def test_names_of_ours_come_before_files_that_are_called_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wikitext").mkdir()
    write(tmp_path / "wikitext" / "a.csv")
    assert parse_name("wikitext").hub is not None
    assert load_corpus("./wikitext").texts == TEXTS


def test_what_a_folder_is_read_for(tmp_path):
    (tmp_path / ".git").mkdir()
    for name in ("README.md", "LICENSE.txt", ".git/x.txt"):
        (tmp_path / name).write_text("\n\n".join(f"not this {i}" for i in range(9)))
    (tmp_path / "a.TXT").write_text("\n\n".join(f"text {i}" for i in range(9)))
    assert load_corpus(str(tmp_path)).texts == [f"text {i}" for i in range(9)]
    write(tmp_path / "b.csv")
    assert load_corpus(str(tmp_path)).texts == TEXTS
    for name, words in ((f"{tmp_path}#train", "no split train"), (f"{tmp_path / 'b.csv'}#x", "a file has no splits")):
        with pytest.raises(DsgError, match=words):
            load_corpus(name)
    (tmp_path / "c.docx").write_bytes(b"x")
    with pytest.raises(DsgError, match="of no kind"):
        load_corpus(str(tmp_path / "c.docx"))


def test_odd_rows(tmp_path):
    texts = [f"hello\u2028world {i}" for i in range(9)]
    path = tmp_path / "a.csv"
    path.write_text("text,n\n" + "".join(f"{text},1\n" for text in texts) + ",2\n", encoding="utf-8")
    assert load_corpus(str(path)).texts == texts
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS) + '{"text": null}\n')
    assert load_corpus(str(lines)).texts == TEXTS
    (tmp_path / "a.json").write_text("5")
    with pytest.raises(DsgError, match="neither a list nor an object"):
        load_corpus(str(tmp_path / "a.json"))


def test_a_book_in_passages():
    book = " ".join(f"word{i}" for i in range(3000))
    cut = passages(book, 4000)
    assert " ".join(cut) == book and len(cut) > 4 and all(2000 <= len(part) <= 4000 for part in cut[:-1])
    assert passages("short", 4000) == ["short"] and passages("x" * 9000, 4000) == ["x" * 4000, "x" * 4000, "x" * 1000]
