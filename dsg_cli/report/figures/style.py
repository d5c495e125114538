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
from xml.etree import ElementTree

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsg_cli.report.rendering import HIDDEN

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
FORGET, KEPT, OTHER, *_, GREY = CYCLE
INK, LINE = "#1a1b1c", "#c3c4c5"  # Of text and axes, and of grids: what a page replaces by its own.
THEME = {light: f"var(--{name})" for name, (light, _) in COLOURS.items()} | {INK: "currentColor", LINE: "var(--line)"}
"""What a page says instead of a colour."""

THEMED = re.compile("|".join(THEME))
SVG = "{http://www.w3.org/2000/svg}"
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

PIXELS = 1.3  # Of a page to a point of a figure, where there is room.
NARROWEST = 420  # Pixels; on a narrower screen a figure scrolls, so that what is written in it can be read.


@dataclass(frozen=True)
class Drawn:
    """One figure."""

    name: str  # Of its file, and in the page.
    artifact: str  # Id of what its numbers are from; empty where it names them itself.
    title: str
    description: str  # What it shows, for those who do not see it: with its numbers.
    figure: Figure

    def svg(self) -> Markup:
        """For a page, in the colours of its theme; several figures stand in one page."""
        text = self._content("svg", transparent=True).decode().translate(HIDDEN)
        root = ElementTree.fromstring(text)
        referred = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
        for element in root.iter():
            for child in [child for child in element if child.tag in (f"{SVG}metadata", f"{SVG}style")]:
                element.remove(child)
            element.tag = element.tag.removeprefix(SVG)
            attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
            element.attrib.clear()
            for key, value in attributes.items():
                if key == "id" and value in referred:
                    element.set(key, f"{self.name}-{value}")
                elif key == "href":
                    element.set(key, f"#{self.name}-{value.removeprefix('#')}")
                elif key != "id":
                    value = value.replace("url(#", f"url(#{self.name}-")
                    element.set(key, THEMED.sub(lambda colour: THEME[colour[0]], value))
        view_box = root.attrib["viewBox"]
        width = float(view_box.split()[2])
        root.attrib.clear()
        room = f"width: {width * PIXELS:.0f}px; min-width: {min(width, NARROWEST):.0f}px"
        labels = {"aria-labelledby": f"{self.name}-title", "aria-describedby": f"{self.name}-desc"}
        root.attrib.update({"viewBox": view_box, "role": "img", "style": room} | labels)
        for place, (tag, words) in enumerate((("title", self.title), ("desc", self.description))):
            label = ElementTree.Element(tag, {"id": f"{self.name}-{tag}"})
            label.text = words.translate(HIDDEN)
            root.insert(place, label)
        return Markup(ElementTree.tostring(root, encoding="unicode"))

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


@contextmanager
def drawing(width: float = 6.4, height: float = 3.4, **grid: Any) -> Iterator[tuple[Figure, Any]]:
    """A figure with its axes, in inches; `grid` as for `Figure.subplots`."""
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(**grid)


def look(number: int) -> dict[str, Any]:
    """Colour, marker and dashes of one line of many, no two alike."""
    marker = MARKERS[(number + number // len(MARKERS)) % len(MARKERS)]
    return {"color": CYCLE[number % len(CYCLE)], "marker": marker, "linestyle": DASHES[number % len(DASHES)]}


def key_above(axes: Axes, ncols: int = 2) -> None:
    """The key where it covers nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=ncols, fontsize=8.5, borderaxespad=0.2)


def theme() -> str:
    """Colours of figures as a page's variables."""
    light, dark = ("".join(f"--{name}: {pair[i]};" for name, pair in COLOURS.items()) for i in (0, 1))
    return f":root {{ {light} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
