"""Results to stdout, talk to stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsg_cli.errors import DsgError
from dsg_cli.integrity import is_taken
from dsg_cli.progress import Report, silent

if TYPE_CHECKING:
    from dsg_cli.workspace import Stored


def show_stored(stored: Stored | Sequence[Stored], *, as_json: bool, quiet: bool, view: Any = None) -> None:
    """What a stage made: a table on a terminal (`view`, if given), its id off one, its own JSON with `--json`."""
    from dsg_cli.artifacts import NEXT_COMMAND

    several = list(stored) if isinstance(stored, Sequence) else [stored]
    if as_json:
        documents = [one.json for one in several]
        print_json(documents[0] if len(documents) == 1 else documents)
    elif sys.stdout.isatty():
        from dsg_cli.report.console import console
        from dsg_cli.report.tables import artifact_table

        for one in several:
            console().print(artifact_table(one, view))
    else:
        for one in several:
            print_line(one.id)
    for note in dict.fromkeys(note for one in several for note in one.header.notes) if not quiet else ():
        sys.stderr.write(f"note: {note}\n")
    if not quiet:
        hint(f"Next: {NEXT_COMMAND[several[-1].header.kind]}")


def show_ranking(stored: Sequence[Stored]) -> None:
    """Several attacks in one table, on a terminal."""
    from dsg_cli.artifacts import AttackReport

    if sys.stdout.isatty():
        from dsg_cli.report.attacks import ranking_table
        from dsg_cli.report.console import console

        console().print(ranking_table([one.body_as(AttackReport) for one in stored]))


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
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(sys.stderr), transient=True) as bars:
        task = bars.add_task("loading", total=None, rate="")
        current, began = "", time.monotonic()

        def report(what: str, done: int, total: int) -> None:
            nonlocal current, began
            if what.split(",")[0] != current:
                current, began = what.split(",")[0], time.monotonic()
                bars.reset(task)
            seconds, is_tokens = time.monotonic() - began, what.endswith(", tokens")
            rate = f"{done / seconds:,.0f} tokens/s" if is_tokens and seconds > 1 else ""
            shown = what.removesuffix(", tokens")
            bars.update(task, description=shown, completed=done, total=total or None, rate=rate)

        yield report
