"""The one exception that a user is meant to see, and help with misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from dsg_cli.runtime.errors import DsgError

__all__ = ["DsgError", "close_to", "nearest"]

SHOWN = 20
"""Names in a message, at most."""


def close_to(name: str, known: Iterable[str]) -> list[str]:
    """Up to three known names that a misspelt one may have meant."""
    return difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)


def nearest(name: str, known: Iterable[str]) -> str:
    """A "Did you mean ...?" sentence for a misspelt name, or the list of what there is, if that is short."""
    names = sorted(known)
    close = close_to(name, names)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    shown = [*names[:SHOWN], "..."] if len(names) > SHOWN else names
    return f"Known: {', '.join(shown)}." if names else ""
