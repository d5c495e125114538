"""Digests of what is written down, and files and folders that are either whole or not there."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from dsg_cli.errors import DsgError

KIND_NAMES = ("features", "threshold", "guardrail", "model", "wrapper", "eval", "attack", "compare", "study", "inspect")
"""Kinds of artifacts, in the order of lists; `artifacts.KINDS` says what they hold."""

ID = re.compile(r"(" + "|".join(KIND_NAMES) + r")-([0-9]{3,18})(?![0-9])")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """While the block runs, no other process or thread is in a block with this lock; it waits for its turn.

    Args:
        path: An empty file that stays; whether it is locked is known to the system alone.

    Raises:
        DsgError: The file system has no locks.
        OSError: The file cannot be made.
    """
    with path.open("ab") as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        except OSError as error:
            raise DsgError(
                f"The file system of {path.parent} has no file locks ({error.strerror}).",
                "Put the workspace elsewhere with --workspace or DSG_WORKSPACE.",
            ) from error
        yield


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Try to take a lock without waiting; true if nobody else has it.

    Raises:
        OSError: The file cannot be opened.
    """
    with path.open("ab") as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


CHUNK = 2**24
"""Bytes that are read at a time."""

LARGEST_JSON = 256 * 2**20
"""Bytes of an artifact's JSON file, at most."""

IN_USE = "in-use"
"""Lock in a scratch folder, held while it is filled."""


def is_file(path: Path) -> bool:
    """Whether there is such a file; there is none where a name is too long for one."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_taken(path: Path) -> bool:
    """Whether there is anything of that name."""
    try:
        return path.exists()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Whether there is such a folder."""
    try:
        return path.is_dir()
    except OSError:
        return False


def parse_json(text: str | bytes) -> Any:
    """What JSON holds; text that is nested too deeply for this machine is no JSON either.

    Raises:
        ValueError: It is no JSON.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_bounded(path: Path, largest: int) -> bytes:
    """The content of a file that must not be larger."""
    try:
        with path.open("rb") as file:
            content = b"".join(_chunks(file, largest))
    except OSError as error:
        raise DsgError(f"{path} cannot be read: {error.strerror}.") from error
    if len(content) > largest:
        raise DsgError(f"{path} is larger than the {largest:,} bytes that such a file may have.")
    return content


def _chunks(file: BinaryIO, largest: int) -> Iterator[bytes]:
    """What a file holds, and no more than a chunk beyond what is allowed."""
    n_read = 0
    while n_read <= largest and (chunk := file.read(CHUNK)):
        n_read += len(chunk)
        yield chunk


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


Content = bytes | Path
"""What is in a file, or a file on the same file system that will be moved to where it belongs."""


def content_digest(content: Content) -> str:
    """sha256 of it."""
    return file_digest(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()


def place_content(path: Path, content: Content) -> None:
    """Have a file, whole and on the disk."""
    if isinstance(content, bytes):
        write_atomically(path, content)
        return
    with content.open("rb") as file:
        os.fsync(file.fileno())
    content.replace(path)


def sync_folder(folder: Path) -> None:
    """Have what was renamed in a folder outlast a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_new_folder(folder: Path) -> None:
    """Refuse a folder that holds something."""
    if is_taken(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise DsgError(f"{folder} exists and is not empty.", "Name a new folder.")


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a scratch folder beside `folder` and rename it once it is whole.

    Scratch folders that a killed process left there are removed.

    Args:
        folder: Where it shall be; new, or empty.
        fill: Makes the folder that it is given, and writes into it.
    """
    check_new_folder(folder)
    folder = folder.resolve()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            with locked(scratch / IN_USE):
                fill(scratch / folder.name)
                if folder.exists():
                    folder.rmdir()
                (scratch / folder.name).rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise DsgError(
            f"{str(folder)[:200]} cannot be written: {error.strerror or error}.", "Make room, or name another folder."
        ) from error


def _remove_abandoned(folder: Path) -> None:
    for scratch in folder.parent.glob(f".{glob.escape(folder.name)}-????????"):
        if (scratch / IN_USE).is_file():
            with held(scratch / IN_USE) as is_abandoned:
                if is_abandoned:
                    shutil.rmtree(scratch, ignore_errors=True)


SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Signalled(BaseException):
    """A signal asked the process to stop; not an Exception, so that nothing on the way swallows it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.is_kept = False
        """What was done before is in a checkpoint."""


class _State:
    depth = 0
    """Blocks of `at_safe_points` that are open."""
    pending: int | None = None
    """A signal that waits for the next safe point."""


def install() -> None:
    """Handle SIGINT and SIGTERM from now on."""
    for number in SIGNALS:
        signal.signal(number, _handle)


@contextmanager
def at_safe_points() -> Iterator[None]:
    """While the block runs, a first signal waits for `safe_point`, or for the end of the block.

    Raises:
        Signalled: After the block, if a signal came and no safe point did.
    """
    _State.depth += 1
    try:
        yield
    finally:
        _State.depth -= 1
    safe_point()


def safe_point() -> None:
    """A point at which all is whole.

    Raises:
        Signalled: A signal came since the last one.
    """
    number, _State.pending = _State.pending, None
    if number is not None:
        raise Signalled(number)


def pending() -> bool:
    """Whether a signal waits for a safe point."""
    return _State.pending is not None


def _handle(number: int, _frame: FrameType | None) -> None:
    if _State.depth and _State.pending is None:
        _State.pending = number
        return
    _State.pending = None
    raise Signalled(number)


def artifact_ids(folder: Path, kind: str | None = None) -> list[str]:
    """Ids of all artifacts of a workspace, or of those of one kind, oldest number first."""
    names = [path.stem for path in folder.glob("*.json")] if is_folder(folder) else []
    matches = [match for match in map(ID.fullmatch, names) if match and kind in (None, match[1])]
    return [m[0] for m in sorted(matches, key=lambda m: (KIND_NAMES.index(m[1]), int(m[2])))]
