"""`dsg run`, and what it shares with `dsg demo`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsg_cli.cli import options as opt
from dsg_cli.cli.following import in_workspace
from dsg_cli.cli.names import complete
from dsg_cli.cli.output import hint, print_json, print_line
from dsg_cli.cli.running import running
from dsg_cli.cli.verdict import exit_unless_met, summary_to

if TYPE_CHECKING:
    from dsg_cli.recipe import Recipe


def command(
    recipe: Annotated[
        str, typer.Argument(help="YAML file, or the name of a shipped recipe.", autocompletion=complete("recipes"))
    ],
    workspace: opt.WorkspaceOption = opt.DEFAULT_WORKSPACE,
    sets: opt.SetOption = None,
    device: opt.DeviceOption = None,
    dtype: opt.DtypeOption = None,
    seed: opt.SeedOption = None,
    is_dry: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    summary: opt.SummaryOption = None,
    reuse: opt.ReuseOption = False,
    resume: opt.ResumeOption = False,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """Run the whole chain from a recipe.

    Example: dsg run lab --set select.n_features=20
    """
    resolved = opt.settings(recipe, sets, device=device, dtype=dtype, seed=seed)
    if is_dry:
        show_plan(resolved, as_json=as_json)
        return
    run_chain(resolved, workspace, summary=summary, reuse=reuse, resume=resume, as_json=as_json, quiet=quiet)


def show_plan(recipe: Recipe, *, as_json: bool) -> None:
    """What a run would read, compute and write, a line each."""
    from dsg_cli.stages.plan import plan

    steps = plan(recipe)
    if as_json:
        print_json([dataclasses.asdict(step) for step in steps])
    else:
        for step in steps:
            print_line(step.line())


def run_chain(
    recipe: Recipe,
    workspace: Path,
    *,
    summary: str | None,
    reuse: bool = False,
    resume: bool = False,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run, then show one table (on a terminal or off it) or one JSON document."""
    write_summary = summary_to(summary)
    with running(quiet, reuse=reuse, resume=resume) as session:
        from dsg_cli.stages import run_recipe
        from dsg_cli.workspace import Workspace

        chain = run_recipe.run(
            recipe,
            Workspace(workspace),
            session=session,
            done=lambda stored: None if quiet else hint(f"wrote {stored.id}"),
        )
    write_summary(chain)
    from dsg_cli.report.console import console
    from dsg_cli.report.demo import chain_summary, chain_table

    if as_json:
        print_json(chain_summary(chain, recipe.published))
    else:
        console().print(chain_table(chain, recipe.published))
        print_line(f"Artifacts in {workspace}: {', '.join(stored.id for stored in chain)}")
    if not quiet:
        hint(f"Next: dsg ls{in_workspace(workspace)}")
    exit_unless_met(chain)
