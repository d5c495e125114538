"""Names and tables as Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def code(text: str, *, in_table: bool = False) -> str:
    """A name as Markdown code, which nothing in it can break out of; a table wants its bars escaped even there."""
    plain = " ".join(text.split()).replace("`", "'")
    return f"`{plain.replace('|', chr(92) + '|') if in_table else plain}`"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; cells that hold names are `code`."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
