"""Descriptions of an SAE's features from a file of anybody's: what each is said to be about.

Read are JSON lines (Neuronpedia's export, or what `dsg describe` writes), a JSON array of the same objects, and CSV
with the columns `index` and `description`; each may be gzipped. An object has `index`, a number or its digits, and
either `description` or Neuronpedia's nested `explanations: [{description}]`. Several descriptions of one feature are
joined. Control characters and broken ones become spaces, invisible ones go.
"""

from __future__ import annotations

import csv
import hashlib
import io
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsg_cli.errors import DsgError, reason_of
from dsg_cli.job import Report, silent
from dsg_cli.workspace.body import Json
from dsg_cli.workspace.files import parse_json, read_bounded

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 512 * 2**20
"""Bytes of a file, and of what it holds once unpacked, at most."""

LONGEST = 2000
"""Characters of a feature's description that are kept."""
DIGITS = 9
"""Of an index, at most."""
FORMS = (
    "Give JSON lines or a JSON array of {index, description}, or CSV with these columns; dsg describe makes the first."
)


@dataclass(frozen=True)
class Descriptions:
    """What features are said to be about."""

    texts: dict[int, str]
    source: str
    sha256: str


def read_descriptions(path: Path, n_features: int, *, source: str = "", may_be_empty: bool = False) -> Descriptions:
    """The descriptions in a file, of an SAE with `n_features`.

    `source` is what the file is called later, by default its name; only a part of several files may describe nothing.
    """
    content = read_bounded(path, LARGEST)
    texts: dict[int, list[str]] = {}
    for number, (index, value) in enumerate(_rows(path, _text(path, content)), start=1):
        j = _index(index)
        if j is None:
            raise DsgError(f"{path}, entry {number}: the index is no whole number.", FORMS)
        if j >= n_features:
            hint = "Take the descriptions of this very SAE."
            raise DsgError(f"{path} describes feature {j}; the SAE has {n_features:,}.", hint)
        known = texts.setdefault(j, [])
        known += [text for text in map(cleaned, _texts_of(path, number, value)) if text and text not in known]
    described = {j: "; ".join(known)[:LONGEST] for j, known in sorted(texts.items()) if known}
    if not described and not may_be_empty:
        raise DsgError(f"{path} describes no feature.", FORMS)
    return Descriptions(described, source or path.name, hashlib.sha256(content).hexdigest())


def cleaned(text: str) -> str:
    """A text on one line, without control characters and halves of characters, and none that only directs others."""
    if not (text.isascii() and text.isprintable()):
        kinds = ((character, unicodedata.category(character)) for character in text)
        text = "".join(character if kind[0] != "C" else "" if kind == "Cf" else " " for character, kind in kinds)
    return " ".join(text.split())


def _text(path: Path, content: bytes) -> str:
    try:
        return (_unpacked(path, content) if content[:2] == b"\x1f\x8b" else content).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DsgError(f"{path} is not UTF-8 text (byte {error.start}).", FORMS) from error


def _unpacked(path: Path, content: bytes) -> bytes:
    """What gzip packed, one file or several one after another; never more than is allowed."""
    parts, n_bytes = [], 0
    while content:
        packed = zlib.decompressobj(wbits=31)
        try:
            parts.append(packed.decompress(content, LARGEST + 1 - n_bytes))
            n_bytes += len(parts[-1])
            if n_bytes > LARGEST:
                raise DsgError(f"{path} holds more than {LARGEST:,} bytes once unpacked.", "Give a part of it.")
            if not packed.eof:
                raise zlib.error
        except zlib.error as error:
            raise DsgError(f"{path} is no whole gzip file.", "Fetch or make it again.") from error
        content = packed.unused_data
    return b"".join(parts)


def _rows(path: Path, text: str) -> Iterator[tuple[Any, Any]]:
    """Index and what is said of it, for each entry."""
    first = text.lstrip()[:1]
    if first not in ("[", "{"):
        yield from _columns(path, text)
        return
    # Not splitlines: a description may hold one of the other characters that end lines.
    lines = [text] if first == "[" else [line for line in text.split("\n") if line.strip()]
    for number, line in enumerate(lines, start=1):
        try:
            entries = parse_json(line)
        except ValueError as error:
            part = "the whole" if first == "[" else f"entry {number}"
            raise DsgError(f"{path}: {part} is no JSON.", FORMS) from error
        for place, entry in enumerate(entries if first == "[" else [entries], start=number):
            if not isinstance(entry, dict) or "index" not in entry or not {"description", "explanations"} & set(entry):
                raise DsgError(f"{path}, entry {place} has no index or no description.", FORMS)
            yield entry["index"], entry["description"] if "description" in entry else entry["explanations"]


def _columns(path: Path, text: str) -> Iterator[tuple[Any, Any]]:
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        if not {"index", "description"} <= set(rows.fieldnames or ()):
            raise DsgError(f"{path} is of no form that is known here.", FORMS)
        for row in rows:
            yield row["index"], row["description"]
    except csv.Error as error:
        raise DsgError(f"{path} is no CSV: {error}.", FORMS) from error


def _index(value: Any) -> int | None:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= DIGITS:
        return int(value)
    return value if type(value) is int and 0 <= value < 10**DIGITS else None


def _texts_of(path: Path, number: int, value: Any) -> list[str]:
    """The descriptions in an entry; null is none."""
    values = value if isinstance(value, list) else [value]
    texts = [part.get("description") if isinstance(part, dict) else part for part in values]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise DsgError(f"{path}, entry {number}: the description is no text.", FORMS)
    return [text for text in texts if text]


K1, B = 1.5, 0.75
_STOP_WORDS = (
    "a about after all also an and any are as at be because been before being between both but by can could did do "
    "does each etc for from had has have he her his how i if in into is it its like may more most no not of on one "
    "only or other our out over she should so some such than that the their them then there these they this those to "
    "up us was we were what when where which while who will with would you your"
)
STOP_WORDS = frozenset(_STOP_WORDS.split())


@dataclass(frozen=True)
class Match:
    """A feature whose description matches."""

    index: int
    score: float


def terms_of(text: str) -> list[str]:
    """The terms of a text, in order."""
    from dsg_cli.data.tokens import words_of

    return [_stem(word) for word in words_of(text) if word not in STOP_WORDS]


def _stem(word: str) -> str:
    if len(word) <= 3:
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    return word[:-1] if word.endswith("e") and len(word) > 3 else word


def rank_by_terms(query: str, descriptions: Mapping[int, str]) -> list[Match]:
    """Every feature whose description shares a term with the query, the best first by BM25."""
    import bm25s

    query_terms = list(dict.fromkeys(terms_of(query)))
    if not query_terms:
        raise DsgError(f"The query {query[:100]!r} holds no word that tells anything.", "Name what is to be forgotten.")
    indices = sorted(descriptions)
    documents = [terms_of(descriptions[j]) for j in indices]
    known_terms = [term for term in query_terms if any(term in terms for terms in documents)]
    if not known_terms:
        hint = "Describe it in other words, or rank by --embedding NAME."
        raise DsgError(f"No description matches {query[:100]!r}.", hint)
    ranker = bm25s.BM25(k1=K1, b=B, method="lucene", dtype="float64")
    ranker.index(documents, show_progress=False)
    scores = ranker.get_scores(known_terms)
    return ranked({j: float(score) for j, score in zip(indices, scores, strict=True) if score > 0})


def ranked(scores: Mapping[int, float]) -> list[Match]:
    """Features by score, the highest first; of equal ones the smaller index."""
    return [Match(j, scores[j]) for j in sorted(scores, key=lambda j: (-scores[j], j))]


def unmatched(query: str, descriptions: Iterable[str]) -> list[str]:
    """The query's words that stand in none of the descriptions."""
    from dsg_cli.data.tokens import words_of

    known = {term for text in descriptions for term in terms_of(text)}
    return [word for word in dict.fromkeys(words_of(query)) if word not in STOP_WORDS and _stem(word) not in known]


BATCH = 32
LONGEST_EMBEDDED = 512
"""Tokens of a text, at most."""


def rank_by_embedding(
    query: str, descriptions: Mapping[int, str], name: str, *, device: str = "cpu", report: Report = silent
) -> list[Match]:
    """Every feature, by the cosine of its description to the query.

    The embedding model `name` is a folder, org/name or org/name@revision.
    """
    import torch

    indices = sorted(descriptions)
    with torch.inference_mode():
        vectors_ND = _embedded([query, *(descriptions[j] for j in indices)], name, device, report)
    vectors_ND = torch.nn.functional.normalize(vectors_ND, dim=-1)
    cosines = (vectors_ND[1:] @ vectors_ND[0]).tolist()
    return ranked(dict(zip(indices, cosines, strict=True)))


def _embedded(texts: Sequence[str], name: str, device: str, report: Report) -> Tensor:
    """The mean of the last hidden states over a text's tokens, [N, D]."""
    import torch

    tokenizer, model = _loaded(name, device)
    config = model.config.get_text_config()
    vectors_ND = torch.zeros(len(texts), config.hidden_size)
    longest = min(LONGEST_EMBEDDED, getattr(config, "max_position_embeddings", LONGEST_EMBEDDED))
    cut: dict[str, Any] = {"padding": True, "padding_side": "right", "truncation": True, "max_length": longest}
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        batch = tokenizer([texts[i] for i in rows], return_tensors="pt", **cut)
        inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}
        states_BLD = model(**inputs).last_hidden_state.float()
        mask_BL1 = inputs["attention_mask"][..., None]
        vectors_ND[rows] = ((states_BLD * mask_BL1).sum(1) / mask_BL1.sum(1).clamp(min=1)).cpu()
        report("embedding descriptions", start + len(rows), len(order))
    if not vectors_ND.isfinite().all():
        raise DsgError(f"The embedding model {name} gives values that are not finite.", "Take another.")
    return vectors_ND


def _loaded(name: str, device: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    from dsg_cli.models.language_model import model_folder

    folder, local = model_folder(name), {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        model = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32, **local)
    except Exception as error:  # Files of others: libraries raise anything on a bad one.
        reason = f"The embedding model {name} cannot be loaded: {reason_of(error, 200)}"
        raise DsgError(reason, "Name another with --embedding.") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, model.to(device).eval().requires_grad_(False)


@dataclass(frozen=True)
class Candidates:
    """Features in the order in which they are to be taken."""

    ranking: list[Match]
    texts: dict[int, str]
    """Their descriptions; none where they were named by hand."""
    described: Json
    """What an artifact says of the ranking; empty where they were named by hand."""
    notes: list[str]

    @property
    def indices(self) -> list[int]:
        return [match.index for match in self.ranking]
