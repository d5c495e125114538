"""HTML that cannot be broken by what is in it: every text is escaped unless it was made here.

Corpora, names and notes are untrusted. `tag` escapes its children and attributes; only what `tag` returns, and
figures, goes in as it is. The page that it makes loads nothing: its policy forbids all but its own style.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

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
