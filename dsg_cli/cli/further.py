"""`dsg export`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsg_cli.cli import options as opt
from dsg_cli.cli.following import in_workspace
from dsg_cli.cli.output import hint, print_json, print_line, progress
from dsg_cli.cli.running import import_libraries

if TYPE_CHECKING:
    from dsg_cli.stages.export import Exported


def command(
    to: Annotated[str, typer.Argument(help="A folder, NAME.safetensors, or hf://org/name.")],
    sources: opt.FromManyOption = None,
    form: Annotated[
        str | None,
        typer.Option("--form", help="light (the guardrail alone) or model; by default what TO says, on a hub light."),
    ] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy the base's weights rather than hard-link them.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    workspace: opt.WorkspaceOption = opt.DEFAULT_WORKSPACE,
    recipe: opt.RecipeOption = None,
    sets: opt.SetOption = None,
    instead: opt.InsteadOption = None,
    allow_mismatch: opt.MismatchOption = None,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """Hand the guardrail, or the guarded model, to others.

    The guardrail as one file, or the whole guarded model as a folder that needs no dsg.

    Folders and repositories get a model card, with the newest evaluations and attacks of this workspace.

    Example: dsg export my-guarded-model
    """
    resolved = opt.settings(
        recipe, sets, device=None, dtype=None, seed=None, model__instead=instead, model__allow_mismatch=allow_mismatch
    )
    with progress(quiet) as report:
        import_libraries()
        from dsg_cli.stages import export
        from dsg_cli.workspace import Workspace

        exported = export.run(
            resolved,
            Workspace(workspace),
            to,
            sources=sources or [],
            form=form,
            links=not copy,
            is_public=public,
            report=report,
        )
    _show(exported, sources or [], workspace, as_json=as_json, quiet=quiet)


def _show(exported: Exported, sources: Sequence[str], workspace: Path, *, as_json: bool, quiet: bool) -> None:
    """Where it lies, and how to load it."""
    if as_json:
        print_json(exported.as_json())
    elif sys.stdout.isatty():
        n_bytes = sum(file["bytes"] for file in exported.files)
        n = len(exported.files)
        print_line(f"{exported.to}: {n} file{'s' if n > 1 else ''}, {n_bytes / 1000:,.0f} kB")
    else:
        print_line(exported.to)
    if not quiet:
        load = f'load_guardrail("{exported.to}")'
        if exported.form == "model":
            load = f'AutoModelForCausalLM.from_pretrained("{exported.to}", trust_remote_code=True)'
        hint(f"Load it with: {load}")
        if exported.to.endswith(".safetensors"):
            again = [
                Path(exported.to).stem,
                "--form",
                "light",
                *(word for name in sources for word in ("--from", name)),
            ]
            hint(f"With a model card: dsg export {shlex.join(again)}{in_workspace(workspace)}")
