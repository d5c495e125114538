"""The Typer application and `main()`, the one place where errors become text and exit codes.

Exit codes: 0 done; 1 an error the user can mend; 2 usage; 3 an expectation not met; 130 SIGINT, 143 SIGTERM.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Annotated, NoReturn

import typer
from typer import Option

from dsg_cli import __version__
from dsg_cli.cli.chain import apply_command, attack_command, calibrate_command, evaluate_command, select_command
from dsg_cli.cli.further import describe_command, export_command, lab_app
from dsg_cli.cli.look import generate_command, inspect_command, ls_command, report_command, show_command, verify_command
from dsg_cli.cli.output import be_quiet_unless_first, check_shared, quiet_libraries, resume_command
from dsg_cli.cli.runs import compare_command, demo_command, run_command, study_command
from dsg_cli.errors import NO_MEMORY, DsgError, redacted
from dsg_cli.job import launched
from dsg_cli.workspace.files import Signalled, install

WAIT_FOR_THE_FIRST = 2.0
"""Seconds after which another process than the first complains: what all find wrong is said once."""

app = typer.Typer(
    name="dsg",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)

FURTHER = "Further"

COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "The five stages": {
        "select": select_command,
        "calibrate": calibrate_command,
        "apply": apply_command,
        "eval": evaluate_command,
        "attack": attack_command,
    },
    "All at once": {"demo": demo_command, "run": run_command, "compare": compare_command, "study": study_command},
    "Look": {
        "ls": ls_command,
        "show": show_command,
        "verify": verify_command,
        "generate": generate_command,
        "inspect": inspect_command,
        "report": report_command,
    },
    FURTHER: {"describe": describe_command, "export": export_command},
}
"""Groups of commands, in the order in which help shows them."""

for panel, commands in COMMANDS.items():
    for name, function in commands.items():
        app.command(name, rich_help_panel=panel)(function)

app.add_typer(lab_app, name="lab", rich_help_panel=FURTHER)


def _version(is_set: bool) -> None:
    if is_set:
        sys.stdout.write(f"dsg {__version__}\n")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[bool, Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    verbose: Annotated[
        bool, Option("--verbose", "-v", help="Let libraries log, warn and show their progress.")
    ] = False,
) -> None:
    """Unlearning in language models with dynamic SAE guardrails.

    Start with: dsg demo
    """
    del version  # Its callback has done all.
    if not verbose:
        quiet_libraries()
    check_shared(context.invoked_subcommand)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    install()
    sys.excepthook = _show_traceback
    if isinstance(sys.stdout, io.TextIOWrapper):  # What it cannot spell, such as a file's name, is escaped.
        sys.stdout.reconfigure(errors="backslashreplace")
    be_quiet_unless_first()
    try:
        app(args=arguments, prog_name="dsg")
    except DsgError as error:
        if os.environ.get("DSG_DEBUG") == "1":
            raise
        complain(error)
        sys.exit(1)
    except Signalled as signalled:
        sys.stderr.write("stopped; nothing half-written was left\n")
        if signalled.is_kept:
            command = resume_command(sys.argv[1:] if arguments is None else arguments)
            sys.stderr.write(f"What was done is kept. Go on with: {command}\n")
        sys.exit(128 + signalled.number)
    except BrokenPipeError:
        # The reader of stdout went away; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if not launched().is_first:
            sys.stderr = sys.__stderr__  # A traceback is shown, whichever process it is in.
        if (known := in_plain_words(error)) is None:
            raise
        complain(known)
        sys.exit(1)
    sys.exit(0)


def in_plain_words(error: Exception) -> DsgError | None:
    """What happened to the machine rather than in the program: no memory, a full disk, a process that is gone."""
    text = str(error)
    if isinstance(error, MemoryError) or any(words in text for words in NO_MEMORY):
        return DsgError(
            f"There is not enough memory: {text[:200] or 'none could be had'}.",
            "Read fewer documents (corpora.limit), choose a smaller model or SAE, or --dtype bfloat16.",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DsgError(f"There is no room left on the disk of {error.filename or 'a temporary file'}.", "Make room.")
    if launched().n > 1 and "by peer" in text:
        return DsgError("Another of the processes failed or was ended.", "Its own message says why.")
    return None


def complain(error: DsgError) -> None:
    """One message on stderr; of several processes, the first to fail is heard, and torchrun ends the others."""
    text = redacted(str(error))
    if launched().is_first:
        sys.stderr.write(f"error: {text}\n")
        return
    time.sleep(WAIT_FOR_THE_FIRST)
    (sys.__stderr__ or sys.stderr).write(f"error in process {launched().rank}: {text}\n")


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As Python does it, without secrets."""
    import traceback

    sys.stderr.write(redacted("".join(traceback.format_exception(kind, error, trace))))
