"""Names and files to texts, and the split of every corpus into parts that never share a document.

A document's part (`select`, `calibrate`, `fresh`) follows from a hash of its text alone: whatever the order, the
seed or the mixture in which corpora are given, a text that selected features never calibrates them.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from dsg_cli.errors import DsgError, nearest
from dsg_cli.lab import data as lab

Part = Literal["select", "calibrate", "fresh"]
PARTS: tuple[tuple[Part, float], ...] = (("select", 0.5), ("calibrate", 0.8), ("fresh", 1.0))
"""Parts and their cumulative shares."""
MIN_DOCUMENTS = 8
SHARED_AT_MOST = 0.1
COMPOSED = {"lab-retain": ("lab-near", "lab-far")}
"""Corpora that contain others, for the check that nothing is both forgotten and retained."""


@dataclass(frozen=True)
class Corpus:
    """A named list of documents."""

    name: str
    texts: list[str]
    sha256: str

    def part(self, part: Part) -> list[str]:
        """The documents of one part, in the corpus's order."""
        return [text for text in self.texts if part_of(text) == part]


def part_of(text: str) -> Part:
    """The part that a document belongs to: 50 % select, 30 % calibrate, 20 % fresh."""
    position = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    return next(part for part, share in PARTS if position < share)


def load_corpora(names: Sequence[str], *, role: str, limit: int | None = None, seed: int = 0) -> list[Corpus]:
    """Read several corpora.

    Args:
        names: Lab corpora or local files.
        role: `forget` or `retain`, for error messages.
        limit: At most so many documents of each, drawn at random.
        seed: Of that draw.

    Raises:
        DsgError: None named, unknown, unreadable, empty or tiny.
    """
    if not names:
        raise DsgError(f"No {role} corpus is named.", f"Give one with --{role}, for example --{role} lab-hexes.")
    corpora = [load_corpus(name) for name in names]
    if limit is None:
        return corpora
    if limit < MIN_DOCUMENTS:
        raise DsgError(f"--limit {limit} is too small; at least {MIN_DOCUMENTS} documents are needed.")
    return [_sample(corpus, limit, seed) for corpus in corpora]


def _sample(corpus: Corpus, limit: int, seed: int) -> Corpus:
    kept = random.Random(seed).sample(range(len(corpus.texts)), min(limit, len(corpus.texts)))
    return replace(corpus, texts=[corpus.texts[i] for i in sorted(kept)])


def check_disjoint(forget: Sequence[str], retain: Sequence[str]) -> None:
    """Refuse a corpus that is both to be forgotten and retained.

    Raises:
        DsgError: One is.
    """
    both = sorted(_expanded(forget) & _expanded(retain))
    if both:
        raise DsgError(f"{both[0]} is named both to be forgotten and to be retained.", "Drop it from one of the two.")


def check_no_shared_texts(forget: Sequence[Corpus], retain: Sequence[Corpus]) -> None:
    """Refuse a forget corpus of which a tenth is retained too, whatever the files are called.

    A few documents may coincide: boilerplate stands in any two corpora.

    Raises:
        DsgError: There is one.
    """
    kept = {text: corpus.name for corpus in retain for text in corpus.texts}
    for corpus in forget:
        shared = [text for text in corpus.texts if text in kept]
        if len(shared) > SHARED_AT_MOST * len(corpus.texts):
            raise DsgError(
                f"{len(shared)} documents of {corpus.name} are both to be forgotten and to be retained: "
                f"{kept[shared[0]]} has them too.",
                "Drop them from one of the two.",
            )


def _expanded(names: Sequence[str]) -> set[str]:
    parts = {part for name in names for part in COMPOSED.get(name, ())}
    files = {str(Path(name).resolve()) for name in names if name not in lab.CORPORA}
    return parts | files | {name for name in names if name in lab.CORPORA}


def check_names(names: Sequence[str]) -> None:
    """Refuse unknown corpora without reading any.

    Raises:
        DsgError: A name is neither a corpus of the lab nor an existing file.
    """
    for name in names:
        if name in lab.CORPORA or (os.path.isfile(name) and name):  # noqa: PTH113 - Path raises on very long names
            continue
        if os.path.isdir(name):  # noqa: PTH112 - the same
            raise DsgError(f"The corpus {name} is a folder.", "Give a .jsonl or .txt file.")
        raise DsgError(
            f"There is no corpus or file named {name}.",
            f'{nearest(name, lab.CORPORA)} Or give a .jsonl file of {{"text": ...}} lines, or a .txt file.',
        )


def load_corpus(name: str) -> Corpus:
    """Read a corpus of the lab, a JSON lines file with a `text` field, or a text file (blank lines part documents).

    Raises:
        DsgError: Unknown, unreadable, not text, empty or tiny.
    """
    check_names([name])
    path = lab.corpus_path(name) if name in lab.CORPORA else Path(name)
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DsgError(f"{path} is not UTF-8 text (byte {error.start}).", "Give a .jsonl or .txt file.") from error
    except OSError as error:
        raise DsgError(f"{path} cannot be read: {error.strerror}.") from error
    if "\x00" in content:
        raise DsgError(f"{path} is not a text file: it has NUL bytes.", "Give a .jsonl or .txt file.")
    texts = _json_lines(path, content) if path.suffix in {".jsonl", ".json"} else content.split("\n\n")
    texts = [text.strip() for text in texts if text.strip()]
    if not texts:
        raise DsgError(f"The corpus {name} is empty.")
    if len(set(texts)) < MIN_DOCUMENTS:
        raise DsgError(
            f"The corpus {name} has {len(set(texts))} different documents; at least {MIN_DOCUMENTS} are needed.",
            "In a .txt file, documents are separated by blank lines.",
        )
    # Files by their absolute path: later stages may run from another folder.
    known_as = name if name in lab.CORPORA else str(path.resolve())
    return Corpus(name=known_as, texts=texts, sha256=hashlib.sha256(content.encode()).hexdigest())


def _json_lines(path: Path, content: str) -> list[str]:
    texts = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DsgError(f"{path}, line {number} is not JSON: {error.msg}.") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise DsgError(f'{path}, line {number} has no "text" string; found: {found}.')
        if any("\ud800" <= character <= "\udfff" for character in row["text"]):
            raise DsgError(f"{path}, line {number} holds half of a surrogate pair, which is no text.")
        texts.append(row["text"])
    return texts
