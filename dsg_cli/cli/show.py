"""`dsg show`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from dsg_cli.cli import options as opt
from dsg_cli.cli.output import print_json


def command(
    artifact: Annotated[str, typer.Argument(help="Id, such as eval-001, or path of its JSON file.")],
    workspace: opt.WorkspaceOption = opt.DEFAULT_WORKSPACE,
    as_json: opt.JsonOption = False,
) -> None:
    """Show one artifact: what it found and where it came from."""
    from rich.console import Console

    from dsg_cli.report.provenance import provenance_tree
    from dsg_cli.report.tables import artifact_table
    from dsg_cli.workspace import Workspace

    stored = Workspace(workspace).read(artifact)
    if as_json:
        print_json(stored.json)
    else:
        console = Console(width=None if sys.stdout.isatty() else 80)
        console.print(artifact_table(stored))
        console.print(provenance_tree(stored))
