"""SIGINT and SIGTERM: at once where nothing would be lost, else at the next point where work is whole.

A long pass runs inside `at_safe_points()` and calls `safe_point()` after every batch: a signal that came meanwhile is
raised there, when the pass's state is whole and can be kept (checkpoints.py). Everywhere else a signal is raised where
it finds the program. A second signal is never held back.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

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
