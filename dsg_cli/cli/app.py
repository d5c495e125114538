"""The Typer application and `main()`, the one place where errors become text and exit codes.

Exit codes: 0 done; 1 an error the user can mend; 2 usage; 3 an expectation not met; 130 SIGINT, 143 SIGTERM.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, NoReturn

import typer

from dsg_cli import __version__
from dsg_cli.cli import apply, attack, calibrate, demo, evaluate, export, generate, lab, ls, run, select, show
from dsg_cli.errors import DsgError
from dsg_cli.interruption import Signalled, install

app = typer.Typer(
    name="dsg",
    help="Unlearning in language models with dynamic SAE guardrails.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("select")(select.command)
app.command("calibrate")(calibrate.command)
app.command("apply")(apply.command)
app.command("eval")(evaluate.command)
app.command("attack")(attack.command)
app.command("export")(export.command)
app.command("generate")(generate.command)
app.command("demo")(demo.command)
app.command("run")(run.command)
app.command("ls")(ls.command)
app.command("show")(show.command)
app.add_typer(lab.app, name="lab")


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"dsg {__version__}\n")
        raise typer.Exit


def _verbose(wanted: bool) -> None:
    if not wanted:
        quiet_libraries()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", callback=_verbose, help="Let libraries log, warn and show their progress."),
    ] = False,
) -> None:
    """Unlearning in language models with dynamic SAE guardrails.

    Find the SAE features that carry the knowledge (select), set when the gate fires (calibrate), build the guardrail
    (apply), measure what it does (eval) and how it breaks (attack). Start with: dsg demo
    """


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    install()
    try:
        app(args=arguments, prog_name="dsg")
    except DsgError as error:
        if os.environ.get("DSG_DEBUG") == "1":
            raise
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    except Signalled as signalled:
        sys.stderr.write("stopped; nothing half-written was left\n")
        sys.exit(128 + signalled.number)
    except BrokenPipeError:
        # The reader of stdout went away; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(0)


def quiet_libraries() -> None:
    """Other people's progress bars, logs and warnings are off; ours report the same work."""
    if os.environ.get("DSG_DEBUG") == "1":
        return
    for name, value in (
        ("TQDM_DISABLE", "1"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("HF_HUB_VERBOSITY", "error"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("HF_DATASETS_DISABLE_PROGRESS_BARS", "1"),
        ("DATASETS_VERBOSITY", "error"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("TORCH_CPP_LOG_LEVEL", "ERROR"),
        ("PYTHONWARNINGS", "ignore"),
    ):
        os.environ.setdefault(name, value)
    import logging
    import warnings

    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
