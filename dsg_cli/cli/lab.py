"""`dsg lab export` and `dsg lab train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dsg_cli.cli import options as opt
from dsg_cli.cli.output import print_json, print_line, progress
from dsg_cli.cli.running import import_libraries
from dsg_cli.errors import DsgError
from dsg_cli.lab import data as lab

app = typer.Typer(help="The embedded lab: write it out, or train it again.", no_args_is_help=True)


@app.command("export")
def export(
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


@app.command("train")
def train(
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
