"""The command that comes after an artifact, so that it can be typed as it stands."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from dsg_cli.cli.options import DEFAULT_WORKSPACE

if TYPE_CHECKING:
    from dsg_cli.workspace import Stored


def next_command(stored: Stored) -> str:
    """What most people do next, in the workspace of the artifact."""
    from dsg_cli.artifacts import NEXT_COMMAND

    words = NEXT_COMMAND[stored.header.kind]
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
    from dsg_cli.benches.names import known_benches

    return next((name for name in getattr(stored.body, "forget", []) if name in known_benches()), None)
