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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsg_cli.errors import DsgError
from dsg_cli.integrity import parse_json, read_bounded

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
    """Of the file, as it is."""


def read_descriptions(path: Path, n_features: int, *, source: str = "", may_be_empty: bool = False) -> Descriptions:
    """The descriptions in a file.

    Args:
        path: Of the file.
        n_features: How many the SAE has.
        source: What it is called later; by default the file's name.
        may_be_empty: Whether it may describe no feature, as a part of several may.

    Raises:
        DsgError: Unreadable, too large, of another form, or about a feature that the SAE does not have.
    """
    content = read_bounded(path, LARGEST)
    texts: dict[int, list[str]] = {}
    for number, (index, said) in enumerate(_rows(path, _text(path, content)), start=1):
        j = _index(index)
        if j is None:
            raise DsgError(f"{path}, entry {number}: the index is no whole number.", FORMS)
        if j >= n_features:
            raise DsgError(
                f"{path} describes feature {j}; the SAE has {n_features:,}.", "Take the descriptions of this very SAE."
            )
        several = texts.setdefault(j, [])
        several += [text for text in map(cleaned, _said(path, number, said)) if text and text not in several]
    described = {j: "; ".join(several)[:LONGEST] for j, several in sorted(texts.items()) if several}
    if not described and not may_be_empty:
        raise DsgError(f"{path} describes no feature.", FORMS)
    return Descriptions(described, source or path.name, hashlib.sha256(content).hexdigest())


def cleaned(text: str) -> str:
    """A text on one line, without control characters and halves of characters."""
    if text.isascii() and text.isprintable():
        return " ".join(text.split())
    return " ".join("".join(map(_printable, text)).split())


def _printable(character: str) -> str:
    """The character, nothing for one that only directs others, a space for one that is none."""
    kind = unicodedata.category(character)
    return character if kind[0] != "C" else "" if kind == "Cf" else " "


def _text(path: Path, content: bytes) -> str:
    if content[:2] == b"\x1f\x8b":
        content = _unpacked(path, content)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DsgError(f"{path} is not UTF-8 text (byte {error.start}).", FORMS) from error


def _unpacked(path: Path, content: bytes) -> bytes:
    """What gzip packed, one file or several one after another; never more than is allowed."""
    found, n_bytes = [], 0
    while content:
        packed = zlib.decompressobj(wbits=31)
        try:
            found.append(packed.decompress(content, LARGEST + 1 - n_bytes))
        except zlib.error as error:
            raise DsgError(f"{path} is no whole gzip file.", "Fetch or make it again.") from error
        n_bytes += len(found[-1])
        if n_bytes > LARGEST:
            raise DsgError(f"{path} holds more than {LARGEST:,} bytes once unpacked.", "Give a part of it.")
        if not packed.eof:
            raise DsgError(f"{path} is no whole gzip file.", "Fetch or make it again.")
        content = packed.unused_data
    return b"".join(found)


def _rows(path: Path, text: str) -> Iterator[tuple[Any, Any]]:
    """Index and what is said of it, for each entry.

    Raises:
        DsgError: The file is of no known form.
    """
    first = text.lstrip()[:1]
    if first == "[":
        yield from (_parts(path, number, one) for number, one in enumerate(_array(path, text), start=1))
    elif first == "{":
        # Not splitlines: a description may hold one of the other characters that end lines.
        lines = (line for line in text.split("\n") if line.strip())
        for number, line in enumerate(lines, start=1):
            yield _parts(path, number, _parsed(path, line, f"entry {number}"))
    else:
        yield from _columns(path, text)


def _array(path: Path, text: str) -> list[Any]:
    found = _parsed(path, text, "the whole")
    assert isinstance(found, list)
    return found


def _parsed(path: Path, text: str, what: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise DsgError(f"{path}: {what} is no JSON.", FORMS) from error


def _parts(path: Path, number: int, entry: Any) -> tuple[Any, Any]:
    if not isinstance(entry, dict) or "index" not in entry or not {"description", "explanations"} & set(entry):
        raise DsgError(f"{path}, entry {number} has no index or no description.", FORMS)
    return entry["index"], entry["description"] if "description" in entry else entry["explanations"]


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
    """An index from a number or its digits."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= DIGITS:
        return int(value)
    return value if type(value) is int and 0 <= value < 10**DIGITS else None


def _said(path: Path, number: int, value: Any) -> list[str]:
    """The descriptions in an entry; null is none."""
    several = value if isinstance(value, list) else [value]
    found = [one.get("description") if isinstance(one, dict) else one for one in several]
    if not all(one is None or isinstance(one, str) for one in found):
        raise DsgError(f"{path}, entry {number}: the description is no text.", FORMS)
    return [one for one in found if one]
