"""`dsg ls`."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

import typer

from dsg_cli.cli import options as opt
from dsg_cli.cli.names import NAMES, complete_kind, ids_of
from dsg_cli.cli.output import hint, print_json, print_names
from dsg_cli.errors import DsgError, nearest


def command(
    what: Annotated[
        str | None,
        typer.Argument(
            help=f"{', '.join(NAMES)}, saes/RELEASE; by default the artifacts.", autocompletion=complete_kind
        ),
    ] = None,
    workspace: opt.WorkspaceOption = opt.DEFAULT_WORKSPACE,
    as_json: opt.JsonOption = False,
) -> None:
    """List artifacts, or the names that options take."""
    if what is not None:
        if what not in NAMES and what.partition("/")[0] != "saes":
            raise DsgError(f"dsg ls knows no {what}.", nearest(what, NAMES))
        if what == "corpora" and not as_json and sys.stdout.isatty():
            from dsg_cli.report.console import console
            from dsg_cli.report.tables import corpora_table

            console().print(corpora_table())
            return
        print_names(NAMES[what]() if what in NAMES else ids_of(what.removeprefix("saes/")), as_json=as_json)
        return
    from dsg_cli.workspace import Workspace

    found = Workspace(workspace)
    if as_json:
        print_json([found.read(artifact_id).json for artifact_id in found.ids()])
    elif sys.stdout.isatty() and found.ids():
        from dsg_cli.report.console import console
        from dsg_cli.report.tables import list_table

        console().print(list_table(found))
    else:
        print_names(found.ids(), as_json=False)
    if not found.ids():
        what = "is empty" if workspace.is_dir() else "does not exist yet"
        hint(f"{workspace} {what}. Fill it with: dsg demo -w {shlex.quote(str(workspace))}")
