"""`dsg apply`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dsg_cli.cli import options as opt
from dsg_cli.cli.names import complete
from dsg_cli.cli.output import show_stored
from dsg_cli.cli.running import running

STRENGTHS = {
    "static-clamp": "methods__static_clamp__strength",
    "conditional-clamp": "methods__conditional_clamp__strength",
    "refusal-clamp": "methods__refusal_clamp__coefficient",
}
"""Methods of which `--strength` is another setting than that of `dsg`."""


def command(
    method: Annotated[
        str | None,
        typer.Option(
            "--method", help="`dsg` (default), or another: `dsg ls methods`.", autocompletion=complete("methods")
        ),
    ] = None,
    source: opt.FromThresholdOption = None,
    forget: opt.ForgetOption = None,
    retain: opt.RetainOption = None,
    train: opt.TrainOption = None,
    model: opt.ModelOption = None,
    sae: opt.SaeOption = None,
    limit: opt.DocumentsOption = None,
    strength: Annotated[
        str | None,
        typer.Option(
            "--strength",
            help="c, to whose negative features are set: 500, 16r (default, in median residual norms), or auto.",
        ),
    ] = None,
    lora: Annotated[
        bool | None, typer.Option("--lora", help="Train low-rank adapters (PEFT) instead of the weights.")
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
    resume: opt.ResumeOption = False,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """Build the guardrail, or apply any other method.

    A guardrail is tried on forget text first: one that does nothing there is refused.

    Example: dsg apply --strength 16r, or dsg apply --method npo --model lab --forget lab-hexes --retain lab-retain
    """
    from dsg_cli.methods.names import check_corpora, check_lora, section_of, teaches

    check_corpora(method or "dsg", train=train or [], others=[*(forget or []), *(retain or [])])
    own: dict[str, Any] = {STRENGTHS.get(method or "", "guardrail__strength"): strength}
    own |= {"methods__finetune__corpora": train, "methods__finetune__limit": limit if teaches(method or "") else None}
    if lora:
        check_lora(method or "dsg")
        own[f"methods__{section_of(method or '')}__lora"] = True
    resolved = opt.settings(
        recipe,
        sets,
        device=device,
        dtype=dtype,
        seed=seed,
        model__device_map=device_map,
        model__trust_remote_code=trust_remote_code,
        model__source=model,
        sae__source=sae,
        corpora__forget=forget,
        corpora__retain=retain,
        corpora__limit=limit,
        guardrail__allow_ineffective=allow_ineffective,
        **own,
    )
    with running(quiet, reuse=reuse, resume=resume) as session:
        from dsg_cli.stages import apply, export
        from dsg_cli.stages import method as methods
        from dsg_cli.workspace import Workspace

        made_in = Workspace(workspace)
        if export_to is not None:
            export.check_target(export_to)
            export.check_exportable(made_in, method or "dsg", source)
        if method is None:
            stored = apply.run(resolved, made_in, source=source, session=session)
        else:
            stored = methods.run(resolved, made_in, method, source=source, session=session)
        if export_to is not None:
            export.run(resolved, made_in, export_to, sources=[stored.id], report=session.report)
    show_stored(stored, as_json=as_json, quiet=quiet)
