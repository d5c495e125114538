"""Names of benchmark corpora, read by the real libraries from data sets of those names on a loopback hub."""

import json

import pytest
from conftest import python
from dsg_cli.catalogue import CATALOGUE, hub_text
from loopback import LoopbackHub
from realnames import shard, write_dataset

from dsg_cli.report.tables import corpora_table

READ = """
import json, sys
from dsg_cli.cli.app import quiet_libraries
quiet_libraries()
from dsg_cli.corpora import load_corpora
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
    table = next(one for one in corpora_table().renderables if hasattr(one, "columns"))
    assert wanted <= {str(cell) for cell in table.columns[0].cells}
