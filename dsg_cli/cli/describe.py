"""`dsg describe`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsg_cli.cli import options as opt
from dsg_cli.cli.names import complete
from dsg_cli.cli.output import hint, print_json, print_line
from dsg_cli.cli.running import running


def command(
    file: Annotated[Path, typer.Argument(help="File to write: JSON lines of {index, description, n, rate}.")],
    corpus: Annotated[
        list[str],
        typer.Option("--corpus", help="Text to describe features by; repeatable.", autocompletion=complete("corpora")),
    ],
    model: opt.ModelOption = None,
    sae: opt.SaeOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file, if there is one.")] = False,
    limit: opt.DocumentsOption = None,
    workspace: opt.WorkspaceOption = opt.DEFAULT_WORKSPACE,
    recipe: opt.RecipeOption = None,
    sets: opt.SetOption = None,
    device: opt.DeviceOption = None,
    dtype: opt.DtypeOption = None,
    device_map: opt.DeviceMapOption = None,
    trust_remote_code: opt.TrustOption = None,
    seed: opt.SeedOption = None,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """Describe the features of an SAE by the words on which they fire, for dsg select --describe.

    The file holds words of the corpora.

    Example: dsg describe descriptions.jsonl --corpus lab-hexes --corpus lab-retain --model lab
    """
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
        corpora__limit=limit,
    )
    with running(quiet) as session:
        from dsg_cli.stages import describe
        from dsg_cli.workspace import Workspace

        found = describe.run(resolved, Workspace(workspace), file, corpus, is_forced=force, session=session)
    if as_json:
        print_json({"file": str(file), "described": len(found)})
    else:
        print_line(str(file))
    if not quiet:
        hint(f"{len(found)} features are described. Next: dsg select --describe WORDS --descriptions {file}")
