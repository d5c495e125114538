"""`dsg attack`."""

from __future__ import annotations

from typing import Annotated

import typer

from dsg_cli.cli import options as opt
from dsg_cli.cli.names import complete
from dsg_cli.cli.output import show_stored
from dsg_cli.cli.running import running
from dsg_cli.cli.verdict import exit_unless_met, summary_to


def command(
    kind: Annotated[
        list[str] | None,
        typer.Option("--kind", help="What to try, or `all`; repeatable.", autocompletion=complete("attacks")),
    ] = None,
    bench: Annotated[
        str | None,
        typer.Option(
            "--bench",
            help="Forget questions; by default the bench named like the corpus.",
            autocompletion=complete("benches"),
        ),
    ] = None,
    sources: opt.FromManyOption = None,
    expect: Annotated[
        list[str] | None,
        typer.Option("--expect", help="Condition such as 'dilution<=0.35' on what came back; exit 3 if not met."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Questions, at most.")] = None,
    workspace: opt.WorkspaceOption = opt.DEFAULT_WORKSPACE,
    recipe: opt.RecipeOption = None,
    sets: opt.SetOption = None,
    device: opt.DeviceOption = None,
    dtype: opt.DtypeOption = None,
    device_map: opt.DeviceMapOption = None,
    trust_remote_code: opt.TrustOption = None,
    seed: opt.SeedOption = None,
    instead: opt.InsteadOption = None,
    allow_mismatch: opt.MismatchOption = None,
    summary: opt.SummaryOption = None,
    reuse: opt.ReuseOption = False,
    resume: opt.ResumeOption = False,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """Try to get the knowledge back.

    Example: dsg attack --kind dilution --kind relearn --expect 'dilution<=0.35'
    """
    resolved = opt.settings(
        recipe,
        sets,
        device=device,
        dtype=dtype,
        seed=seed,
        model__device_map=device_map,
        model__trust_remote_code=trust_remote_code,
        model__instead=instead,
        model__allow_mismatch=allow_mismatch,
        attack__kinds=kind,
        attack__bench=bench,
        attack__expect=expect,
        eval__limit=limit,
    )
    from dsg_cli.attacks.names import expanded
    from dsg_cli.expect import parse_expected

    kinds = expanded(resolved.attack.kinds)
    for text in resolved.attack.expect:
        parse_expected(text, kinds)
    write_summary = summary_to(summary)
    with running(quiet, reuse=reuse, resume=resume) as session:
        from dsg_cli.stages import attack
        from dsg_cli.workspace import Workspace

        # As they were named: `all` may leave out what it has no material for.
        named = resolved.attack.kinds
        stored = attack.run(resolved, Workspace(workspace), named, sources=sources or [], session=session)
    write_summary(stored)
    show_stored(stored, as_json=as_json, quiet=quiet)
    exit_unless_met(stored)
