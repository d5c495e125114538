"""Text of others on a terminal: shown, never obeyed."""

from __future__ import annotations


def visible(text: str) -> str:
    """The text with everything that is not printed (control characters, escape sequences, marks that turn the
    direction of writing, half surrogates) in Python's spelling; a space stays one."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
