"""Locks that the system takes back when a process ends, however it ends."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsg_cli.errors import DsgError


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
