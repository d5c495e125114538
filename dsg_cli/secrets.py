"""Access tokens never appear in what dsg prints: messages of libraries pass through here."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

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
