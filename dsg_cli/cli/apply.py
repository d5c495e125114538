"""`dsg apply`."""

from __future__ import annotations

from typing import Annotated

import typer

from dsg_cli.cli import options as opt
from dsg_cli.cli.output import show_stored
from dsg_cli.cli.running import running


def command(
    source: opt.FromThresholdOption = None,
    strength: Annotated[
        str | None,
        typer.Option(
            "--strength",
            help="c, to whose negative features are set: 500, 16r (default, in median residual norms), or auto.",
        ),
    ] = None,
    export_to: Annotated[
        str | None, typer.Option("--export", help="Also write the guarded model here, as dsg export does.")
    ] = None,
    allow_ineffective: opt.IneffectiveOption = None,
    workspace: opt.WorkspaceOption = opt.DEFAULT_WORKSPACE,
    recipe: opt.RecipeOption = None,
    sets: opt.SetOption = None,
    device: opt.DeviceOption = None,
    dtype: opt.DtypeOption = None,
    device_map: opt.DeviceMapOption = None,
    trust_remote_code: opt.TrustOption = None,
    seed: opt.SeedOption = None,
    reuse: opt.ReuseOption = False,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """Build the guardrail: the selected rows of the SAE, the threshold and the clamp in one small file.

    It is tried on forget text first: one that does nothing there is refused.

    Example: dsg apply --strength 16r
    """
    resolved = opt.settings(
        recipe,
        sets,
        device=device,
        dtype=dtype,
        seed=seed,
        model__device_map=device_map,
        model__trust_remote_code=trust_remote_code,
        guardrail__strength=strength,
        guardrail__allow_ineffective=allow_ineffective,
    )
    with running(quiet, reuse=reuse) as session:
        from dsg_cli.stages import apply, export
        from dsg_cli.workspace import Workspace

        made_in = Workspace(workspace)
        if export_to is not None:
            export.check_target(export_to)
            export.check_threshold(made_in, source)
        stored = apply.run(resolved, made_in, source=source, session=session)
        if export_to is not None:
            export.run(resolved, made_in, export_to, sources=[stored.id], report=session.report)
    show_stored(stored, as_json=as_json, quiet=quiet)
