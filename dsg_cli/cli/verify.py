"""`dsg verify`."""

from __future__ import annotations

import dataclasses

import typer

from dsg_cli.cli import options as opt
from dsg_cli.cli.output import print_json


def command(
    workspace: opt.WorkspaceOption = opt.DEFAULT_WORKSPACE,
    as_json: opt.JsonOption = False,
) -> None:
    """Verify every file of a workspace.

    Each is held against its digest, and every artifact against what it was computed from.

    Exits with 1 if anything is broken.
    """
    from dsg_cli.report.console import console
    from dsg_cli.report.tables import verify_table
    from dsg_cli.stages import verify
    from dsg_cli.workspace import Workspace

    findings = verify.run(Workspace(workspace))
    if as_json:
        print_json([dataclasses.asdict(finding) for finding in findings])
    else:
        console().print(verify_table(findings))
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(1)
