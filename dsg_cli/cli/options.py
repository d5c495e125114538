"""Options of the command line: those that commands share, what completes them, and the settings that they make."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from typer import Context, Option

from dsg_cli.cli.output import DEFAULT_WORKSPACE, Output
from dsg_cli.errors import DsgError, nearest
from dsg_cli.lab import data as lab
from dsg_cli.workspace.files import artifact_ids

NAMES = ("corpora", "benches", "models", "saes", "gates", "attacks", "methods", "studies", "recipes")
"""What `dsg ls` lists by name, in the order of its help."""


def names_of(kind: str) -> list[str]:
    """The names that options of a kind take."""
    match kind:
        case "corpora":
            from dsg_cli.data.catalogue import CATALOGUE

            return [*lab.CORPORA, *CATALOGUE]
        case "benches":
            from dsg_cli.evals import known_benches

            return list(known_benches())
        case "models":
            return list(lab.MODEL_DIRS)
        case "saes":
            from dsg_cli.models.releases import releases

            return [*lab.SAE_DIRS, *sorted(releases())]
        case "gates":
            from dsg_cli.guardrail.runtime.spec import CalibratedGate

            return list(get_args(CalibratedGate))
        case "attacks":
            from dsg_cli.attacks import ALL, ATTACKS

            return [*ATTACKS, ALL]
        case "methods":
            from dsg_cli.methods import METHODS

            return list(METHODS)
        case "studies":
            from dsg_cli.studies import STUDIES

            return list(STUDIES)
        case _:
            from dsg_cli.recipe import recipe_names

            return recipe_names()


def ids_of(release: str) -> list[str]:
    """SAEs of a release, as `--sae` takes them."""
    from dsg_cli.models.releases import releases

    if release not in releases():
        raise DsgError(f"There is no SAE release {release}.", nearest(release, releases()))
    return [f"{release}/{sae['id']}" for sae in releases()[release]["saes"]]


def complete(kind: str) -> Callable[[str], list[str]]:
    """For Typer's `autocompletion`: the names of a kind that begin as the word does."""
    return lambda incomplete: [name for name in names_of(kind) if name.startswith(incomplete)]


def complete_artifact(*kinds: str) -> Callable[[Context, str], list[str]]:
    """For Typer's `autocompletion`: ids of these kinds, or of all, in the workspace that the command line names."""

    def ids(context: Context, incomplete: str) -> list[str]:
        folder = Path(context.params.get("workspace") or DEFAULT_WORKSPACE)
        return [name for kind in kinds or (None,) for name in artifact_ids(folder, kind) if name.startswith(incomplete)]

    return ids


@dataclass(frozen=True)
class Sets:
    """Beside an option in `Annotated`: the key of the recipe that it sets."""

    key: str


def option(name: str, kind: Any, help: str, *flags: str, default: Any = None, sets: str = "", **more: Any) -> Parameter:
    """An option as a parameter of a command; `more` is Typer's, and `sets` a key of the recipe."""
    annotated: Any = Annotated
    annotation = annotated[kind, Option(*flags, help=help, **more), *([Sets(sets)] if sets else [])]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def setting(key: str, kind: Any, help: str, *flags: str, names: str | None = None, **more: Any) -> Parameter:
    """An option that does nothing but set a key of the recipe; its flag is the last part of the key, if none is given.

    `names`, of NAMES, complete its values.
    """
    flags = flags or ("--" + key.rpartition(".")[2].replace("_", "-"),)
    name = flags[-1].removeprefix("--").replace("-", "_")
    if names is not None:
        more["autocompletion"] = complete(names)
    return option(name, kind | None, help, *flags, sets=key, **more)


_FOLDER: dict[str, Any] = {"default": DEFAULT_WORKSPACE, "envvar": "DSG_WORKSPACE", "show_default": True}
WORKSPACE = option("workspace", Path, "Folder of artifacts.", "--workspace", "-w", **_FOLDER)
JSON = option("as_json", bool, "One JSON document on stdout.", "--json", default=False)
QUIET = option("quiet", bool, "No progress and no hints.", "--quiet", "-q", default=False)
_SUMMARY = "Append a Markdown section on what was found to a file."
SUMMARY = option("summary", str | None, _SUMMARY, "--summary", metavar="FILE")
SETS = option("sets", list[str] | None, "section.key=value, for any setting; repeatable.", "--set")
RECIPE = option(
    "recipe", str | None, "YAML file, or the name of a shipped recipe.", "--recipe", autocompletion=complete("recipes")
)
DEVICE = (
    setting("model.device", str, "cpu, cuda, ...; a GPU if there is one."),
    setting("model.dtype", str, "auto, float32, bfloat16 or float16."),
)
_DEVICE_MAP = setting("model.device_map", str, "auto: spread a model over all GPUs, if it is larger than one.")
_TRUST = setting("model.trust_remote_code", bool, "Run Python files that come with the model. Read them first.")
SEED = setting("seed", int, "Seed of everything that is drawn.")
_REUSE = "Take an existing artifact if settings, inputs and versions all match."
REUSE = option("reuse", bool, _REUSE, "--reuse", default=False)
_RESUME = "Go on from the checkpoint of the same command, interrupted."
RUNNING = (REUSE, option("resume", bool, _RESUME, "--resume", default=False))
CORPORA = (
    setting("corpora.forget", list[str], "Corpus to forget (`dsg ls corpora`).", names="corpora"),
    setting("corpora.retain", list[str], "Corpus to retain; NAME=WEIGHT mixes.", names="corpora"),
)
SOURCES = (
    setting("model.source", str, "Hub name, folder, `lab`, or model-NNN.", "--model", names="models"),
    setting("sae.source", str, "RELEASE/ID, folder or `lab`.", "--sae"),
)
DOCUMENTS = "Documents of each corpus, at most."
LIMIT = setting("corpora.limit", int, DOCUMENTS)
OTHER_MODEL = (
    setting("model.instead", str, "Model to put it on; by default where the guardrail's model was.", "--model"),
    setting("model.allow_mismatch", bool, "Also on another model than the one the guardrail was made for."),
)
INEFFECTIVE = setting(
    "guardrail.allow_ineffective", bool, "Even if the guardrail does nothing on what it should forget."
)

COMPUTING = (RECIPE, SETS, *DEVICE, _DEVICE_MAP, _TRUST, SEED)
"""Of commands that load a model."""
GUARDED = (*COMPUTING, *OTHER_MODEL)
"""Of commands that load a guarded model."""
TRIALS = (*CORPORA, *SOURCES, RECIPE, SETS, *DEVICE, _TRUST, SEED, SUMMARY, *RUNNING)
"""Of commands that make many guardrails."""

FROM_HELP = "Artifact to start from; the newest by default."

FromFeatures = Annotated[str | None, Option("--from", help=FROM_HELP, autocompletion=complete_artifact("features"))]

FromMany = Annotated[
    list[str] | None,
    Option(
        "--from",
        help="Guardrail, model or wrapper, the newest by default; repeatable, they act together.",
        autocompletion=complete_artifact("guardrail", "model", "wrapper"),
    ),
]


def command(
    *options: Parameter,
    without: Sequence[Parameter] = (),
    settings: Callable[..., Mapping[str, Any]] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Turn a function into a command: these options beside its own, and a recipe made from all of them.

    Positional-only parameters of the function are what it is handed: the `Recipe`, if it takes two, and the `Output`.
    The others are its own options and arguments. What those with `Sets` say goes on top of the file and of `--set`.

    Args:
        options: Such as the command does not itself look at; `--workspace`, `--json` and `--quiet` need not be named.
        without: Of these three, those that the command lacks.
        settings: Makes further settings, by dotted key, from values of options; its parameters that are `Annotated`
            are options of the command, the others are named like one.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        parameters = inspect.signature(function).parameters.values()
        own = [p for p in parameters if p.kind is not Parameter.POSITIONAL_ONLY]
        of_settings = inspect.signature(settings).parameters if settings else {}
        annotated = [p for p in of_settings.values() if get_origin(p.annotation) is Annotated]
        general = [p for p in (WORKSPACE, JSON, QUIET) if p not in without]
        offered: dict[str, Parameter] = {}
        for parameter in (*own, *annotated, *options, *general):
            offered.setdefault(parameter.name, parameter.replace(kind=Parameter.KEYWORD_ONLY))
        keys = {
            name: extra.key
            for name, parameter in offered.items()
            for extra in getattr(parameter.annotation, "__metadata__", ())
            if isinstance(extra, Sets)
        }

        def run(**values: Any) -> None:
            handed: list[Any] = [Output(**{f.name: values[f.name] for f in fields(Output) if f.name in values})]
            if len(parameters) - len(own) == 2:
                flags = {key: values[name] for name, key in keys.items()}
                if settings is not None:
                    flags |= settings(**{name: values[name] for name in of_settings})
                handed.insert(0, _recipe(values.get("recipe"), values.get("sets"), flags))
            function(*handed, **{p.name: values[p.name] for p in own})

        run.__signature__ = inspect.Signature([*offered.values()])  # type: ignore[attr-defined]  # Typer reads this,
        run.__annotations__ = {name: parameter.annotation for name, parameter in offered.items()}  # and this.
        run.__name__, run.__doc__, run.__module__ = function.__name__, function.__doc__, function.__module__
        return run

    return decorate


def _recipe(name: str | None, sets: list[str] | None, flags: Mapping[str, Any]) -> Any:
    from dsg_cli.recipe import load_recipe

    flags = {key: None if value == [] else value for key, value in flags.items()}  # A repeatable flag, not given.
    return load_recipe(name, sets=sets or [], flags=flags)
