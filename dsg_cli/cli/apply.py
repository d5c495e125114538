"""`dsg apply`."""

from __future__ import annotations

from typing import Annotated

import typer

from dsg_cli.cli import options as opt
from dsg_cli.cli.output import progress, show_stored


def command(
    source: opt.FromOption = None,
    strength: Annotated[
        str | None,
        typer.Option("--strength", help="c, to whose negative features are set: 500, or 2r (median residual norms)."),
    ] = None,
    workspace: opt.WorkspaceOption = opt.DEFAULT_WORKSPACE,
    recipe: opt.RecipeOption = None,
    sets: opt.SetOption = None,
    reuse: opt.ReuseOption = False,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """Build the guardrail: the selected rows of the SAE, the threshold and the clamp in one small file.

    Example: dsg apply --strength 2r
    """
    resolved = opt.settings(recipe, sets, device=None, dtype=None, seed=None, guardrail__strength=strength)
    with progress(quiet) as report:
        from dsg_cli.stages import apply
        from dsg_cli.workspace import Workspace

        stored = apply.run(resolved, Workspace(workspace), source=source, reuse=reuse, report=report)
    show_stored(stored, as_json=as_json, quiet=quiet)
