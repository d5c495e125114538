"""Where tables are printed: in colour on a terminal that wants it, plain and 80 columns wide off one."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text


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
