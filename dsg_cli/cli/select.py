"""`dsg select`."""

from __future__ import annotations

from typing import Annotated

import typer

from dsg_cli.cli import options as opt
from dsg_cli.cli.output import show_stored
from dsg_cli.cli.running import running


def command(
    forget: opt.ForgetOption = None,
    retain: opt.RetainOption = None,
    model: opt.ModelOption = None,
    sae: opt.SaeOption = None,
    n_features: Annotated[int | None, typer.Option("-n", "--n-features", help="Features to select.")] = None,
    ratio_percentile: Annotated[
        float | None, typer.Option("--ratio-percentile", help="Importance ratio a feature must reach.")
    ] = None,
    score: Annotated[str | None, typer.Option("--score", help="mean-square or squared-mean.")] = None,
    limit: opt.DocumentsOption = None,
    workspace: opt.WorkspaceOption = opt.DEFAULT_WORKSPACE,
    recipe: opt.RecipeOption = None,
    sets: opt.SetOption = None,
    device: opt.DeviceOption = None,
    dtype: opt.DtypeOption = None,
    device_map: opt.DeviceMapOption = None,
    trust_remote_code: opt.TrustOption = None,
    seed: opt.SeedOption = None,
    reuse: opt.ReuseOption = False,
    resume: opt.ResumeOption = False,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """Find the SAE features that carry the knowledge to be forgotten.

    Example: dsg select --forget wmdp-bio --retain wikitext
    """
    resolved = opt.settings(
        recipe,
        sets,
        device=device,
        dtype=dtype,
        seed=seed,
        model__device_map=device_map,
        model__trust_remote_code=trust_remote_code,
        corpora__forget=forget,
        corpora__retain=retain,
        corpora__limit=limit,
        model__source=model,
        sae__source=sae,
        select__n_features=n_features,
        select__ratio_percentile=ratio_percentile,
        select__score=score,
    )
    with running(quiet, reuse=reuse, resume=resume) as session:
        from dsg_cli.stages import select
        from dsg_cli.workspace import Workspace

        stored = select.run(resolved, Workspace(workspace), session=session)
    show_stored(stored, as_json=as_json, quiet=quiet)
