"""Results to stdout, talk to stderr: tables, hints, progress bars, answers as they are written, the verdict."""

from __future__ import annotations

import gc
import json
import logging
import os
import shlex
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

from dsg_cli.errors import DsgError
from dsg_cli.job import Report, joined, launched, silent
from dsg_cli.workspace.files import is_taken

if TYPE_CHECKING:
    from dsg_cli.inference.generation import GateTrace
    from dsg_cli.stages.prompts import Answers
    from dsg_cli.stages.stage import RunOptions
    from dsg_cli.workspace.store import Stored, Workspace

DEFAULT_WORKSPACE = Path("dsg-workspace")
EXPECTATION_NOT_MET = 3

SHARED = ("select", "calibrate", "apply", "eval", "attack", "run", "demo")
"""Commands that several processes do together."""

UNITS = ("tokens", "prompts", "points", "rows", "steps", "layers")
"""What work is counted in; a report ends with one of them, after a comma."""
WIDEST = 26
"""Characters of a description: with bar, rate and times it fits 80 columns."""


@dataclass
class Output:
    """How a command was started, and where what it says goes: stdout as it was before libraries could write to it."""

    workspace: Path = DEFAULT_WORKSPACE
    as_json: bool = False
    quiet: bool = False
    summary: str | None = None
    """File to which a Markdown section is appended."""
    reuse: bool = False
    resume: bool = False
    stdout: TextIO = field(default_factory=lambda: sys.stdout)

    @property
    def store(self) -> Workspace:
        from dsg_cli.workspace.store import Workspace

        return Workspace(self.workspace)

    @property
    def is_terminal(self) -> bool:
        return self.stdout.isatty()

    # What is computed, and what libraries print meanwhile.

    @contextmanager
    def session(self) -> Iterator[RunOptions]:
        """How a stage is run: by this process alone, or with those that `torchrun` started."""
        self.append("")  # A summary that cannot be written is refused before the work.
        with self.computing() as report:
            from dsg_cli.stages.stage import RunOptions

            with joined() as workers:
                yield RunOptions(self.reuse, self.resume, workers, report, say=self.talk)

    @contextmanager
    def computing(self, *, has_bars: bool = True) -> Iterator[Report]:
        """Progress of what needs torch."""
        with self.progress(has_bars=has_bars) as report:
            import_libraries()
            yield report

    @contextmanager
    def progress(self, *, has_bars: bool = True) -> Iterator[Report]:
        """A progress bar on stderr, only on a terminal. Whatever libraries print meanwhile goes to stderr too."""
        from dsg_cli.report.rendering import can_redraw

        with redirect_stdout(sys.stderr):
            if self.quiet or not has_bars or not can_redraw():
                yield silent
                return
            with _bars() as report:
                yield report

    # Results.

    def json(self, document: Any) -> None:
        self.line(json.dumps(document, indent=1, ensure_ascii=False))

    def line(self, text: str) -> None:
        self.stdout.write(text + "\n")

    def lines(self, names: Iterable[str]) -> None:
        """Names, one a line, or as a JSON list."""
        if self.as_json:
            self.json([*names])
            return
        for name in names:
            self.line(name)

    def print(self, renderable: Any, **options: Any) -> None:
        """A table or another thing of rich's, wherever stdout goes."""
        from dsg_cli.report.rendering import console

        console(self.stdout).print(renderable, **options)

    def show(self, *artifacts: Stored, view: Any = None) -> None:
        """What a stage made: a table on a terminal (`view`, if given), its id off one, its own JSON with `--json`."""
        if self.as_json:
            documents = [stored.json for stored in artifacts]
            self.json(documents[0] if len(documents) == 1 else documents)
        elif self.is_terminal:
            from dsg_cli.report.evaluations import ranking_table
            from dsg_cli.report.tables import artifact_table
            from dsg_cli.workspace.results import AttackReport

            for stored in artifacts:
                self.print(artifact_table(stored, view))
            attacks = [stored.body for stored in artifacts if isinstance(stored.body, AttackReport)]
            if len(attacks) > 1:
                self.print(ranking_table(attacks))
        else:
            self.lines([stored.id for stored in artifacts])
        if self.as_json or not self.is_terminal:  # A table has them.
            for note in dict.fromkeys(note for stored in artifacts for note in stored.header.notes):
                self.talk(f"note: {note}")
        self.hint(f"Next: {next_command(artifacts[-1])}")

    # Talk.

    def talk(self, text: str) -> None:
        """A line on stderr."""
        if not self.quiet:
            sys.stderr.write(text + "\n")

    def hint(self, text: str) -> None:
        """A word to the person at the terminal, on stderr."""
        if not self.quiet and sys.stderr.isatty():
            from dsg_cli.report.rendering import console

            console(sys.stderr).print(text, style="dim", highlight=False)

    def append(self, text: str) -> None:
        """Text at the end of the summary file, if there is one."""
        if self.summary is None or not launched().is_first:
            return
        try:
            with Path(self.summary).open("a", encoding="utf-8") as file:
                file.write("\n" + text if text and file.tell() else text)
        except OSError as error:
            reason = f"The summary file {self.summary!r} cannot be written to: {error.strerror}."
            raise DsgError(reason, "Give --summary a file in a folder that exists.") from error

    def summarise(self, chain: Sequence[Stored]) -> None:
        """A section on artifacts at the end of the summary file."""
        if self.summary is not None:
            from dsg_cli.report.summary import markdown

            self.append(markdown(chain))

    def table(self, table: Any) -> None:
        """A table beside the result, on stderr."""
        from dsg_cli.report.rendering import console

        console(sys.stderr).print(table)

    def exit_unless_met(self, chain: Sequence[Stored]) -> None:
        """Exit 3, with a table of what failed, if an expectation of any evaluation was not met."""
        from dsg_cli.report.evaluations import missed_table

        if (table := missed_table(chain)) is not None:
            self.table(table)
            raise typer.Exit(EXPECTATION_NOT_MET)


class Screen:
    """Answers, as they are written on a terminal, whole off it. One side alone stands without its name."""

    def __init__(self, out: Output, side: str) -> None:
        self.out = out
        self.is_alone = side != "both"
        self.is_live = out.is_terminal and not out.as_json
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

    def close(self, answers: Answers) -> None:
        """Every side of a prompt is there."""
        if self.is_live:
            self._show("\n")
            if "guarded" in answers.sides:
                guarded = answers.sides["guarded"]
                for name, gate in zip(answers.guardrails, guarded.gates, strict=True):
                    self._show(f"gate:    {gate_sentence(name, gate, guarded.tokens)}\n", "dim")
            self._show("\n")
        elif not self.out.as_json:
            for side, answer in answers.sides.items():
                self.out.line(answer.text if self.is_alone else f"{side}: {answer.text}")
        self.current = ""

    def _show(self, text: str, style: str | None = None) -> None:
        self.out.print(text, end="", style=style, markup=False, highlight=False, soft_wrap=True)


def gate_sentence(name: str, gate: GateTrace, tokens: list[str]) -> str:
    """Whether and where a gate opened."""
    if not gate.statistic:
        return f"{name} was not asked: the prompt was refused"
    peak = max(gate.statistic)
    if gate.latched_at is None:
        return f"{name} stayed closed ({gate.form} {peak:.2f}, threshold {gate.threshold:.2f})"
    at = f"token {gate.latched_at + 1} of {len(tokens)}, {tokens[gate.latched_at].strip()!r}"
    return f"{name} opened at {at} ({gate.form} {peak:.2f}, threshold {gate.threshold:.2f})"


@contextmanager
def _bars() -> Iterator[Report]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from dsg_cli.report.rendering import console

    texts = [TextColumn(text) for text in ("{task.description:<26}", "{task.fields[share]}", "{task.fields[rate]}")]
    columns = (texts[0], BarColumn(bar_width=14), *texts[1:], TimeElapsedColumn(), TimeRemainingColumn())
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


def next_command(stored: Stored) -> str:
    """What most people do next, in the workspace of the artifact."""
    from dsg_cli.evals import known_benches

    words = stored.body.next_command
    if words == "dsg eval":
        forget = getattr(stored.body, "forget", [])
        bench = next((name for name in forget if name in known_benches()), None)  # Named like what is forgotten.
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


def resume_command(arguments: Sequence[str]) -> str:
    """What to type to go on with an interrupted command."""
    words = [*arguments, *([] if "--resume" in arguments else ["--resume"])]
    if launched().n == 1:
        return shlex.join(["dsg", *words])
    local = os.environ.get("LOCAL_WORLD_SIZE", str(launched().n))
    return shlex.join(["torchrun", "--nproc-per-node", local, "-m", "dsg_cli", *words])


def check_new_file(path: Path, flag: str, *, force: bool = False) -> None:
    """Refuse a file that cannot be written, or that is there already, before anything is computed for it."""
    if is_taken(path) and (path.is_dir() or not force):
        raise DsgError(f"{path} is there already.", f"Name another file with {flag}, or replace it with --force.")
    if not path.parent.is_dir():
        raise DsgError(f"There is no folder {path.parent}.", f"Make it, or name another file with {flag}.")


def check_shared(command: str | None) -> None:
    """Refuse a command that several processes cannot do together."""
    if launched().n > 1 and command not in SHARED:
        raise DsgError(f"dsg {command} runs in one process.", f"Without torchrun; it is for {', '.join(SHARED[:-1])}.")


def be_quiet_unless_first() -> None:
    """Of several processes only the first writes to the terminal; errors go past this (app.py)."""
    if not launched().is_first:
        sys.stdout = sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (for the process's life)


def import_libraries() -> None:
    """Import torch and transformers without garbage collection.

    They make objects by the hundred thousand, and no garbage; those live to the end, so they are never looked through.
    """
    if "transformers" in sys.modules or not gc.isenabled():
        return
    gc.disable()
    try:
        import dsg_cli.models.language_model  # noqa: F401 (for what it imports)
    finally:
        gc.freeze()
        gc.enable()


def quiet_libraries() -> None:
    """Other people's progress bars, logs and warnings are off; ours report the same work."""
    if os.environ.get("DSG_DEBUG") == "1":
        return
    verbosities = dict.fromkeys(("HF_HUB_VERBOSITY", "TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY"), "error")
    bars = dict.fromkeys(("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"), "1")
    others = {"TOKENIZERS_PARALLELISM": "false", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
    for name, value in (verbosities | bars | others).items():
        os.environ.setdefault(name, value)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
