"""`dsg study`."""

from __future__ import annotations

from typing import Annotated

import typer

from dsg_cli.cli import options as opt
from dsg_cli.cli.following import next_command
from dsg_cli.cli.names import complete
from dsg_cli.cli.output import hint, print_json, print_line
from dsg_cli.cli.running import running
from dsg_cli.cli.verdict import appended
from dsg_cli.errors import DsgError
from dsg_cli.studies.names import STUDIES, check_study


def command(
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
    with running(quiet, reuse=reuse, resume=resume) as session:
        from dsg_cli.stages import study
        from dsg_cli.workspace import Workspace

        stored = study.run(resolved, Workspace(workspace), name, source=source, session=session)
    from dsg_cli.artifacts import StudyReport
    from dsg_cli.report.console import console
    from dsg_cli.report.studies import study_markdown, study_table

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
    """`n_features=4,8` as `--set` takes it.

    Raises:
        DsgError: It has no values.
    """
    setting, separator, values = text.partition("=")
    if not separator or not setting.isidentifier():
        raise DsgError(f"--grid {text[:200]}: expected SETTING=VALUE,VALUE,...")
    return f"study.grids.{name}.{setting}=[{values.strip().removeprefix('[').removesuffix(']')}]"
