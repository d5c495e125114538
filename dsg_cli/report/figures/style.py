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
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsg_cli.report.html import Markup, tag

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
FORMATS = ("svg", "png", "pdf")
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
}


@dataclass(frozen=True)
class Drawn:
    """One figure."""

    name: str
    """Of its file, and in the page."""
    artifact: str
    """Id of what its numbers are from."""
    title: str
    description: str
    """What it shows, for those who do not see it: with its numbers."""
    figure: Figure

    def markup(self) -> Markup:
        """For a page, in the colours of its theme."""
        with rc_context({"svg.hashsalt": self.name, **STYLE}):
            out = io.StringIO()
            self.figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        svg = re.sub(r"^.*?(?=<svg )", "", out.getvalue(), flags=re.S)
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
        svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{self.name}-", svg)  # Several figures stand in one page.
        svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" {self._named()}>', svg, count=1)
        svg = svg.replace(">", f">{tag('title', self.title)}{tag('desc', self.description)}", 1)
        for name, (light, _) in COLOURS.items():
            svg = svg.replace(light, f"var(--{name})")
        svg = svg.replace(INK, "currentColor").replace(LINE, "var(--line)").strip()
        return tag("figure", Markup(svg), tag("figcaption", f"{self.title} ", _link(self.artifact)))

    def _named(self) -> str:
        return f'role="img" aria-label="{tag("x", f"{self.title} {self.description}")[3:-4]}" xmlns="http://www.w3.org/2000/svg"'

    def save(self, folder: Path, kind: str) -> Path:
        """As a file for a paper."""
        path = folder / f"{self.name}.{kind}"
        metadata = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
        with rc_context({"svg.hashsalt": self.name, **STYLE}):
            self.figure.savefig(path, format=kind, dpi=200, bbox_inches="tight", metadata=metadata)
        return path


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


def chance_line(axes: Axes, chance: float, *, is_vertical: bool = False) -> None:
    """Where guessing lies."""
    (axes.axvline if is_vertical else axes.axhline)(chance, color=GREY, linestyle=":", linewidth=1, label="chance")


def theme() -> str:
    """Colours of figures as a page's variables."""
    light, dark = ("".join(f"--{name}: {pair[i]};" for name, pair in COLOURS.items()) for i in (0, 1))
    return f":root {{ {light} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
