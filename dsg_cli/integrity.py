"""Digests of what is written down, and files that are either whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from dsg_cli.artifacts import SCHEMAS, Json
from dsg_cli.errors import DsgError


def digest_of(data: Json) -> str:
    """Digest of an artifact's JSON object without the digest itself."""
    content = {key: value for key, value in data.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_document(text: str, *, where: str) -> Json:
    """An artifact's JSON object, verified against its own digest.

    Args:
        text: What was written.
        where: The file, for messages.

    Raises:
        DsgError: No artifact, altered, or of a newer schema.
    """
    try:
        data: Json = json.loads(text)
        schema, known = int(data["schema"]), SCHEMAS[data["kind"]]
        digest = digest_of(data)
    except (ValueError, KeyError, TypeError) as error:
        raise DsgError(f"{where} is not an artifact of dsg, or is damaged.") from error
    if schema > known:
        raise DsgError(f"{where} has schema {schema}; this version reads up to {known}.", "Update dsg-cli.")
    if data.get("sha256") != digest:
        raise DsgError(f"{where} was altered after it was written: its digest does not match.", "Make it again.")
    return data


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, and rename it once it is on the disk."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_new_folder(folder: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        DsgError: It does, or is no folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DsgError(f"{folder} exists and is not empty.", "Name a new folder.")


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a scratch folder beside `folder` and rename it once it is whole.

    Args:
        folder: Where it shall be; new, or empty.
        fill: Makes the folder that it is given, and writes into it.

    Raises:
        DsgError: The folder is not empty, or cannot be written to.
    """
    check_new_folder(folder)
    folder = folder.resolve()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            fill(scratch / folder.name)
            if folder.exists():
                folder.rmdir()
            (scratch / folder.name).rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise DsgError(f"{folder} cannot be written: {error.strerror or error}.") from error
