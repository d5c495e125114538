"""The one exception that a user is meant to see."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DsgError(Exception):
    """Something the user can mend.

    Args:
        message: What is wrong and where (file, key, value).
        hint: What to do next; printed on a line of its own.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


def nearest(name: str, known: Iterable[str]) -> str:
    """A "Did you mean ...?" sentence for a misspelt name, or the list of what there is."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return f"Known: {', '.join(names)}." if names else ""
