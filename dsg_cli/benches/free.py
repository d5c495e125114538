"""Names of benches on free text to the benches: their data from the hub, from the lab, or from a corpus."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from dsg_cli.benches.muse import Muse
from dsg_cli.benches.names import CORPUS_BENCHES, MUSE, TOFU, is_free
from dsg_cli.benches.passages import MOST, Fluency, Memory
from dsg_cli.benches.text import TextBench
from dsg_cli.benches.tofu import Tofu
from dsg_cli.corpora import load_corpus
from dsg_cli.errors import DsgError
from dsg_cli.hub_data import commit_read, load_rows

LAB_VERBATIM, LAB_ANSWER = 2, 8
"""Tokens that are written in the lab: a value with its full stop, and an answer, which ends with one."""


def load_free(
    benches: Sequence[str],
    *,
    split: str,
    limit: int | None = None,
    holdout: Sequence[str] = (),
    seed: int = 0,
) -> tuple[list[TextBench], dict[str, str]]:
    """Those benches among some that are on free text, their data read, and the commits of the hub that they came from.

    Args:
        benches: Names.
        split: `dev` or `test`; for the lab's benches.
        limit: Items of each part, at most.
        holdout: Corpora that the model never saw, for `memory:`.
        seed: Of the texts that are taken of a long corpus.

    Raises:
        DsgError: Missing data, columns or access; an empty part; a holdout corpus that nothing reads.
    """
    names = [name for name in benches if is_free(name)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DsgError(f"The bench {twice[0]} is named twice.")
    for name in names:
        check_corpus_bench(name)
    if holdout and not any(name.startswith("memory:") for name in names):
        raise DsgError("eval.holdout is for benches memory:CORPUS.", "Name one, or leave it out.")
    commits: dict[str, str] = {}
    found: list[TextBench] = []
    for name in names:
        bench = _bench(name, split, limit, holdout, seed, commits)
        if not bench.items():
            raise DsgError(f"The bench {name} has no questions.")
        found.append(bench)
    return found, commits


def _bench(
    name: str, split: str, limit: int | None, holdout: Sequence[str], seed: int, commits: dict[str, str]
) -> TextBench:
    if name in MUSE:
        if name == "lab-muse":
            from dsg_cli.lab.benchmarks import rows as lab_rows

            return Muse(
                name,
                lambda config, part: lab_rows("muse", config, part, part=split),  # type: ignore[arg-type]
                asked="{question}",
                shown="{question} {answer} ",
                stop=(".",),
                n_verbatim=LAB_VERBATIM,
                n_answer=LAB_ANSWER,
                limit=limit,
            )
        return Muse(name, _rows_of(MUSE[name], commits, name), limit=limit)
    if name in TOFU:
        repo, forget = TOFU[name]
        if name == "lab-tofu":
            from dsg_cli.lab.benchmarks import rows as lab_rows

            return Tofu(
                name,
                forget,
                lambda config: lab_rows("tofu", config, "train", part=split),  # type: ignore[arg-type]
                asked="{question}",
                stop=(".",),
                n_new=LAB_ANSWER,
                limit=limit,
            )
        rows = _rows_of(repo, commits, name)
        return Tofu(name, forget, lambda config: rows(config, "train"), limit=limit)
    kind, _, corpus = name.partition(":")
    texts = _texts(corpus, limit, seed)
    if kind == "fluency":
        return Fluency(name, texts)
    return Memory(name, texts, [text for one in holdout for text in _texts(one, limit, seed)])


def _rows_of(repo: str, commits: dict[str, str], name: str) -> Any:
    kept: dict[tuple[str, str], Any] = {}

    def rows(config: str, split: str) -> Any:
        if (config, split) not in kept:
            read = load_rows(repo, config, split)
            commits[name] = commit_read(read)
            kept[config, split] = read.to_list()
        return kept[config, split]

    return rows


def _texts(name: str, limit: int | None, seed: int) -> list[str]:
    """Texts of a corpus, at most so many, drawn at random."""
    texts = [text for text in load_corpus(name).texts if len(text.split()) > 1]
    n = min(len(texts), limit or MOST)
    return [texts[i] for i in sorted(random.Random(seed).sample(range(len(texts)), n))]


def check_corpus_bench(name: str) -> None:
    """Refuse a name that says no corpus.

    Raises:
        DsgError: Nothing follows the colon.
    """
    kind, _, corpus = name.partition(":")
    if kind in CORPUS_BENCHES and not corpus:
        raise DsgError(f"The bench {name} names no corpus.", f"Write {kind}:CORPUS, such as {kind}:lab-hexes.")
