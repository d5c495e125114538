"""`dsg lab export` and `dsg lab train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsg_cli.cli import options as opt
from dsg_cli.cli.output import print_json, print_line, progress

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
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """Train the lab's language model and SAEs from a seed (minutes on two cores)."""
    with progress(quiet) as report:
        from dsg_cli.lab.export import train_and_export

        measured = train_and_export(folder, seed=seed, report=report)
    if as_json:
        print_json(measured)
    else:
        lowest = min(measured["accuracy"].items(), key=lambda item: item[1])
        print_line(f"{folder}: lowest accuracy {lowest[1]:.3f} ({lowest[0]}), {measured['seconds']:.0f} s")
        for sae in measured["saes"]:
            print_line(f"{sae['name']}: variance explained {sae['variance_explained']}, L0 {sae['l0']}")
