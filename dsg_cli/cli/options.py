"""Options that several commands share, and the settings they make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from dsg_cli.attacks import ALL, ATTACKS
from dsg_cli.data.catalogue import CATALOGUE
from dsg_cli.errors import DsgError, nearest
from dsg_cli.evals import known_benches
from dsg_cli.guardrail.runtime.spec import CalibratedGate
from dsg_cli.lab import data as lab
from dsg_cli.methods import METHODS
from dsg_cli.studies import STUDIES

if TYPE_CHECKING:
    from dsg_cli.settings import Recipe


def _recipes() -> list[str]:
    from dsg_cli.recipe import recipe_names

    return recipe_names()


def _saes() -> list[str]:
    from dsg_cli.models.releases import releases

    return [*lab.SAE_DIRS, *sorted(releases())]


def ids_of(release: str) -> list[str]:
    """SAEs of a release, as `--sae` takes them."""
    from dsg_cli.models.releases import releases

    if release not in releases():
        raise DsgError(f"There is no SAE release {release}.", nearest(release, releases()))
    return [f"{release}/{one['id']}" for one in releases()[release]["saes"]]


NAMES: dict[str, Callable[[], list[str]]] = {
    "corpora": lambda: [*lab.CORPORA, *CATALOGUE],
    "benches": known_benches,
    "models": lambda: list(lab.MODEL_DIRS),
    "saes": _saes,
    "gates": lambda: list(get_args(CalibratedGate)),
    "attacks": lambda: [*ATTACKS, ALL],
    "methods": lambda: list(METHODS),
    "studies": lambda: list(STUDIES),
    "recipes": _recipes,
}


def complete(what: str) -> Callable[[str], list[str]]:
    """For Typer's `autocompletion`: the names of NAMES[what] that begin as the word does."""

    def names(incomplete: str) -> list[str]:
        return [name for name in NAMES[what]() if name.startswith(incomplete)]

    return names


def complete_kind(incomplete: str) -> list[str]:
    """What `dsg ls` takes."""
    return [name for name in NAMES if name.startswith(incomplete)]


def complete_artifact(kinds: Sequence[str | None] = (None,)) -> Callable[[typer.Context, str], list[str]]:
    """For Typer's `autocompletion`: ids in the workspace that the command line names."""

    def ids(context: typer.Context, incomplete: str) -> list[str]:
        from dsg_cli.workspace.store import Workspace

        found = Workspace(context.params.get("workspace") or DEFAULT_WORKSPACE)
        ids_of_kinds = [artifact_id for kind in kinds for artifact_id in found.ids(kind)]
        return [artifact_id for artifact_id in ids_of_kinds if artifact_id.startswith(incomplete)]

    return ids


WorkspaceOption = Annotated[
    Path, typer.Option("--workspace", "-w", envvar="DSG_WORKSPACE", help="Folder of artifacts.", show_default=True)
]

RecipeOption = Annotated[
    str | None,
    typer.Option("--recipe", help="YAML file, or the name of a shipped recipe.", autocompletion=complete("recipes")),
]

SetOption = Annotated[list[str] | None, typer.Option("--set", help="section.key=value, for any setting; repeatable.")]

DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...; a GPU if there is one.")]

DtypeOption = Annotated[str | None, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]

DeviceMapOption = Annotated[
    str | None, typer.Option("--device-map", help="auto: spread a model over all GPUs, if it is larger than one.")
]

TrustOption = Annotated[
    bool | None, typer.Option("--trust-remote-code", help="Run Python files that come with the model. Read them first.")
]

SeedOption = Annotated[int | None, typer.Option("--seed", help="Seed of everything that is drawn.")]

ForgetOption = Annotated[
    list[str] | None,
    typer.Option("--forget", help="Corpus to forget (`dsg ls corpora`).", autocompletion=complete("corpora")),
]

RetainOption = Annotated[
    list[str] | None,
    typer.Option("--retain", help="Corpus to retain; NAME=WEIGHT mixes.", autocompletion=complete("corpora")),
]

TrainOption = Annotated[
    list[str] | None,
    typer.Option("--train", help="For finetune: corpus to train on.", autocompletion=complete("corpora")),
]

ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Hub name, folder, `lab`, or model-NNN.", autocompletion=complete("models")),
]

SaeOption = Annotated[str | None, typer.Option("--sae", help="RELEASE/ID, folder or `lab`.")]

DocumentsOption = Annotated[int | None, typer.Option("--limit", help="Documents of each corpus, at most.")]

FEATURES = complete_artifact(("features",))

BEFORE_APPLY = complete_artifact(("threshold", "features", "model"))

FROM_HELP = "Artifact to start from; the newest by default."

FromFeaturesOption = Annotated[str | None, typer.Option("--from", help=FROM_HELP, autocompletion=FEATURES)]

FromThresholdOption = Annotated[str | None, typer.Option("--from", help=FROM_HELP, autocompletion=BEFORE_APPLY)]

FromManyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--from",
        help="Guardrail, model or wrapper, the newest by default; repeatable, they act together.",
        autocompletion=complete_artifact(("guardrail", "model", "wrapper")),
    ),
]

InsteadOption = Annotated[
    str | None, typer.Option("--model", help="Model to put it on; by default where the guardrail's model was.")
]

MismatchOption = Annotated[
    bool | None,
    typer.Option("--allow-mismatch", help="Also on another model than the one the guardrail was made for."),
]

ReuseOption = Annotated[
    bool, typer.Option("--reuse", help="Take an existing artifact if settings, inputs and versions all match.")
]

ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on from the checkpoint of the same command, interrupted.")
]

IneffectiveOption = Annotated[
    bool | None,
    typer.Option("--allow-ineffective", help="Even if the guardrail does nothing on what it should forget."),
]

SummaryOption = Annotated[
    str | None, typer.Option("--summary", metavar="FILE", help="Append a Markdown section on what was found to a file.")
]

JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]

QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no hints.")]

DEFAULT_WORKSPACE = Path("dsg-workspace")


def settings(
    recipe: str | None, sets: list[str] | None, *, device: str | None, dtype: str | None, seed: int | None, **flags: Any
) -> Recipe:
    """The recipe with `--set` and flags on top; a flag's `__` stands for the dot of its key.

    An empty list means that a repeatable flag was not given.
    """
    from dsg_cli.recipe import load_recipe

    dotted = {key.replace("__", "."): (None if value == [] else value) for key, value in flags.items()}
    common = {"model.device": device, "model.dtype": dtype, "seed": seed}
    return load_recipe(recipe, sets=sets or [], flags={**common, **dotted})
