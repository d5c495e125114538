"""The one exception that a user is meant to see."""

from __future__ import annotations


class DsgError(Exception):
    """Something the user can mend.

    The message says what is wrong and where (file, key, value), the hint what to do next, on a line of its own.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message
