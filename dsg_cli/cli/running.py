"""How a command's options become a stage's session; and which process of several may speak."""

from __future__ import annotations

import gc
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dsg_cli.cli.output import progress
from dsg_cli.errors import DsgError
from dsg_cli.workers import launched

if TYPE_CHECKING:
    from dsg_cli.stages.session import Session

SHARED = ("select", "calibrate", "apply", "eval", "attack", "run", "demo")
"""Commands that several processes do together."""


@contextmanager
def running(quiet: bool, *, reuse: bool = False, resume: bool = False) -> Iterator[Session]:
    """A session of this process, alone or among those that `torchrun` started."""
    with progress(quiet) as report:
        import_libraries()
        from dsg_cli.stages.session import Session
        from dsg_cli.workers import joined

        with joined() as workers:
            yield Session(reuse, resume, workers, report, say=lambda text: _say(text, quiet))


def import_libraries() -> None:
    """Import torch and transformers without garbage collection: a second less, of the three that they take.

    They make objects by the hundred thousand, and no garbage. Those live to the end, so they are never looked through.
    """
    if "dsg_cli.model" in sys.modules or not gc.isenabled():
        return
    gc.disable()
    try:
        import dsg_cli.model  # noqa: F401 (for what it imports)
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
    """Refuse a command that several processes cannot do together.

    Raises:
        DsgError: There are several, and it is one.
    """
    if launched().n > 1 and command not in SHARED:
        raise DsgError(f"dsg {command} runs in one process.", f"Without torchrun; it is for {', '.join(SHARED[:-1])}.")


def resume_command(arguments: Sequence[str]) -> str:
    """What to type to go on with an interrupted command."""
    words = [*arguments, *([] if "--resume" in arguments else ["--resume"])]
    if launched().n == 1:
        return shlex.join(["dsg", *words])
    local = os.environ.get("LOCAL_WORLD_SIZE", str(launched().n))
    return shlex.join(["torchrun", "--nproc-per-node", local, "-m", "dsg_cli", *words])
