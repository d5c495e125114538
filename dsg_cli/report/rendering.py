"""Where tables are printed: in colour on a terminal that wants it, plain and 80 columns wide off one."""

from __future__ import annotations

import html
import os
import re
import sys
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import Any, TextIO

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from dsg_cli.workspace.results import Json


def interval_markup(side: Json, metric: str) -> str:
    """The 95 % interval of a metric, or a dash."""
    low, high = side.get(f"{metric}_low"), side.get(f"{metric}_high")
    if low is None or high is None:
        return "-"
    first, last = (f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" for value in (low, high))
    return f"{first}-{last}" if low >= 0 else f"{first} to {last}"


def number(value: float | None) -> str:
    """A number in a table: two or three decimals, more for what is tiny; a dash for none."""
    if value is None:
        return "-"
    if 0 < abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def console(stream: TextIO | None = None) -> Console:
    """A console on a stream, by default stdout; `NO_COLOR` means no styles at all."""
    out = stream or sys.stdout
    return Console(
        file=out,
        width=None if out.isatty() else 80,
        color_system=None if os.environ.get("NO_COLOR") else "auto",
        # Every name as it is, brackets and colons too.
        markup=False,
        emoji=False,
    )


def captioned(table: Table) -> Group:
    """A table with its caption below as running text: rich would squeeze it into the table's own width."""
    caption, table.caption = table.caption, None
    return Group(table, *([caption if isinstance(caption, Text) else Text(str(caption))] if caption else []))


def can_redraw() -> bool:
    """Whether stderr is a terminal on which a line can be drawn over: a progress bar needs that."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def share(value: float | None) -> str:
    """A rate, or a dash."""
    return "-" if value is None else f"{value:.2f}"


def forget_interval(side: Json) -> str:
    """The 95 % interval of a forget accuracy."""
    has_interval = {"forget_low", "forget_high"} <= set(side)
    return f"{side['forget_low']:.2f}-{side['forget_high']:.2f}" if has_interval else "-"


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


def visible(text: str) -> str:
    """The text with everything that is not printed (control characters, escape sequences, marks that turn the
    direction of writing, half surrogates) in Python's spelling; a space stays one."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"

HIDDEN = {
    **{number: None for number in range(32) if chr(number) not in "\t\n"},
    **dict.fromkeys(range(0x7F, 0xA0)),
    **dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), "\N{REPLACEMENT CHARACTER}"),
    **dict.fromkeys(range(0xD800, 0xE000), "\N{REPLACEMENT CHARACTER}"),
}
"""Control characters, those that turn the direction of text that follows, and halves of surrogate pairs."""

VOID = ("meta", "link", "br")


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = str | Iterable["Child"] | None


def text(value: object) -> Markup:
    """A text as HTML."""
    return value if isinstance(value, Markup) else Markup(escape(str(value).translate(HIDDEN)))


def tag(name: str, /, *children: Child, **attributes: Any) -> Markup:
    """An element.

    Args:
        name: Of the element.
        children: Texts, which are escaped, elements, or lists of them.
        attributes: `for_` and `class_` for Python's keywords, `_` for `-`; None and False leave one out.
    """
    given = [(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items()]
    shown = [
        f" {key}" if value is True else f' {key}="{text(value)}"'
        for key, value in given
        if value is not None and value is not False
    ]
    if name in VOID:
        return Markup(f"<{name}{''.join(shown)}>")
    return Markup(f"<{name}{''.join(shown)}>{''.join(_flat(children))}</{name}>")


def _flat(children: Iterable[Child]) -> Iterable[str]:
    for child in children:
        if child is None:
            continue
        if isinstance(child, str):
            yield text(child)
        else:
            yield from _flat(child)


def isolated(value: str, **attributes: Any) -> Markup:
    """Text of unknown direction, which does not turn what stands beside it."""
    return tag("bdi", value, dir="auto", **attributes) if value else Markup("")


def folded(inner: Markup | str, name: str) -> Markup:
    """What is there for who wants it."""
    return tag("details", tag("summary", name), Markup(inner))


def of_rich(shown: Any, caption: str = "") -> Markup:
    """What a terminal shows, as HTML: tables, texts and groups of them.

    Args:
        shown: Made by another module of this package.
        caption: Of a table without a title.
    """
    if isinstance(shown, Group):
        return Markup("".join(of_rich(one, caption) for one in shown.renderables))
    if isinstance(shown, Table):
        return _table(shown, caption)
    plain = str(shown)
    failed = isinstance(shown, Text) and "red" in str(shown.style)
    return tag("p", isolated(plain), class_="failed" if failed else "note") if plain.strip() else Markup("")


def _table(table: Table, caption: str) -> Markup:
    columns = [[_cell(cell) for cell in column.cells] for column in table.columns]
    heads = [_cell(column.header) for column in table.columns]
    rows = [list(row) for row in zip(*columns, strict=True)]
    numeric = [column and all(_is_number(str(cell)) for cell in column) for column in columns]
    return data_table(
        heads if table.show_header else [], rows, caption=caption, after=_cell(table.caption), numeric=numeric
    )


def data_table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    caption: str,
    after: str = "",
    numeric: Sequence[object] = (),
) -> Markup:
    """A table in a box of its own that scrolls where the page is narrow; each row is headed by its first cell."""
    numeric = numeric or [False] * max(map(len, [heads, *rows]), default=0)
    kinds = ["number" if is_number else None for is_number in numeric]

    def row(cells: Sequence[str]) -> Markup:
        head = tag("th", isolated(cells[0]), scope="row", class_=kinds[0])
        first = head if cells[0].strip() else tag("td")
        rest = [tag("td", isolated(one), class_=kind) for one, kind in zip(cells[1:], kinds[1:], strict=False)]
        return tag("tr", first, rest)

    head = tag("tr", [tag("th", one, scope="col", class_=kind) for one, kind in zip(heads, kinds, strict=False)])
    made = tag(
        "table",
        tag("caption", isolated(caption)),
        tag("thead", head) if any(heads) else None,
        tag("tbody", [row(cells) for cells in rows]),
    )
    box = tag("div", made, class_="scrolls", tabindex="0", role="region", aria_label=caption)
    return Markup(box + (tag("p", isolated(after), class_="note") if after else ""))


def _cell(value: Any) -> str:
    return "" if value is None else str(value)


def _is_number(cell: str) -> bool:
    return not cell.strip() or cell.strip()[0] in "-+.<0123456789"


def page(title: str, *body: Child, figures_style: str = "") -> str:
    """A whole document that needs nothing beside it."""
    style = files("dsg_cli.report").joinpath("page.css").read_text(encoding="utf-8") + figures_style
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("link", rel="icon", href="data:,"),
        tag("style", Markup(style)),
    )
    return "<!doctype html>\n" + tag("html", head, tag("body", body), lang="en") + "\n"
