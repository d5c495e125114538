"""`dsg compare`."""

from __future__ import annotations

from typing import Annotated

import typer

from dsg_cli.cli import options as opt
from dsg_cli.cli.following import in_workspace, next_command
from dsg_cli.cli.names import complete
from dsg_cli.cli.output import hint, print_json, print_line
from dsg_cli.cli.running import running
from dsg_cli.cli.verdict import appended


def command(
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
    with running(quiet, reuse=reuse, resume=resume) as session:
        from dsg_cli.stages import compare
        from dsg_cli.workspace import Workspace

        stored = compare.run(resolved, Workspace(workspace), sources=sources or [], session=session)
    from dsg_cli.artifacts import Comparison
    from dsg_cli.report.comparison import comparison_markdown, comparison_table
    from dsg_cli.report.console import console

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
