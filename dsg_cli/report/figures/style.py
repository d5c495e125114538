"""How figures look, and how they go into a page or a file.

Colours are Okabe and Ito's, which people who do not see all colours can tell apart; markers and lines say the same once
more. In a page they follow the reader's theme.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsg_cli.report.rendering import HIDDEN, Markup, tag

COLOURS = {
    "vermilion": ("#d55e00", "#f08a3c"),
    "blue": ("#0072b2", "#56b4e9"),
    "green": ("#009e73", "#3cc79d"),
    "purple": ("#aa4a84", "#e29ac4"),
    "orange": ("#b87a00", "#e69f00"),
    "grey": ("#6b6b6b", "#a8a8a8"),
}
"""Name -> on a light ground and on a dark one."""

CYCLE = tuple(light for light, _ in COLOURS.values())

FORGET, KEPT, OTHER, PURPLE, ORANGE, GREY = CYCLE

INK, LINE = "#1a1b1c", "#c3c4c5"
"""Of text and axes, and of grids: what a page replaces by its own."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h", "p")

DASHES = ("-", "--", "-.", ":")

STYLE: Any = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "text.parse_math": False,
}

PIXELS = 1.3
"""Of a page to a point of a figure, where there is room."""

NARROWEST = 420
"""Pixels; on a narrower screen a figure scrolls, so that what is written in it can be read."""


@dataclass(frozen=True)
class Drawn:
    """One figure."""

    name: str
    """Of its file, and in the page."""
    artifact: str
    """Id of what its numbers are from; empty where it names them itself."""
    title: str
    description: str
    """What it shows, for those who do not see it: with its numbers."""
    figure: Figure

    def markup(self) -> Markup:
        """For a page, in the colours of its theme."""
        svg = self._content("svg", transparent=True).decode()
        svg = re.sub(r"^.*?(?=<svg )", "", svg, flags=re.S)
        svg = re.sub(r"<metadata>.*?</metadata>|<style [^>]*>.*?</style>|<!--.*?-->", "", svg, flags=re.S)
        used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
        svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
        svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{self.name}-", svg)  # Several figures stand in one page.
        width = float(re.findall(r'viewBox="0 0 ([0-9.]+) ', svg)[0])
        title, text = (tag(name, said, id=f"{self.name}-{name}") for name, said in self._said())
        room = f"width: {width * PIXELS:.0f}px; min-width: {min(width, NARROWEST):.0f}px"
        head = f'role="img" aria-labelledby="{self.name}-title" aria-describedby="{self.name}-desc" style="{room}"'
        svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" {head}>', svg, count=1)
        svg = svg.replace(">", f">{title}{text}", 1)
        for name, (light, _) in COLOURS.items():
            svg = svg.replace(light, f"var(--{name})")
        svg = svg.replace(INK, "currentColor").replace(LINE, "var(--line)").strip()
        box = tag("div", Markup(svg), class_="scrolls", tabindex="0", role="group", aria_label=f"Figure: {self.title}")
        return tag("figure", box, tag("figcaption", f"{self.title} ", _link(self.artifact) if self.artifact else None))

    def _said(self) -> tuple[tuple[str, str], tuple[str, str]]:
        return ("title", self.title), ("desc", self.description)

    def content(self, kind: str) -> bytes:
        """As a file for a paper: `svg`, whose letters are outlines and look the same anywhere, `png` or `pdf`."""
        return self._content(kind, dpi=200, bbox_inches="tight")

    def _content(self, kind: str, **options: Any) -> bytes:
        metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None}}
        letters: Any = {"svg.fonttype": "none" if options.get("transparent") else "path"}
        out = io.BytesIO()
        with rc_context({"svg.hashsalt": self.name, **STYLE, **letters}):
            self.figure.savefig(out, format=kind, metadata=metadata[kind], **options)
        return out.getvalue()


def short(value: object, most: int = 40) -> str:
    """Text of others in a figure: on one line, and no longer than there is room for."""
    shown = " ".join(str(value).translate(HIDDEN).split())
    return shown if len(shown) <= most else f"{shown[: most - 1]}\N{HORIZONTAL ELLIPSIS}"


def _link(artifact: str) -> Markup:
    return tag("a", artifact, href=f"#from-{artifact}", class_="id")


@contextmanager
def drawing(width: float = 6.4, height: float = 3.4, **grid: Any) -> Iterator[tuple[Figure, Any]]:
    """A figure with its axes, in inches; `grid` as for `Figure.subplots`."""
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(**grid)


def look(number: int) -> dict[str, Any]:
    """Colour and marker of one of many, no two alike."""
    return {"color": CYCLE[number % len(CYCLE)], "marker": MARKERS[(number + number // len(MARKERS)) % len(MARKERS)]}


def chance_line(axes: Axes, chance: float) -> None:
    """Where guessing lies."""
    axes.axhline(chance, color=GREY, linestyle=":", linewidth=1, label="chance")


def key_above(axes: Axes, ncols: int = 2) -> None:
    """The key where it covers nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=ncols, fontsize=8.5, borderaxespad=0.2)


def theme() -> str:
    """Colours of figures as a page's variables."""
    light, dark = ("".join(f"--{name}: {pair[i]};" for name, pair in COLOURS.items()) for i in (0, 1))
    return f":root {{ {light} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
