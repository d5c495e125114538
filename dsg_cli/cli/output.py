"""Results to stdout, talk to stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsg_cli.cli.following import next_command
from dsg_cli.errors import DsgError
from dsg_cli.integrity import is_taken
from dsg_cli.progress import Report, silent

if TYPE_CHECKING:
    from dsg_cli.workspace import Stored

UNITS = ("tokens", "prompts", "points", "rows", "steps", "layers")
"""What work is counted in; a report ends with one of them, after a comma."""
WIDEST = 26
"""Characters of a description: with bar, rate and times it fits 80 columns."""


def show_stored(stored: Stored | Sequence[Stored], *, as_json: bool, quiet: bool, view: Any = None) -> None:
    """What a stage made: a table on a terminal (`view`, if given), its id off one, its own JSON with `--json`."""
    several = list(stored) if isinstance(stored, Sequence) else [stored]
    if as_json:
        documents = [one.json for one in several]
        print_json(documents[0] if len(documents) == 1 else documents)
    elif sys.stdout.isatty():
        from dsg_cli.report.console import console
        from dsg_cli.report.tables import artifact_table

        for one in several:
            console().print(artifact_table(one, view))
        _show_ranking(several)
    else:
        for one in several:
            print_line(one.id)
    is_said = quiet or (sys.stdout.isatty() and not as_json)  # In the table.
    for note in dict.fromkeys(note for one in several for note in one.header.notes) if not is_said else ():
        sys.stderr.write(f"note: {note}\n")
    if not quiet:
        hint(f"Next: {next_command(several[-1])}")


def _show_ranking(stored: Sequence[Stored]) -> None:
    """Several attacks in one table."""
    from dsg_cli.artifacts import AttackReport
    from dsg_cli.report.attacks import ranking_table
    from dsg_cli.report.console import console

    attacks = [one.body for one in stored if isinstance(one.body, AttackReport)]
    if len(attacks) > 1:
        console().print(ranking_table(attacks))


def check_new_file(path: Path, flag: str, *, force: bool = False) -> None:
    """Refuse a file that cannot be written, or that is there already, before anything is computed for it.

    Raises:
        DsgError: It is one.
    """
    if is_taken(path) and (path.is_dir() or not force):
        raise DsgError(f"{path} is there already.", f"Name another file with {flag}, or replace it with --force.")
    if not path.parent.is_dir():
        raise DsgError(f"There is no folder {path.parent}.", f"Make it, or name another file with {flag}.")


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    print_line(json.dumps(document, indent=1, ensure_ascii=False))


def print_line(text: str) -> None:
    """One line on stdout."""
    sys.stdout.write(text + "\n")


def print_names(names: Sequence[str], *, as_json: bool) -> None:
    """Names, one a line."""
    if as_json:
        print_json(list(names))
    else:
        for name in names:
            print_line(name)


def print_table(table: Any) -> None:
    """A table for the person at the terminal, on stderr."""
    from dsg_cli.report.console import console

    console(sys.stderr).print(table)


def hint(text: str) -> None:
    """A word to the person at the terminal, on stderr."""
    if sys.stderr.isatty():
        from dsg_cli.report.console import console

        console(sys.stderr).print(text, style="dim", highlight=False)


@contextmanager
def progress(quiet: bool) -> Iterator[Report]:
    """A progress bar on stderr, only on a terminal. Whatever libraries print meanwhile goes to stderr too."""
    with redirect_stdout(sys.stderr), _bars(quiet) as report:
        yield report


@contextmanager
def _bars(quiet: bool) -> Iterator[Report]:
    from dsg_cli.report.console import can_redraw, console

    if quiet or not can_redraw():
        yield silent
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<26}"),
        BarColumn(bar_width=14),
        TextColumn("{task.fields[share]}"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(sys.stderr), transient=True) as bars:
        task = bars.add_task("loading", total=None, rate="", share="")
        current, began, first = "", time.monotonic(), 0

        def report(what: str, done: int, total: int) -> None:
            nonlocal current, began, first
            shown, work, unit = spoken(what)
            if work != current:
                current, began, first = work, time.monotonic(), done
                bars.reset(task)
            rate = rate_of(done - first, time.monotonic() - began, unit)
            share = f"{done / total:4.0%}" if total else ""
            bars.update(task, description=shown, completed=done, total=total or None, rate=rate, share=share)

        yield report


def spoken(what: str) -> tuple[str, str, str]:
    """Of what is reported: how it is shown, by what one piece of work is known from the next, and what it counts."""
    parts = what.split(", ")
    unit = parts.pop() if len(parts) > 1 and parts[-1] in UNITS else ""
    shown = ", ".join(parts)
    work = ", ".join(part for part in parts if not part.startswith("loss "))
    return shown if len(shown) <= WIDEST else shown[: WIDEST - 3] + "...", work, unit


def rate_of(done: int, seconds: float, unit: str) -> str:
    """How fast it goes, once that can be told."""
    if not unit or not done or seconds <= 1:
        return ""
    rate = done / seconds
    return f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.1f} {unit}/s"
