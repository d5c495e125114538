"""The one exception that a user is meant to see, help with misspelt names, and what no message may show."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from dsg_cli.guardrail.runtime.errors import DsgError

__all__ = ["DsgError", "close_to", "nearest"]

NO_MEMORY = (
    "not enough memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""How it is said where it has no type of its own: on a CPU, and inside a library of the GPU."""

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


def reason_of(error: BaseException, at_most: int = 300) -> str:
    """What a library raised, on one line."""
    return " ".join(str(error).split())[:at_most] or type(error).__name__


LIKE_A_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}|\bapi_org_[A-Za-z0-9]{8,}|(?i:\bbearer)\s+\S+")

IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+(?=@)")

VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")

SHORTEST = 6
"""Characters of a value that is taken for a secret."""

HIDDEN = "***"


def redacted(text: str) -> str:
    """A text without the tokens that this process knows, what looks like one, and passwords in addresses."""
    for secret in _known():
        text = text.replace(secret, HIDDEN)
    return IN_ADDRESS.sub(HIDDEN, LIKE_A_TOKEN.sub(HIDDEN, text))


def _known() -> list[str]:
    values = [os.environ.get(name, "").strip() for name in VARIABLES]
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    stored = Path(os.environ.get("HF_TOKEN_PATH") or Path(home) / "token")
    with contextlib.suppress(OSError, UnicodeDecodeError):
        values.append(stored.read_text(encoding="utf-8").strip())
    return sorted({value for value in values if len(value) >= SHORTEST}, key=len, reverse=True)
