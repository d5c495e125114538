"""`dsg run`, and what it shares with `dsg demo`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsg_cli.cli import options as opt
from dsg_cli.cli.options import complete
from dsg_cli.cli.output import (
    appended,
    exit_unless_met,
    hint,
    in_workspace,
    next_command,
    print_json,
    print_line,
    running,
    summary_to,
)
from dsg_cli.errors import DsgError
from dsg_cli.studies import STUDIES, check_study

if TYPE_CHECKING:
    from dsg_cli.settings import Recipe


def run_command(
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
    from dsg_cli.stages.run import plan

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
    with running(quiet, reuse=reuse, resume=resume) as options:
        from dsg_cli.stages import run as run_recipe
        from dsg_cli.workspace.store import Workspace

        chain = run_recipe.run(
            recipe,
            Workspace(workspace),
            options=options,
            done=lambda stored: None if quiet else hint(f"wrote {stored.id}"),
        )
    write_summary(chain)
    from dsg_cli.report.rendering import console
    from dsg_cli.report.summary import chain_summary, chain_table

    if as_json:
        print_json(chain_summary(chain, recipe.published))
    else:
        console().print(chain_table(chain, recipe.published))
        print_line(f"Artifacts in {workspace}: {', '.join(stored.id for stored in chain)}")
    if not quiet:
        hint(f"Next: dsg ls{in_workspace(workspace)}")
    exit_unless_met(chain)


DEMO_WORKSPACE = Path("dsg-demo")
"""Apart from other work: the demo's guardrail has the paper's gate, which cannot guard text while it is written."""


def demo_command(
    workspace: opt.WorkspaceOption = DEMO_WORKSPACE,
    summary: opt.SummaryOption = None,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """Make the embedded lab forget a domain, and attack the result.

    Needs no download.

    The same as: dsg run lab
    """
    from dsg_cli.recipe import RECIPES

    resolved = opt.settings(str(RECIPES / "lab.yaml"), None, device=None, dtype=None, seed=None)
    run_chain(resolved, workspace, summary=summary, reuse=False, as_json=as_json, quiet=quiet)


def compare_command(
    methods: Annotated[
        list[str] | None,
        typer.Option("--method", help="`dsg ls methods`; all by default.", autocompletion=complete("methods")),
    ] = None,
    sources: Annotated[
        list[str] | None,
        typer.Option("--from", help="Collect artifacts instead: guardrail-001, or model-001+guardrail-002."),
    ] = None,
    budget: Annotated[int | None, typer.Option("--budget", help="Trials of each method on dev questions.")] = None,
    forget: opt.ForgetOption = None,
    retain: opt.RetainOption = None,
    model: opt.ModelOption = None,
    sae: opt.SaeOption = None,
    forget_bench: Annotated[
        str | None, typer.Option("--bench", help="Forget questions; by default named like the corpus.")
    ] = None,
    near: Annotated[list[str] | None, typer.Option("--near", help="Bench near them, which must be kept.")] = None,
    other: Annotated[list[str] | None, typer.Option("--other", help="Further bench, such as mmlu.")] = None,
    workspace: opt.WorkspaceOption = opt.DEFAULT_WORKSPACE,
    recipe: opt.RecipeOption = None,
    sets: opt.SetOption = None,
    device: opt.DeviceOption = None,
    dtype: opt.DtypeOption = None,
    trust_remote_code: opt.TrustOption = None,
    seed: opt.SeedOption = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    summary: opt.SummaryOption = None,
    reuse: opt.ReuseOption = False,
    resume: opt.ResumeOption = False,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """Compare methods: the same text, questions and search for each.

    Example: dsg compare --recipe lab-compare --method dsg --method npo --budget 2
    """
    resolved = opt.settings(
        recipe,
        sets,
        device=device,
        dtype=dtype,
        seed=seed,
        model__trust_remote_code=trust_remote_code,
        model__source=model,
        sae__source=sae,
        corpora__forget=forget,
        corpora__retain=retain,
        compare__methods=methods,
        compare__budget=budget,
        compare__forget=forget_bench,
        compare__near=near,
        compare__other=other,
    )
    append = appended(summary)
    with running(quiet, reuse=reuse, resume=resume) as options:
        from dsg_cli.stages import compare
        from dsg_cli.workspace.store import Workspace

        stored = compare.run(resolved, Workspace(workspace), sources=sources or [], options=options)
    from dsg_cli.report.comparison import comparison_markdown, comparison_table
    from dsg_cli.report.rendering import console
    from dsg_cli.workspace.results import Comparison

    body = stored.body_as(Comparison)
    append(f"## dsg: {stored.id}\n\n{comparison_markdown(body)}\n")
    if as_json:
        print_json(stored.json)
    elif as_markdown:
        print_line(comparison_markdown(body))
    else:
        console().print(comparison_table(body))
        print_line(f"The comparison is {stored.id} in {workspace}.")
    if not quiet:
        hint(f"Every trial: dsg show {stored.id} --json{in_workspace(workspace)}")
        hint(f"Next: {next_command(stored)}")


def study_command(
    name: Annotated[str, typer.Argument(help=", ".join(STUDIES), autocompletion=complete("studies"))],
    grid: Annotated[
        list[str] | None, typer.Option("--grid", help="SETTING=VALUE,VALUE,...: what is varied; repeatable.")
    ] = None,
    source: opt.FromFeaturesOption = None,
    split: Annotated[str | None, typer.Option("--split", help="dev to choose by, test to report.")] = None,
    forget: opt.ForgetOption = None,
    retain: opt.RetainOption = None,
    model: opt.ModelOption = None,
    sae: opt.SaeOption = None,
    forget_bench: Annotated[
        str | None, typer.Option("--bench", help="Forget questions; by default named like the corpus.")
    ] = None,
    other: Annotated[
        list[str] | None, typer.Option("--other", help="Bench that must stay answered; by default those of eval.")
    ] = None,
    workspace: opt.WorkspaceOption = opt.DEFAULT_WORKSPACE,
    recipe: opt.RecipeOption = None,
    sets: opt.SetOption = None,
    device: opt.DeviceOption = None,
    dtype: opt.DtypeOption = None,
    trust_remote_code: opt.TrustOption = None,
    seed: opt.SeedOption = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    summary: opt.SummaryOption = None,
    reuse: opt.ReuseOption = False,
    resume: opt.ResumeOption = False,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """Vary settings over a grid, and write the table.

    Example: dsg study stability --recipe lab --grid n_features=4,8,16 --grid strength=4r,16r
    """
    check_study(name)
    resolved = opt.settings(
        recipe,
        [*(sets or []), *(_grid_setting(name, text) for text in grid or [])],
        device=device,
        dtype=dtype,
        seed=seed,
        model__trust_remote_code=trust_remote_code,
        model__source=model,
        sae__source=sae,
        corpora__forget=forget,
        corpora__retain=retain,
        study__split=split,
        study__forget=forget_bench,
        study__benches=other,
    )
    append = appended(summary)
    with running(quiet, reuse=reuse, resume=resume) as options:
        from dsg_cli.stages import study
        from dsg_cli.workspace.store import Workspace

        stored = study.run(resolved, Workspace(workspace), name, source=source, options=options)
    from dsg_cli.report.rendering import console
    from dsg_cli.report.studies import study_markdown, study_table
    from dsg_cli.workspace.results import StudyReport

    body = stored.body_as(StudyReport)
    append(f"## dsg: {stored.id}\n\n{study_markdown(body)}\n")
    if as_json:
        print_json(stored.json)
    elif as_markdown:
        print_line(study_markdown(body))
    else:
        console().print(study_table(body))
        print_line(f"{stored.id} in {workspace}: {body.computed['n_points']} points in {stored.header.seconds:.1f} s")
    if not quiet:
        hint(f"Every row: {stored.path.with_suffix('.csv')}")
        hint(f"Next: {next_command(stored)}")


def _grid_setting(name: str, text: str) -> str:
    """`n_features=4,8` as `--set` takes it."""
    setting, separator, values = text.partition("=")
    if not separator or not setting.isidentifier():
        raise DsgError(f"--grid {text[:200]}: expected SETTING=VALUE,VALUE,...")
    return f"study.grids.{name}.{setting}=[{values.strip().removeprefix('[').removesuffix(']')}]"
