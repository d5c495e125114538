"""`dsg inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsg_cli.cli import options as opt
from dsg_cli.cli.names import complete, complete_artifact
from dsg_cli.cli.output import check_new_file, show_stored
from dsg_cli.cli.prompted import check_modes, show_prompts
from dsg_cli.cli.running import running
from dsg_cli.cli.serving import serve
from dsg_cli.errors import DsgError
from dsg_cli.integrity import write_atomically


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
        list[str] | None, typer.Option("--prompt", help="Only show what they see of a prompt; repeatable.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts in the tokenizer's chat template.")] = False,
    features: Annotated[
        list[int] | None, typer.Option("--feature", help="These features, any of the SAE; repeatable.")
    ] = None,
    is_live: Annotated[
        bool, typer.Option("--serve", help="Show prompts live, on a page that only this machine can open.")
    ] = False,
    port: Annotated[int, typer.Option("--port", help="Of that page; 0 takes any.", min=0, max=65535)] = 8731,
    near: Annotated[
        list[str] | None,
        typer.Option(
            "--near", help="Corpus near to what is forgotten; repeatable.", autocompletion=complete("corpora")
        ),
    ] = None,
    n_contexts: Annotated[int, typer.Option("--contexts", help="Contexts of each feature in each corpus.")] = 3,
    samples: Annotated[bool, typer.Option("--samples", help="Keep the text of contexts.")] = False,
    neuronpedia: Annotated[
        bool, typer.Option("--neuronpedia", help="Ask neuronpedia.org what features are said to be.")
    ] = False,
    page: Annotated[Path | None, typer.Option("--html", help="Write the same to an HTML file, with text.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace that file.")] = False,
    limit: opt.DocumentsOption = None,
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
    reuse: opt.ReuseOption = False,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """What are the chosen features about? With --prompt: what do they and the gate see of it, token by token?

    Example: dsg inspect guardrail-001 --near lab-near, or dsg inspect --prompt "What is the counter of the grim hex"
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
    of_inspection = {"--near": near, "--samples": samples, "--neuronpedia": neuronpedia, "--html": page}
    check_modes({"--serve": is_live, "--prompt": prompts}, {**of_inspection, "--limit": limit, "--reuse": reuse})
    if is_live:
        serve(resolved, workspace, artifact, port=port, quiet=quiet)
        return
    if prompts:
        show_prompts(resolved, workspace, prompts, artifact, features or [], chat=chat, as_json=as_json, quiet=quiet)
        return
    if page is not None:
        check_new_file(page, "--html", force=force)
    if chat:
        raise DsgError("--chat says how to put --prompt.", "Give a prompt, or leave it out.")
    with running(quiet, reuse=reuse) as session:
        from dsg_cli.stages import inspect
        from dsg_cli.workspace import Workspace

        wanted = inspect.Wanted(near or [], features or [], n_contexts, samples, neuronpedia, limit)
        shown = inspect.run(resolved, Workspace(workspace), source=artifact, wanted=wanted, session=session)
        from dsg_cli.report.inspections import inspection_view

        view = inspection_view(shown.stored, shown.rows)
        if page is not None:
            from dsg_cli.report.features import inspection_page

            write_atomically(page, inspection_page(shown.stored, shown.rows).encode())
    show_stored(shown.stored, as_json=as_json, quiet=quiet, view=view)
