"""The one exception that a user is meant to see."""

from __future__ import annotations


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
