"""The one exception that a user is meant to see, and help with misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from dsg_cli.runtime.errors import DsgError

__all__ = ["DsgError", "nearest"]


def nearest(name: str, known: Iterable[str]) -> str:
    """A "Did you mean ...?" sentence for a misspelt name, or the list of what there is."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return f"Known: {', '.join(names)}." if names else ""
