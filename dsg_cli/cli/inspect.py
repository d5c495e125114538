"""`dsg inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from dsg_cli.cli import options as opt
from dsg_cli.cli.names import complete_artifact
from dsg_cli.cli.output import print_json, progress
from dsg_cli.cli.serving import serve


def command(
    artifact: Annotated[
        str | None,
        typer.Argument(
            metavar="[ARTIFACT]",
            help="Guardrail or features; by default the newest guardrail, else the newest features.",
            autocompletion=complete_artifact(("guardrail", "features")),
        ),
    ] = None,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", help="Show what the gate sees of a prompt; repeatable.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts in the tokenizer's chat template.")] = False,
    features: Annotated[
        list[int] | None, typer.Option("--feature", help="Only these features, any of the SAE; repeatable.")
    ] = None,
    is_live: Annotated[
        bool, typer.Option("--serve", help="Show prompts live, on a page that only this machine can open.")
    ] = False,
    port: Annotated[int, typer.Option("--port", help="Of that page; 0 takes any.", min=0, max=65535)] = 8731,
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
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """What are the chosen features about? With --prompt: what do they and the gate see of it, token by token?

    Example: dsg inspect guardrail-001 --prompt "What is the counter of the grim hex"
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
    )
    if is_live:
        serve(resolved, workspace, artifact, port=port, quiet=quiet)
        return
    with progress(quiet):
        from dsg_cli.stages import trace
        from dsg_cli.workspace import Workspace

        made_in = Workspace(workspace)
        seen = list(trace.run(resolved, made_in, prompts or [], source=artifact, features=features or [], chat=chat))
    if as_json:
        print_json([one.as_json() for one in seen])
    else:
        from dsg_cli.report.console import console
        from dsg_cli.report.traces import trace_view

        for one in seen:
            console().print(trace_view(one))
