"""Files and folders that are either whole or not there: bounded reads, digests, locks, and signals that wait.

The lock is flock itself. filelock's waits by polling, and where a file system has no locks it falls back to one that
a killed process leaves locked.
"""

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
from typing import Any

from dsg_cli.errors import DsgError

KIND_NAMES = ("features", "threshold", "guardrail", "model", "wrapper", "eval", "attack", "compare", "study", "inspect")
"""Kinds of artifacts, in the order of lists; `artifacts.KINDS` says what they hold."""

ID = re.compile(r"(" + "|".join(KIND_NAMES) + r")-([0-9]{3,18})(?![0-9])")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """While the block runs, no other process or thread is in a block with this lock; it waits for its turn.

    The empty file stays; whether it is locked is known to the system alone.
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
    """Try to take a lock without waiting; true if nobody else has it."""
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
    """Whether there is such a file; os.path, unlike Path, says no where a name is too long for one."""
    return os.path.isfile(path)  # noqa: PTH113


def is_taken(path: Path) -> bool:
    """Whether there is anything of that name."""
    return os.path.exists(path)  # noqa: PTH110


def is_folder(path: Path) -> bool:
    """Whether there is such a folder."""
    return os.path.isdir(path)  # noqa: PTH112


def parse_json(text: str | bytes) -> Any:
    """What JSON holds, or a ValueError; text that is nested too deeply for this machine is no JSON either."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_bounded(path: Path, largest: int) -> bytes:
    """The content of a file that must not be larger."""
    chunks, n_read = [], 0  # A read of all at once would make room for `largest` bytes first.
    try:
        with path.open("rb") as file:
            while n_read <= largest and (chunk := file.read(CHUNK)):
                n_read += len(chunk)
                chunks.append(chunk)
    except OSError as error:
        raise DsgError(f"{path} cannot be read: {error.strerror}.") from error
    if n_read > largest:
        raise DsgError(f"{path} is larger than the {largest:,} bytes that such a file may have.")
    return b"".join(chunks)


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
    """Have `fill` make a scratch folder beside `folder`, and rename it once it is whole.

    Scratch folders that a killed process left there are removed.
    """
    check_new_folder(folder)
    folder = folder.resolve()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for abandoned in folder.parent.glob(f".{glob.escape(folder.name)}-????????"):
            if (abandoned / IN_USE).is_file():
                with held(abandoned / IN_USE) as is_abandoned:
                    if is_abandoned:
                        shutil.rmtree(abandoned, ignore_errors=True)
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
    """While the block runs, a first signal waits for `safe_point`, or for the end of the block."""
    _State.depth += 1
    try:
        yield
    finally:
        _State.depth -= 1
    safe_point()


def safe_point() -> None:
    """A point at which all is whole: a signal that came since the last one is raised as `Signalled`."""
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
