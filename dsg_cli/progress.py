"""How long work reports where it is: one callable, silent unless the terminal passes another."""

from __future__ import annotations

from collections.abc import Callable

Report = Callable[[str, int, int], None]
"""Called with (what, done, total); `what` may end with a comma and what is counted: tokens, steps, prompts, ..."""


def silent(_what: str, _done: int, _total: int) -> None:
    """Report nothing."""
