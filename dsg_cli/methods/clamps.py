"""Steering files (Khoriaty et al., 2503.11127): features and what they are set to, as CSV.

A row a feature, columns by their names in any order: `latent_idx`; `hook_action`, which is `clamp`, `clamp_prime` or
empty (f > 0 -> coefficient), `conditional` (f > clamp_value -> coefficient) or `refusal` (f > clamp_value -> the latent
`refuse_id` is set to the coefficient); `steering_coefficient`; and `clamp_value`, `refuse_id`, `sae_release` and
`sae_id` as needed. Other columns, such as `description`, are left alone.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dsg_cli.errors import DsgError, nearest
from dsg_cli.integrity import is_file, read_bounded
from dsg_cli.methods.clamping import Clamping, refusing
from dsg_cli.releases import locate_release, releases
from dsg_cli.runtime.spec import NEVER

LARGEST_FILE = 2**20
LARGEST_NUMBER = 1e6
METHOD_OF = {
    "": "static-clamp",
    "clamp": "static-clamp",
    "clamp_prime": "static-clamp",
    "conditional": "conditional-clamp",
    "refusal": "refusal-clamp",
}
"""Action -> the method that it asks for."""
SETTING = "steering file"
"""In place of a strength as a person would give it."""


@dataclass(frozen=True)
class Steered:
    """One row."""

    line: int
    index: int
    coefficient: float
    above: float
    refusal: int | None


@dataclass(frozen=True)
class Steering:
    """A whole file."""

    method: str
    rows: list[Steered]
    release: str
    """Of the SAE, or empty where the file does not say; so the id."""
    sae_id: str
    sha256: str


def read_steering(path: Path) -> Steering:
    """Read and check a steering file.

    Raises:
        DsgError: It cannot be read, is no such file, or asks for what no one method does; with the line.
    """
    if not is_file(path):
        raise DsgError(f"There is no steering file {str(path)[:200]}.", "Set methods.<method>.steering_file to one.")
    content = read_bounded(path, LARGEST_FILE)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DsgError(f"{path}, line {line}: this is not UTF-8.", "Save the file as UTF-8.") from error
    rows: list[Steered] = []
    said: dict[str, str] = {}
    for line, cells in _cells(path, text):
        where = f"{path}, line {line}"
        action = cells.get("hook_action", "").lower()
        if action not in METHOD_OF:
            raise DsgError(
                f"{where}: there is no action {action[:80]!r}.", nearest(action[:80], filter(None, METHOD_OF))
            )
        _agree(said, "method", METHOD_OF[action], where, "a file holds actions of one kind")
        for name in ("sae_release", "sae_id"):
            if cells.get(name):
                _agree(said, name, cells[name], where, "a file is for one SAE")
        row = _row(cells, METHOD_OF[action], line, where)
        _check_row(row, rows, where)
        rows.append(row)
    if not rows:
        raise DsgError(f"{path} has no rows.", "Give a row for each feature below the names of the columns.")
    release, sae_id = said.get("sae_release", ""), said.get("sae_id", "")
    return Steering(said["method"], rows, release, sae_id, hashlib.sha256(content).hexdigest())


def steered_clamping(steering: Steering, method: str, *, n_features: int, clamps_features: bool = False) -> Clamping:
    """What a steering file asks of a method.

    Args:
        steering: The file.
        method: The method that was asked for.
        n_features: Of the SAE.
        clamps_features: Of a refusal clamp.

    Raises:
        DsgError: It asks for another method, or for a feature that the SAE does not have.
    """
    rows = steering.rows
    if steering.method != method:
        raise DsgError(
            f"The actions of the steering file are those of {steering.method}, not of {method}.",
            f"Take --method {steering.method}, or another file.",
        )
    for row in rows:
        for index in (row.index, row.refusal or 0):
            if index >= n_features:
                raise DsgError(f"The steering file, line {row.line}: the SAE has {n_features} features; no {index}.")
    indices, above = [row.index for row in rows], [row.above for row in rows]
    refusal = rows[0].refusal
    if refusal is None:
        return Clamping(indices, [], [row.coefficient for row in rows], above, "each", setting=SETTING)
    return refusing(indices, above, refusal, rows[0].coefficient, clamps_features=clamps_features, setting=SETTING)


def check_same_sae(steering: Steering, source: str) -> list[str]:
    """A note where it cannot be told whether a steering file is for an SAE: one that is of no release.

    Args:
        steering: The file.
        source: Of the SAE, `RELEASE/ID` if it is of a release.

    Raises:
        DsgError: It is for another one.
    """
    release, _, sae_id = source.partition("/")
    named = "/".join(filter(None, (steering.release, steering.sae_id)))
    if not named or named == source:
        return []
    if release not in releases():
        return [f"The steering file is for the SAE {named}; whether {source} is that one cannot be told."]
    if steering.release in releases() and steering.sae_id and locate_release(named) == locate_release(source):
        return []  # Two names of one SAE, such as a canonical one.
    if (steering.release or release, steering.sae_id or sae_id) == (release, sae_id):
        return []
    raise DsgError(
        f"The steering file is for the SAE {named}; the features are of {source}.",
        "Run dsg select with --sae, or take another file.",
    )


def _cells(path: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Number and cells of each line below the names of the columns.

    Raises:
        DsgError: It is no CSV, a column is missing or there twice, or a line has more cells than there are columns.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    names: list[str] = []
    try:
        for values in reader:
            cells = [value.strip() for value in values]
            if not any(cells):
                continue
            if not names:
                names = cells
                _check_names(names, f"{path}, line {reader.line_num}")
                continue
            if any(cells[len(names) :]):
                raise DsgError(f"{path}, line {reader.line_num}: there are more values than columns.")
            yield reader.line_num, dict(zip(names, cells, strict=False))
    except csv.Error as error:
        raise DsgError(f"{path}, line {reader.line_num}: this is no CSV: {error}.") from error


def _check_names(names: list[str], where: str) -> None:
    for name in ("latent_idx", "hook_action", "steering_coefficient"):
        if name not in names:
            raise DsgError(f"{where}: there is no column {name}.", "The first line names the columns.")
    twice = [name for name in names if name and names.count(name) > 1]
    if twice:
        raise DsgError(f"{where}: the column {twice[0][:80]} is there twice.")


def _agree(said: dict[str, str], name: str, value: str, where: str, rule: str) -> None:
    if said.setdefault(name, value) != value:
        raise DsgError(f"{where}: this row is for {value[:80]}, earlier ones are for {said[name][:80]}; {rule}.")


def _row(cells: dict[str, str], method: str, line: int, where: str) -> Steered:
    return Steered(
        line=line,
        index=_whole(cells, "latent_idx", where),
        coefficient=_number(cells, "steering_coefficient", where),
        above=0.0 if method == "static-clamp" else _number(cells, "clamp_value", where, at_least=0.0),
        refusal=_whole(cells, "refuse_id", where) if method == "refusal-clamp" else None,
    )


def _check_row(row: Steered, before: list[Steered], where: str) -> None:
    """Refuse a row that does not go with those before it."""
    if any(one.index == row.index for one in before):
        raise DsgError(f"{where}: the feature {row.index} is there twice.")
    if row.refusal is None or not before:
        return
    if (row.refusal, row.coefficient) != (before[0].refusal, before[0].coefficient):
        raise DsgError(
            f"{where}: another refuse_id or steering_coefficient than in the rows before.",
            "One refusal feature can be set, to one value; split the file, and put several guardrails on together.",
        )


def _whole(cells: dict[str, str], name: str, where: str) -> int:
    text = cells.get(name, "")
    match = re.fullmatch(r"([0-9]{1,9})(\.0*)?", text)  # A table with gaps writes 12 as 12.0.
    if match is None:
        raise DsgError(f"{where}: {name} must be a feature's number, not {text[:80]!r}.")
    return int(match[1])


def _number(cells: dict[str, str], name: str, where: str, *, at_least: float = -NEVER) -> float:
    text = cells.get(name, "")
    try:
        value = float(text) if re.fullmatch(r"[0-9.eE+-]+", text) else None
    except ValueError:
        value = None
    if value is None or not at_least <= value or abs(value) >= LARGEST_NUMBER:
        raise DsgError(f"{where}: {name} must be a number of sensible size, not {text[:80]!r}.")
    return value
