"""Names and files to texts, and the split of every corpus into parts that never share a document.

A document's part (`select`, `calibrate`, `fresh`) follows from a hash of its text alone: whatever the order, the
seed or the mixture in which corpora are given, a text that selected features never calibrates them.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from dsg_cli.data.catalogue import CATALOGUE, HubText, hub_text
from dsg_cli.data.hub import read_hub
from dsg_cli.data.readers import READERS, Documents, listed, read_file, read_folder
from dsg_cli.errors import DsgError, nearest
from dsg_cli.lab import data as lab
from dsg_cli.workspace.body import Json

Part = Literal["select", "calibrate", "fresh"]
PARTS: tuple[tuple[Part, float], ...] = (("select", 0.5), ("calibrate", 0.8), ("fresh", 1.0))
"""Parts and their cumulative shares."""

MIN_DOCUMENTS = 8
SHARED_AT_MOST = 0.1
BLOCK = 1024  # Documents read at a time, while documents are drawn.
COMPOSED = {"lab-retain": ("lab-near", "lab-far")}
"""Corpora that contain others, for the check that nothing is both forgotten and retained."""


@dataclass(frozen=True)
class Corpus:
    """A named list of documents."""

    name: str
    texts: list[str]
    sha256: str
    """Digest of the texts."""
    revision: str = ""
    """Commit of the repository that they came from."""
    weight: float | None = None
    """Its share in a mixture, in proportion to the others'; None counts every token alike."""
    is_chat: bool = False
    """Each text is what a user says."""

    def part(self, part: Part) -> list[str]:
        return [text for text in self.texts if part_of(text) == part]

    def described(self) -> Json:
        """What an artifact says of it."""
        optional = {"revision": self.revision, "weight": self.weight}
        return {"name": self.name, "sha256": self.sha256, "documents": len(self.texts)} | {
            key: value for key, value in optional.items() if value
        }


@dataclass(frozen=True)
class CorpusName:
    """A corpus as it was named: `NAME`, `NAME=WEIGHT`, `PATH@column`, `FOLDER#split`."""

    name: str  # What later stages call it: names as they are, files by their absolute path.
    weight: float | None = None
    hub: HubText | None = None
    path: Path | None = None
    column: str | None = None
    split: str | None = None


def part_of(text: str) -> Part:
    """The part that a document belongs to: 50 % select, 30 % calibrate, 20 % fresh."""
    position = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    return next(part for part, share in PARTS if position < share)


def load_corpora(
    names: Sequence[str],
    *,
    role: str,
    limit: int | None = None,
    seed: int = 0,
    revisions: Mapping[str, str] | None = None,
) -> list[Corpus]:
    """Corpora of the lab, of the catalogue, on the hub, or in local files and folders; `=WEIGHT` may follow a name.

    At most `limit` documents of each are drawn at random; `revisions` are commits of data sets of the hub, by name.
    """
    check_named(names, role=role)
    if limit is not None and limit < MIN_DOCUMENTS:
        raise DsgError(f"--limit {limit} is too small; at least {MIN_DOCUMENTS} documents are needed.")
    revisions = revisions or {}
    return [_load(name, limit, seed, revisions.get(name.name)) for name in map(parse_name, names)]


def load_corpus(name: str) -> Corpus:
    """Read one corpus, whole."""
    return load_corpora([name], role="retain")[0]


def parse_name(name: str) -> CorpusName:
    """A corpus by its name; nothing is read."""
    if (known := _known(name)) is not None:
        return known
    stem, separator, weight = name.rpartition("=")
    if separator and (known := _known(stem)) is not None:
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise DsgError(f"{name}: the weight {weight!r} is no positive number.", f"Write {stem}=0.5, for example.")
        return replace(known, weight=value)
    raise DsgError(
        f"There is no corpus or file named {name[:200]}.",
        f"{nearest(name[:200], [*lab.CORPORA, *CATALOGUE])} Or give a file ({', '.join(READERS)}), a folder, or "
        "hf:org/name[:config][#split][@column].",
    )


def _known(name: str) -> CorpusName | None:
    """A name of ours before a file that happens to be called so: `./wikitext` is the file."""
    if name in lab.CORPORA:
        return CorpusName(name, path=lab.corpus_path(name))
    if name in CATALOGUE or (name.startswith("hf:") and "=" not in name):
        return CorpusName(name, hub=hub_text(name))
    if (path := _existing(name)) is not None:
        return CorpusName(str(path), path=path)
    match = re.fullmatch(r"(?P<path>.+?)(?:#(?P<split>[^#@]+))?(?:@(?P<column>[^#@]+))?", name, flags=re.DOTALL)
    if match is not None and (path := _existing(match["path"])) is not None:
        full = f"{path}{name[len(match['path']) :]}"
        return CorpusName(full, path=path, column=match["column"], split=match["split"])
    return None


def _existing(name: str) -> Path | None:
    try:
        path = Path(name).resolve()
        return path if name and path.exists() else None
    except (OSError, ValueError):  # A name too long for a path, or one with a NUL.
        return None


def _load(named: CorpusName, limit: int | None, seed: int, revision: str | None) -> Corpus:
    hub = named.hub
    if hub is not None:
        documents = read_hub(hub, revision=revision)
    else:
        assert named.path is not None
        if named.path.is_dir():
            documents = read_folder(named.path, named.column, named.split)
        elif named.split:
            raise DsgError(f"{named.name}: a file has no splits.", "Leave out what follows the #.")
        else:
            documents = read_file(named.path, named.column)
    texts = _draw(documents, limit, seed, min_chars=hub.min_chars if hub else 0)
    if hub is not None and hub.passage_chars:
        texts = [passage for text in texts for passage in passages(text, hub.passage_chars)]
        texts = _draw(listed(texts), limit, seed, min_chars=0)
    if not texts:
        raise DsgError(f"The corpus {named.name} is empty.")
    if len(set(texts)) < MIN_DOCUMENTS:
        raise DsgError(
            f"The corpus {named.name} has {len(set(texts))} different documents; at least {MIN_DOCUMENTS} are needed.",
            "In a .txt file, documents are separated by blank lines.",
        )
    digest = hashlib.sha256(b"".join(hashlib.sha256(text.encode()).digest() for text in texts)).hexdigest()
    is_chat = hub is not None and hub.is_chat
    return Corpus(named.name, texts, digest, documents.revision, named.weight, is_chat)


def passages(text: str, n_chars: int) -> list[str]:
    """A book in passages of about so many characters, cut at white space."""
    parts = []
    while len(text) > n_chars:
        cut = text.rfind(" ", n_chars // 2, n_chars)
        cut = cut if cut > 0 else n_chars
        parts.append(text[:cut].strip())
        text = text[cut:]
    return [*parts, text.strip()]


def _draw(documents: Documents, limit: int | None, seed: int, *, min_chars: int) -> list[str]:
    """Documents that hold text, all or so many drawn at random, in the corpus's order; no others stay in memory."""
    order = list(range(documents.n))
    if limit is not None and limit < documents.n:
        random.Random(seed).shuffle(order)
    kept: dict[int, str] = {}
    for start in range(0, len(order), BLOCK):
        block = sorted(order[start : start + BLOCK])
        for i, text in zip(block, documents.take(block), strict=True):
            if len(text) >= min_chars and (text := text.strip()):
                kept[i] = text
        if limit is not None and len(kept) >= limit:
            break
    drawn = [i for i in order if i in kept][:limit]
    return [kept[i] for i in sorted(drawn)]


def check_disjoint(forget: Sequence[str], retain: Sequence[str]) -> None:
    """Refuse a corpus that is both to be forgotten and retained."""
    both = sorted(_expanded(forget) & _expanded(retain))
    if both:
        raise DsgError(f"{both[0]} is named both to be forgotten and to be retained.", "Drop it from one of the two.")


def check_no_shared_texts(forget: Sequence[Corpus], retain: Sequence[Corpus]) -> None:
    """Refuse a forget corpus of which a tenth is retained too, whatever the files are called.

    A few documents may coincide: boilerplate stands in any two corpora.
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
    """What each name stands for: a data set on the hub under all its names, the parts of a composed corpus."""
    stands_for: set[str] = set()
    for name in names:
        try:
            corpus = parse_name(name)
        except DsgError:  # A later stage compares with names whose files may be gone by then.
            corpus = CorpusName(name)
        stands_for |= {str(corpus.hub) if corpus.hub else corpus.name, *COMPOSED.get(corpus.name, ())}
    return stands_for


def check_named(names: Sequence[str], *, role: str) -> None:
    """Refuse unknown corpora, or none at all, without reading any."""
    if not names:
        raise DsgError(f"No {role} corpus is named.", f"Give one with --{role}: `dsg ls corpora` lists them.")
    for name in names:
        parse_name(name)
