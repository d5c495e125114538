"""`dsg describe`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsg_cli.cli import options as opt
from dsg_cli.cli.options import complete
from dsg_cli.cli.output import hint, import_libraries, in_workspace, print_json, print_line, progress, running
from dsg_cli.errors import DsgError
from dsg_cli.lab import data as lab

if TYPE_CHECKING:
    from dsg_cli.stages.export import Exported


def describe_command(
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
    with running(quiet) as options:
        from dsg_cli.stages import describe
        from dsg_cli.workspace.store import Workspace

        found = describe.run(resolved, Workspace(workspace), file, corpus, is_forced=force, options=options)
    if as_json:
        print_json({"file": str(file), "described": len(found)})
    else:
        print_line(str(file))
    if not quiet:
        hint(f"{len(found)} features are described. Next: dsg select --describe WORDS --descriptions {file}")


def export_command(
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
        from dsg_cli.workspace.store import Workspace

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


lab_app = typer.Typer(help="The embedded lab: write it out, or train it again.", no_args_is_help=True)


@lab_app.command("export")
def lab_export(
    folder: Annotated[Path, typer.Argument(help="New folder to write to.")],
    as_json: opt.JsonOption = False,
) -> None:
    """Write the lab's model, SAEs, corpora, questions and lm-eval tasks in plain formats.

    Others can recompute every number from it without this package.
    """
    from dsg_cli.lab.export import export_lab

    export_lab(folder)
    if as_json:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        listed = [{"path": str(path.relative_to(folder)), "bytes": path.stat().st_size} for path in files]
        print_json({"to": str(folder), "files": listed})
    else:
        print_line(str(folder))


@lab_app.command("train")
def lab_train(
    folder: Annotated[Path, typer.Argument(help="New folder to write to.")] = Path("dsg-lab"),
    seed: Annotated[int, typer.Option("--seed", help="Of the weights and the training text; the world stays.")] = 0,
    without: Annotated[
        list[str] | None,
        typer.Option(
            "--without", help="Train only a model, and keep this domain from it. Repeatable.", metavar="DOMAIN"
        ),
    ] = None,
    layers: Annotated[
        list[int] | None,
        typer.Option("--layer", help="Train only an SAE, at this layer of the lab's model. Repeatable."),
    ] = None,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """Train the lab's language model and SAEs from a seed (minutes on two cores).

    Example, a reference that never saw what shall be forgotten: dsg lab train DIR --without hexes --seed 1
    """
    if without and layers:
        raise DsgError("--without trains a model, --layer SAEs on the lab's own.", "Leave one of them out.")
    with progress(quiet) as report:
        import_libraries()
        from dsg_cli.lab.export import train_and_export, train_at_layers, train_without

        if layers:
            measured = train_at_layers(folder, layers, seed=seed, report=report)
        elif without:
            measured = train_without(folder, without, seed=seed, report=report)
        else:
            measured = train_and_export(folder, seed=seed, report=report)
    if as_json:
        print_json(measured)
    else:
        _say(folder, measured)


def _say(folder: Path, measured: dict[str, Any]) -> None:
    accuracy = measured.get("accuracy", {})
    if "without" in measured:
        said = ", ".join(f"{bench} {accuracy[bench]:.2f}" for bench in lab.BENCHES)
    elif accuracy:
        lowest = min(accuracy.items(), key=lambda item: item[1])
        said = f"lowest accuracy {lowest[1]:.3f} ({lowest[0]})"
    else:
        said = f"{len(measured['saes'])} SAEs"
    print_line(f"{folder}: {said}, {measured['seconds']:.0f} s")
    for sae in measured.get("saes", []):
        print_line(f"{sae['name']}: variance explained {sae['variance_explained']}, L0 {sae['l0']}")
