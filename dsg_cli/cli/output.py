"""Results to stdout, talk to stderr."""

from __future__ import annotations

import gc
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dsg_cli.cli.options import DEFAULT_WORKSPACE
from dsg_cli.errors import DsgError
from dsg_cli.job import Report, launched, silent
from dsg_cli.workspace.files import is_taken

if TYPE_CHECKING:
    from dsg_cli.inference.generation import GateTrace
    from dsg_cli.stages.prompts import Answers
    from dsg_cli.stages.stage import RunOptions
    from dsg_cli.workspace.store import Stored


def next_command(stored: Stored) -> str:
    """What most people do next, in the workspace of the artifact."""

    words = stored.body.next_command
    if words == "dsg eval":
        bench = _bench(stored)
        if bench is None:
            return "dsg ls benches"
        words = f"dsg eval --bench {shlex.quote(bench)}"
    elif words == "dsg attack":
        words = "dsg attack --kind dilution"
    return words + in_workspace(stored.path.parent)


def in_workspace(folder: Path) -> str:
    """The option that names a workspace, where it must be named."""
    is_default = folder == Path(os.environ.get("DSG_WORKSPACE") or DEFAULT_WORKSPACE)
    return "" if is_default else f" -w {shlex.quote(str(folder))}"


def _bench(stored: Stored) -> str | None:
    """A bench on what is forgotten, if one is named like it."""
    from dsg_cli.evals import known_benches

    return next((name for name in getattr(stored.body, "forget", []) if name in known_benches()), None)


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
        from dsg_cli.report.rendering import console
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
    from dsg_cli.report.evaluations import ranking_table
    from dsg_cli.report.rendering import console
    from dsg_cli.workspace.results import AttackReport

    attacks = [one.body for one in stored if isinstance(one.body, AttackReport)]
    if len(attacks) > 1:
        console().print(ranking_table(attacks))


def check_new_file(path: Path, flag: str, *, force: bool = False) -> None:
    """Refuse a file that cannot be written, or that is there already, before anything is computed for it."""
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
    from dsg_cli.report.rendering import console

    console(sys.stderr).print(table)


def hint(text: str) -> None:
    """A word to the person at the terminal, on stderr."""
    if sys.stderr.isatty():
        from dsg_cli.report.rendering import console

        console(sys.stderr).print(text, style="dim", highlight=False)


@contextmanager
def progress(quiet: bool) -> Iterator[Report]:
    """A progress bar on stderr, only on a terminal. Whatever libraries print meanwhile goes to stderr too."""
    with redirect_stdout(sys.stderr), _bars(quiet) as report:
        yield report


@contextmanager
def _bars(quiet: bool) -> Iterator[Report]:
    from dsg_cli.report.rendering import can_redraw, console

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


SHARED = ("select", "calibrate", "apply", "eval", "attack", "run", "demo")
"""Commands that several processes do together."""


@contextmanager
def running(quiet: bool, *, reuse: bool = False, resume: bool = False) -> Iterator[RunOptions]:
    """How a stage is run by this process, alone or among those that `torchrun` started."""
    with progress(quiet) as report:
        import_libraries()
        from dsg_cli.job import joined
        from dsg_cli.stages.stage import RunOptions

        with joined() as workers:
            yield RunOptions(reuse, resume, workers, report, say=lambda text: _say(text, quiet))


def import_libraries() -> None:
    """Import torch and transformers without garbage collection: a second less, of the three that they take.

    They make objects by the hundred thousand, and no garbage. Those live to the end, so they are never looked through.
    """
    if "dsg_cli.models.language_model" in sys.modules or not gc.isenabled():
        return
    gc.disable()
    try:
        import dsg_cli.models.language_model  # noqa: F401 (for what it imports)
    finally:
        gc.freeze()
        gc.enable()


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        sys.stderr.write(text + "\n")


def be_quiet_unless_first() -> None:
    """Of several processes only the first writes to the terminal; errors go past this (app.py)."""
    if not launched().is_first:
        sys.stdout = sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (for the process's life)


def check_shared(command: str | None) -> None:
    """Refuse a command that several processes cannot do together."""
    if launched().n > 1 and command not in SHARED:
        raise DsgError(f"dsg {command} runs in one process.", f"Without torchrun; it is for {', '.join(SHARED[:-1])}.")


def resume_command(arguments: Sequence[str]) -> str:
    """What to type to go on with an interrupted command."""
    words = [*arguments, *([] if "--resume" in arguments else ["--resume"])]
    if launched().n == 1:
        return shlex.join(["dsg", *words])
    local = os.environ.get("LOCAL_WORLD_SIZE", str(launched().n))
    return shlex.join(["torchrun", "--nproc-per-node", local, "-m", "dsg_cli", *words])


EXPECTATION_NOT_MET = 3


def appended(name: str | None) -> Callable[[str], None]:
    """What appends text to a file; without a file, nothing."""
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
    """What appends a Markdown section on artifacts to a file, likewise."""
    append = appended(name)

    def write(chain: Sequence[Stored]) -> None:
        from dsg_cli.report.summary import markdown

        append(markdown(chain) if name is not None and launched().is_first else "")

    return write


def exit_unless_met(chain: Sequence[Stored]) -> None:
    """Exit 3, with a table on stderr of what failed, if an expectation of any evaluation was not met."""
    from dsg_cli.report.evaluations import missed_table
    from dsg_cli.report.rendering import console

    table = missed_table(chain)
    if table is not None:
        console(sys.stderr).print(table)
        raise typer.Exit(EXPECTATION_NOT_MET)


class Screen:
    """Where answers go: stdout as it was when this was made. One side alone stands without its name."""

    def __init__(self, side: str, *, is_silent: bool) -> None:
        self.is_alone = side != "both"
        self.is_silent = is_silent
        self.out = sys.stdout
        self.is_live = self.out.isatty() and not is_silent
        self.current = ""

    def write(self, side: str, piece: str) -> None:
        """A piece of a side's answer."""
        if not self.is_live:
            return
        if side != self.current:
            self._show("\n" if self.current else "")
            self._show("" if self.is_alone else f"{side + ':':<9}", "dim")
            self.current = side
        self._show(piece)

    def close(self, done: Answers) -> None:
        """Every side of a prompt is there."""
        if self.is_live:
            self._show("\n")
            if "guarded" in done.sides:
                guarded = done.sides["guarded"]
                for name, gate in zip(done.guardrails, guarded.gates, strict=True):
                    self._show(f"gate:    {_told(name, gate, guarded.tokens)}\n", "dim")
            self._show("\n")
        elif not self.is_silent:
            for side, one in done.sides.items():
                self.out.write((one.text if self.is_alone else f"{side}: {one.text}") + "\n")
        self.current = ""

    def _show(self, text: str, style: str | None = None) -> None:
        from dsg_cli.report.rendering import console

        console(self.out).print(text, end="", style=style, markup=False, highlight=False, soft_wrap=True)


def _told(name: str, gate: GateTrace, tokens: list[str]) -> str:
    if not gate.statistic:
        return f"{name} was not asked: the prompt was refused"
    peak = max(gate.statistic)
    if gate.latched_at is None:
        return f"{name} stayed shut ({gate.form} {peak:.2f}, threshold {gate.threshold:.2f})"
    at = f"token {gate.latched_at + 1} of {len(tokens)}, {tokens[gate.latched_at].strip()!r}"
    return f"{name} opened at {at} ({gate.form} {peak:.2f}, threshold {gate.threshold:.2f})"
