"""Files, folders and data sets as documents: texts that are counted before any is read; and prompts of a user."""

from __future__ import annotations

import csv
import io
import sys
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

from dsg_cli.data.catalogue import HubText
from dsg_cli.errors import DsgError, nearest, reason_of
from dsg_cli.workspace.files import parse_json

COLUMNS = ("text", "content", "document", "body", "article", "passage", "story")
"""Names of the column that holds the text, the likeliest first."""

TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
READERS = (*TABLES, ".txt", ".md")
STRINGS = ("string", "large_string")
Take = Callable[[Sequence[int]], list[str]]


@dataclass(frozen=True)
class Documents:
    """So many texts, read by their positions."""

    n: int
    take: Take
    revision: str = ""  # Commit of the repository they came from.


def read_file(path: Path, column: str | None = None) -> Documents:
    """A .jsonl, .json, .csv, .tsv, .parquet file, or a text file whose documents are parted by blank lines.

    Of .jsonl and .parquet only what is taken is in memory; others are read whole. The column that holds the text is
    found by its name where none is given.
    """
    kind = path.suffix.lower()
    if kind and kind not in READERS:
        raise DsgError(f"{path} is of no kind that is known here.", f"Known files: {', '.join(READERS)}.")
    if kind == ".parquet":
        return _parquet(path, column)
    if kind in (".jsonl", ".ndjson"):
        return _lines(path, column)
    content = text_of(path)
    if kind not in TABLES:
        return listed(content.split("\n\n"))
    if kind in (".csv", ".tsv"):
        return listed(_csv(path, content, column))
    return _lines(path, column) if _is_json_lines(content) else listed(_json(path, content, column))


def read_folder(folder: Path, column: str | None = None, split: str | None = None) -> Documents:
    """A folder that `datasets` saved to disk, or every file in one that `read_file` reads."""
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _saved(folder, column, split)
    if split is not None:
        raise DsgError(f"{folder} was not saved by `datasets`; it has no split {split}.", "Name a file in it instead.")
    inside = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix.lower() in READERS]
    shown = [path for path in inside if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    # Tables, or text where there is none, and not what only speaks about the rest.
    tables = [path for path in shown if path.suffix.lower() in TABLES]
    files = tables or [path for path in shown if path.stem.upper() not in ("README", "LICENSE", "LICENCE", "NOTICE")]
    if not files:
        raise DsgError(f"The folder {folder} holds no corpus.", f"Known files: {', '.join(READERS)}.")
    read = [read_file(path, column) for path in files]
    return listed([text for documents in read for text in documents.take(range(documents.n))])


def of_dataset(dataset: Any, hub_text: HubText, *, where: str, revision: str = "") -> Documents:
    """The texts of a `datasets.Dataset`, which stays on disk."""
    if (template := hub_text.template) is not None:
        return Documents(len(dataset), lambda at: [template.format(**row) for row in dataset.select(at)], revision)
    strings = [name for name, kind in dataset.features.items() if getattr(kind, "dtype", None) in STRINGS]
    column = _find_column(hub_text.column, strings, where)
    return Documents(len(dataset), lambda at: [text or "" for text in dataset.select(at)[column]], revision)


def listed(texts: Sequence[str]) -> Documents:
    """Texts that are in memory already."""
    return Documents(len(texts), lambda indices: [texts[i] for i in indices])


def _find_column(name: str | None, strings: Sequence[str], where: str) -> str:
    """The column that was named, the first of `COLUMNS` that is there, or the only one that holds text."""
    if name is not None:
        if name in strings:
            return name
        raise DsgError(f"{where} has no text column {name}.", nearest(name, strings))
    likely = [known for known in COLUMNS if known in strings] or list(strings)
    if likely and (likely[0] in COLUMNS or len(likely) == 1):
        return likely[0]
    raise DsgError(
        f"{where} has no column that is known to hold the text; found: {', '.join(strings) or 'none with text'}.",
        "Name it after an @, as in FILE@column.",
    )


def text_of(path: Path) -> str:
    """A whole text file, its lines ended by newlines; an error if it is none."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DsgError(f"{path} cannot be read: {error.strerror}.") from error
    return _decoded(path, content).replace("\r\n", "\n").replace("\r", "\n")


def _decoded(path: Path, content: bytes, start: int = 0) -> str:
    """The text of a file, or of a part of it that begins at that byte; an error if it is none."""
    known = f"Known files: {', '.join(READERS)}."
    try:
        text = content.decode("utf-8-sig" if start == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise DsgError(f"{path} is not UTF-8 text (byte {start + error.start}).", known) from error
    if "\x00" in text:
        raise DsgError(f"{path} is not a text file: it has NUL bytes.", known)
    return text


def _is_json_lines(content: str) -> bool:
    first = content.lstrip().partition("\n")[0]
    try:
        return isinstance(parse_json(first), dict) and "\n" in content.strip()
    except ValueError:
        return False


def _lines(path: Path, column: str | None) -> Documents:
    """JSON lines, of which only positions stay in memory: 16 bytes a line."""
    starts, numbers = array("q"), array("q")
    at = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip(b"\xef\xbb\xbf \t\r\n"):
                    starts.append(at)
                    numbers.append(number)
                at += len(line)
    except OSError as error:
        raise DsgError(f"{path} cannot be read: {error.strerror}.") from error

    def take(indices: Sequence[int]) -> list[str]:
        nonlocal column
        texts = []
        with path.open("rb") as file:
            for i in indices:
                file.seek(starts[i])
                where = f"{path}, line {numbers[i]}"
                text = _decoded(path, file.readline(), starts[i])
                try:
                    row = parse_json(text)
                except ValueError as error:
                    raise DsgError(f"{where} is not JSON: {getattr(error, 'msg', error)}.") from error
                if i == 0:
                    column = _column_of(row, column, where)
                texts.append(_field(row, column, where))
        return texts

    if starts:
        take([0])  # The first line says which column holds the text.
    return Documents(len(starts), take)


def _json(path: Path, content: str, column: str | None) -> list[str]:
    try:
        rows = parse_json(content) if content.strip() else []
    except ValueError as error:
        raise DsgError(f"{path} is not JSON: {reason_of(error, 200)}.") from error
    if isinstance(rows, Mapping):
        lists = [value for value in rows.values() if isinstance(value, list)]
        rows = lists[0] if len(lists) == 1 else [rows]
    if not isinstance(rows, list):
        raise DsgError(f"{path} holds neither a list nor an object.")
    if rows and all(isinstance(row, str) for row in rows):
        return [_clean(row, str(path)) for row in rows]
    texts: list[str] = []
    for number, row in enumerate(rows, start=1):
        where = f"{path}, entry {number}"
        column = column if texts else _column_of(row, column, where)
        texts.append(_field(row, column, where))
    return texts


def _csv(path: Path, content: str, column: str | None) -> list[str]:
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    rows = csv.DictReader(io.StringIO(content, newline=""), delimiter=delimiter)
    column = _find_column(column, list(rows.fieldnames or []), str(path)) if content.strip() else None
    return [_field(row, column, f"{path}, line {rows.line_num}") for row in rows]


def _parquet(path: Path, column: str | None) -> Documents:
    import pyarrow
    from pyarrow import parquet

    with _readable(path):
        file = parquet.ParquetFile(path)
        schema = file.schema_arrow
        strings = [field.name for field in schema if pyarrow.types.is_string(field.type) or str(field.type) in STRINGS]
        column = _find_column(column, strings, str(path))
        ends = list(accumulate(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)))

    def take(indices: Sequence[int]) -> list[str]:
        texts: dict[int, str] = {}
        for group, in_group in groupby(sorted(indices), key=lambda i: bisect_right(ends, i)):
            rows, first = list(in_group), ends[group - 1] if group else 0
            with _readable(path):
                values = file.read_row_group(group, columns=[column])[column].take([i - first for i in rows])
                texts |= {i: text or "" for i, text in zip(rows, values.to_pylist(), strict=True)}
        return [texts[i] for i in indices]

    return Documents(ends[-1] if ends else 0, take)


def _saved(folder: Path, column: str | None, split: str | None) -> Documents:
    from datasets import DatasetDict, load_from_disk

    with _readable(folder):
        dataset = load_from_disk(str(folder))
    if isinstance(dataset, DatasetDict):
        names = list(dataset)
        name = split or ("train" if "train" in names else names[0] if len(names) == 1 else None)
        if name not in names:
            raise DsgError(
                f"{folder} has {f'no split {split}' if split else 'several splits'}: {', '.join(names)}.",
                f"Name one after a #, as in {folder}#{names[0]}.",
            )
        dataset = dataset[name]
    return of_dataset(dataset, HubText(str(folder), column=column), where=str(folder))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """The block reads a file or folder of the user's, on which a library raises anything if it is a bad one."""
    try:
        yield
    except DsgError:
        raise
    except Exception as error:
        raise DsgError(f"{path} cannot be read: {reason_of(error, 200)}") from error


def _column_of(row: Any, name: str | None, where: str) -> str:
    if not isinstance(row, Mapping):
        raise DsgError(f"{where} is no object with a text; found: {type(row).__name__}.")
    return _find_column(name, [str(key) for key, value in row.items() if isinstance(value, str)], where)


def _field(row: Any, column: str | None, where: str) -> str:
    text = row.get(column, 0) if isinstance(row, Mapping) else 0
    if not isinstance(text, str | None):
        keys = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise DsgError(f'{where} has no "{column}" string; found: {keys}.')
    return _clean(text or "", where)  # Nothing may be there, as in a table of Parquet.


def _clean(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DsgError(f"{where} holds half of a surrogate pair, which is no text.") from error
    return text


def read_prompts(prompts: Sequence[str], file: Path | None) -> list[str]:
    """Prompts from the command line, from a file, or from stdin."""
    if prompts and file is not None:
        raise DsgError("Prompts are given both on the command line and in a file.", "Give one of them.")
    if prompts:
        return list(prompts)
    if file is None and sys.stdin.isatty():
        raise DsgError("There is no prompt.", 'Give one, as in dsg generate "Once upon a time", or --file.')
    try:
        text = sys.stdin.read() if file is None or str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DsgError(f"The prompts in {file or 'stdin'} cannot be read: {reason}.") from error
    lines = [line for line in text.split("\n") if line.strip()]
    if file is None or file.suffix != ".jsonl":
        return lines
    return [_prompt_of(line, f"{file}, line {number}") for number, line in enumerate(lines, start=1)]


def _prompt_of(line: str, where: str) -> str:
    try:
        prompt = parse_json(line)["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise DsgError(f'{where} is not of the form {{"prompt": ...}}.') from error
    if not isinstance(prompt, str) or any("\ud800" <= character <= "\udfff" for character in prompt):
        raise DsgError(f"{where}: the prompt is no text.")
    return prompt
