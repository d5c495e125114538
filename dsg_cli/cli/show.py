"""`dsg show`."""

from __future__ import annotations

from typing import Annotated

import typer

from dsg_cli.cli import options as opt
from dsg_cli.cli.output import console, print_json


def command(
    artifact: Annotated[str, typer.Argument(help="Id, such as eval-001, or path of its JSON file.")],
    workspace: opt.WorkspaceOption = opt.DEFAULT_WORKSPACE,
    as_json: opt.JsonOption = False,
) -> None:
    """Show one artifact: what it found and where it came from."""
    from dsg_cli.report.provenance import provenance_tree
    from dsg_cli.report.tables import artifact_table
    from dsg_cli.workspace import Workspace

    stored = Workspace(workspace).read(artifact)
    if as_json:
        print_json(stored.json)
    else:
        out = console()
        out.print(artifact_table(stored))
        out.print(provenance_tree(stored))
