"""Commands for what lies beyond the chain: describe, export, lab export, lab train."""

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from dsg_cli.cli import options as opt
from dsg_cli.cli.options import command, complete
from dsg_cli.cli.output import Output, in_workspace
from dsg_cli.errors import DsgError
from dsg_cli.lab import data as lab

if TYPE_CHECKING:
    from dsg_cli.settings import Recipe


@command(*opt.SOURCES, opt.LIMIT, *opt.COMPUTING)
def describe_command(
    recipe: "Recipe",
    out: Output,
    /,
    file: Annotated[Path, Argument(help="File to write: JSON lines of {index, description, n, rate}.")],
    corpus: Annotated[
        list[str],
        Option("--corpus", help="Text to describe features by; repeatable.", autocompletion=complete("corpora")),
    ],
    force: Annotated[bool, Option("--force", help="Replace the file, if there is one.")] = False,
) -> None:
    """Describe the features of an SAE by the words on which they fire, for dsg select --describe.

    The file holds words of the corpora.

    Example: dsg describe descriptions.jsonl --corpus lab-hexes --corpus lab-retain --model lab
    """
    with out.session() as session:
        from dsg_cli.stages import describe

        described = describe.run(recipe, out.store, file, corpus, is_forced=force, options=session)
    if out.as_json:
        out.json({"file": str(file), "described": len(described)})
    else:
        out.line(str(file))
    out.hint(f"{len(described)} features are described. Next: dsg select --describe WORDS --descriptions {file}")


@command(opt.RECIPE, opt.SETS, *opt.OTHER_MODEL)
def export_command(
    recipe: "Recipe",
    out: Output,
    /,
    to: Annotated[str, Argument(help="A folder, NAME.safetensors, or hf://org/name.")],
    sources: opt.FromMany = None,
    form: Annotated[
        str | None, Option(help="light (the guardrail alone) or model; by default what TO says, on a hub light.")
    ] = None,
    copy: Annotated[bool, Option("--copy", help="Copy the base's weights rather than hard-link them.")] = False,
    public: Annotated[bool, Option("--public", help="Make a new repository public.")] = False,
) -> None:
    """Hand the guardrail, or the guarded model, to others.

    The guardrail as one file, or the whole guarded model as a folder that needs no dsg.

    Folders and repositories get a model card, with the newest evaluations and attacks of this workspace.

    Example: dsg export my-guarded-model
    """
    options: dict[str, Any] = {"sources": sources or [], "form": form, "links": not copy, "is_public": public}
    with out.computing() as report:
        from dsg_cli.stages import export

        exported = export.run(recipe, out.store, to, report=report, say=out.talk, **options)
    if out.as_json:
        out.json(dataclasses.asdict(exported))
    elif out.is_terminal:
        n, n_bytes = len(exported.files), sum(file["bytes"] for file in exported.files)
        out.line(f"{exported.to}: {n} file{'s' if n > 1 else ''}, {n_bytes / 1000:,.0f} kB")
    else:
        out.line(exported.to)
    if exported.form == "model":
        out.hint(f'Load it with: AutoModelForCausalLM.from_pretrained("{exported.to}", trust_remote_code=True)')
    else:
        out.hint(f'Load it with: load_guardrail("{exported.to}")')
    if exported.to.endswith(".safetensors"):
        sourced = [word for name in sources or [] for word in ("--from", name)]
        words = [Path(exported.to).stem, "--form", "light", *sourced]
        out.hint(f"With a model card: dsg export {shlex.join(words)}{in_workspace(out.workspace)}")


lab_app = typer.Typer(help="The embedded lab: write it out, or train it again.", no_args_is_help=True)


@lab_app.command("export")
@command(without=[opt.WORKSPACE, opt.QUIET])
def lab_export(out: Output, /, folder: Annotated[Path, Argument(help="New folder to write to.")]) -> None:
    """Write the lab's model, SAEs, corpora, questions and lm-eval tasks in plain formats.

    Others can recompute every number from it without this package.
    """
    from dsg_cli.lab.export import export_lab

    export_lab(folder)
    if out.as_json:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        listed = [{"path": str(path.relative_to(folder)), "bytes": path.stat().st_size} for path in files]
        out.json({"to": str(folder), "files": listed})
    else:
        out.line(str(folder))


@lab_app.command("train")
@command(without=[opt.WORKSPACE])
def lab_train(
    out: Output,
    /,
    folder: Annotated[Path, Argument(help="New folder to write to.")] = Path("dsg-lab"),
    seed: Annotated[int, Option("--seed", help="Of the weights and the training text; the world stays.")] = 0,
    without: Annotated[
        list[str] | None,
        Option(help="Train only a model, and keep this domain from it. Repeatable.", metavar="DOMAIN"),
    ] = None,
    layers: Annotated[
        list[int] | None, Option("--layer", help="Train only an SAE, at this layer of the lab's model. Repeatable.")
    ] = None,
) -> None:
    """Train the lab's language model and SAEs from a seed (minutes on two cores).

    Example, a reference that never saw what shall be forgotten: dsg lab train DIR --without hexes --seed 1
    """
    if without and layers:
        raise DsgError("--without trains a model, --layer SAEs on the lab's own.", "Leave one of them out.")
    with out.computing() as report:
        from dsg_cli.lab.export import train_and_export, train_at_layers, train_without

        if layers:
            figures = train_at_layers(folder, layers, seed=seed, report=report)
        elif without:
            figures = train_without(folder, without, seed=seed, report=report)
        else:
            figures = train_and_export(folder, seed=seed, report=report)
    if out.as_json:
        out.json(figures)
        return
    accuracy, saes = figures.get("accuracy", {}), figures.get("saes", [])
    if "without" in figures:
        result = ", ".join(f"{bench} {accuracy[bench]:.2f}" for bench in lab.BENCHES)
    elif accuracy:
        lowest = min(accuracy, key=accuracy.__getitem__)
        result = f"lowest accuracy {accuracy[lowest]:.3f} ({lowest})"
    else:
        result = f"{len(saes)} SAEs"
    out.line(f"{folder}: {result}, {figures['seconds']:.0f} s")
    out.lines(f"{sae['name']}: variance explained {sae['variance_explained']}, L0 {sae['l0']}" for sae in saes)
