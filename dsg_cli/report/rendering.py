"""One table and its three renderings: for a terminal, as Markdown, as HTML.

With it the one way to write each kind of number, and what makes texts of others harmless wherever they are shown.
"""

from __future__ import annotations

import functools
import html
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, TextIO

from markupsafe import Markup
from rich.console import Console, Group
from rich.table import Table as RichTable
from rich.text import Text

from dsg_cli.workspace.body import Json

if TYPE_CHECKING:
    from jinja2 import Environment


class Name(str):
    """A cell that holds a name: code in Markdown."""

    __slots__ = ()


class Styled(str):
    """A text with a style on the terminal; what is red there is marked on a page too."""

    style: str

    def __new__(cls, text: str, style: str) -> Self:
        styled = super().__new__(cls, text)
        styled.style = style
        return styled


@dataclass(frozen=True)
class Table:
    """Rows of text under their columns. Cells may be `Name` or `Styled`; on a page, markup as well."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""  # Above it on a page; a terminal and Markdown show none.
    notes: Sequence[str] = ()  # Sentences below it, on a terminal and on a page.
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # Column -> options of rich.
    has_head: bool = True
    fold: str = ""  # On a page: the words under which it is folded away.

    def __rich__(self) -> Group:
        table = RichTable(box=None, pad_edge=False, show_header=self.has_head)
        for name in self.columns:
            table.add_column(name, **self.options.get(name, {}))
        for row in self.rows:
            table.add_row(*map(styled_text, row))
        # As running text: rich would squeeze a caption into the table's own width.
        return Group(table, *map(styled_text, self.notes))

    def markdown(self) -> str:
        """The table alone. Cells that are no names have to be harmless."""
        rows = [[code(cell, in_table=True) if cell and isinstance(cell, Name) else cell for cell in row]
                for row in self.rows]  # fmt: skip
        return "\n".join(f"| {' | '.join(row)} |" for row in (self.columns, ["---"] * len(self.columns), *rows))

    def kinds(self) -> list[str]:
        """Of each column on a page: `number` if all its cells are numbers, or begin like one."""
        columns = [[row[i] for row in self.rows] for i in range(len(self.columns))]
        return ["number" if cells and all(map(_is_number, cells)) else "" for cells in columns]


def _is_number(cell: str) -> bool:
    return not isinstance(cell, Markup) and (not cell.strip() or cell.strip()[0] in "-+.<0123456789")


View = list[Table | str]  # Tables, and lines of text between and below them.
LONG = 12  # Rows from which on a table that a figure shows too is folded on a page.


def fold(rows: Sequence[object], noun: str) -> str:
    """Words under which long tables are folded; nothing for a short one."""
    return f"All {len(rows)} {noun}" if len(rows) > LONG else ""


def pairs(rows: Iterable[tuple[str, str]], caption: str = "") -> Table:
    """A table of names and values, without a head."""
    return Table(("", ""), list(rows), caption, has_head=False)


def terminal(view: Iterable[Table | str]) -> Group:
    """Tables and lines for a terminal."""
    return Group(*(part if isinstance(part, Table) else styled_text(part) for part in view))


def styled_text(text: str) -> Text:
    """A cell or a line for a terminal."""
    return Text(text, style=getattr(text, "style", ""))


def console(stream: TextIO | None = None) -> Console:
    """A console on a stream, by default stdout: in colour on a terminal that wants it, 80 columns wide off one."""
    out = stream or sys.stdout
    return Console(
        file=out,
        width=None if out.isatty() else 80,
        color_system=None if os.environ.get("NO_COLOR") else "auto",
        # Every name as it is, brackets and colons too.
        markup=False,
        emoji=False,
    )


def can_redraw() -> bool:
    """Whether stderr is a terminal on which a line can be drawn over: a progress bar needs that."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def share(value: float | None, n_digits: int = 2) -> str:
    """A share or an accuracy; a dash for none."""
    return "-" if value is None else f"{value:.{n_digits}f}"


def number(value: float | None) -> str:
    """A number of any size: two or three decimals, more for what is tiny; a dash for none."""
    if value is None:
        return "-"
    if 0 < abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def exact(value: float | None) -> str:
    """Five digits: enough to see on which side of a bound a share of thousands of questions lies."""
    return "-" if value is None else f"{value:.5g}"


def interval(row: Json, metric: str = "", digits: str = "", between: str = "") -> str:
    """The 95 % interval of a metric, from `low` and `high` or `{metric}_low` and `{metric}_high`; a dash for none."""
    low, high = (row.get(f"{metric}_{end}" if metric else end) for end in ("low", "high"))
    if low is None or high is None:
        return "-"
    first, last = (format(value, digits or (".2f" if abs(value) < 10 else ".1f")) for value in (low, high))
    return f"{first}{between or ('-' if low >= 0 else ' to ')}{last}"


def spread(values: Iterable[float | None], digits: str = ".2f") -> str:
    """From the lowest to the highest of those that are known; nothing where none is."""
    known = [value for value in values if value is not None]
    low, high = (format(value, digits) for value in (min(known), max(known))) if known else ("", "")
    return low if low == high else f"{low} to {high}"


SPECIAL = re.compile(r"[\\`*_{}\[\]#+!|~:@/=$\"^]|(?<=www)\.", re.IGNORECASE)
"""What Markdown gives a meaning to in running text, addresses included."""

HIDDEN = {
    **{number: None for number in range(32) if chr(number) not in "\t\n"},
    **dict.fromkeys(range(0x7F, 0xA0)),
    **dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), "\N{REPLACEMENT CHARACTER}"),
    **dict.fromkeys((*range(0xD800, 0xE000), 0xFFFE, 0xFFFF), "\N{REPLACEMENT CHARACTER}"),
}
"""Control characters, those that turn the direction of text that follows, and what is no character at all."""


def one_line(text: str) -> str:
    """A name on one line; of what cannot be printed, such as a mark that turns text around, a question mark is left."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


def visible(text: str) -> str:
    """The text with everything that is not printed (control characters, escape sequences, marks that turn the
    direction of writing, half surrogates) in Python's spelling; a space stays one."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def short(value: object, most: int = 40) -> str:
    """Text of others in a figure: on one line, and no longer than there is room for."""
    text = " ".join(str(value).translate(HIDDEN).split())
    return text if len(text) <= most else f"{text[: most - 1]}\N{HORIZONTAL ELLIPSIS}"


def code(text: str, *, in_table: bool = False) -> str:
    """A name as Markdown code, which nothing in it can break out of; a table wants its bars escaped even there."""
    plain = one_line(text).replace("`", "'")
    return f"`{plain.replace('|', chr(92) + '|') if in_table else plain}`"


def escaped(text: str) -> str:
    """Words of others as running text of Markdown that says the same: no mark-up, no HTML, no links, no cells."""
    return html.escape(SPECIAL.sub(r"\\\g<0>", one_line(text)), quote=False)


@functools.cache
def page_templates() -> Environment:
    """Templates of pages. What they are given is escaped, and loses its hidden characters, unless it is markup."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("dsg_cli.report", "."),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else str(value).translate(HIDDEN),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
