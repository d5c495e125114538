"""Names and tables as Markdown."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

SPECIAL = re.compile(r"[\\`*_{}\[\]#+!|~:@/=$\"^]|(?<=www)\.", re.IGNORECASE)
"""What Markdown gives a meaning to in running text, addresses included."""


def one_line(text: str) -> str:
    """A name on one line; of what cannot be printed, such as a mark that turns text around, a question mark is left."""
    return "".join(one if one.isprintable() else "?" for one in " ".join(text.split()))


def code(text: str, *, in_table: bool = False) -> str:
    """A name as Markdown code, which nothing in it can break out of; a table wants its bars escaped even there."""
    plain = one_line(text).replace("`", "'")
    return f"`{plain.replace('|', chr(92) + '|') if in_table else plain}`"


def escaped(text: str) -> str:
    """Words of others as running text that says the same: no mark-up, no HTML, no links, no cells."""
    return html.escape(SPECIAL.sub(r"\\\g<0>", one_line(text)), quote=False)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; cells that hold names are `code`."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
