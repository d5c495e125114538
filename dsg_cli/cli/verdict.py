"""What a script or a CI job is told at the end: a summary in a file, and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dsg_cli.errors import DsgError
from dsg_cli.workers import launched

if TYPE_CHECKING:
    from dsg_cli.workspace import Stored

EXPECTATION_NOT_MET = 3


def appended(name: str | None) -> Callable[[str], None]:
    """What appends text to a file; without a file, nothing.

    Raises:
        DsgError: The file cannot be written to, which is tried now, before any work.
    """
    if name is None or not launched().is_first:
        return lambda _text: None

    def append(text: str) -> None:
        try:
            with Path(name).open("a", encoding="utf-8") as file:
                file.write("\n" + text if text and file.tell() else text)
        except OSError as error:
            reason = f"The summary file {name!r} cannot be written to: {error.strerror}."
            raise DsgError(reason, "Give --summary a file in a folder that exists.") from error

    append("")
    return append


def summary_to(name: str | None) -> Callable[[Sequence[Stored]], None]:
    """What appends a Markdown section on artifacts to a file, likewise.

    Raises:
        DsgError: The file cannot be written to.
    """
    append = appended(name)

    def write(chain: Sequence[Stored]) -> None:
        from dsg_cli.report.summary import markdown

        append(markdown(chain) if name is not None and launched().is_first else "")

    return write


def exit_unless_met(chain: Sequence[Stored]) -> None:
    """Exit 3, with a table on stderr of what failed, if an expectation of any evaluation was not met."""
    from dsg_cli.report.console import console
    from dsg_cli.report.expectations import missed_table

    table = missed_table(chain)
    if table is not None:
        console(sys.stderr).print(table)
        raise typer.Exit(EXPECTATION_NOT_MET)
