"""Names that options take: `dsg ls` lists them, and shells complete them. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import get_args

import typer

from dsg_cli.artifacts import CalibratedGate
from dsg_cli.attacks.names import ALL, KINDS
from dsg_cli.benches.names import known_benches
from dsg_cli.catalogue import CATALOGUE
from dsg_cli.errors import DsgError, nearest
from dsg_cli.lab import data as lab
from dsg_cli.methods.names import METHODS
from dsg_cli.studies.names import STUDIES


def _recipes() -> list[str]:
    from dsg_cli.recipe import recipe_names

    return recipe_names()


def _saes() -> list[str]:
    from dsg_cli.releases import releases

    return [*lab.SAE_DIRS, *sorted(releases())]


def ids_of(release: str) -> list[str]:
    """SAEs of a release, as `--sae` takes them.

    Raises:
        DsgError: There is no such release.
    """
    from dsg_cli.releases import releases

    if release not in releases():
        raise DsgError(f"There is no SAE release {release}.", nearest(release, releases()))
    return [f"{release}/{one['id']}" for one in releases()[release]["saes"]]


NAMES: dict[str, Callable[[], list[str]]] = {
    "corpora": lambda: [*lab.CORPORA, *CATALOGUE],
    "benches": known_benches,
    "models": lambda: list(lab.MODEL_DIRS),
    "saes": _saes,
    "gates": lambda: list(get_args(CalibratedGate)),
    "attacks": lambda: [*KINDS, ALL],
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
        from dsg_cli.cli.options import DEFAULT_WORKSPACE
        from dsg_cli.workspace import Workspace

        found = Workspace(context.params.get("workspace") or DEFAULT_WORKSPACE)
        ids_of_kinds = [artifact_id for kind in kinds for artifact_id in found.ids(kind)]
        return [artifact_id for artifact_id in ids_of_kinds if artifact_id.startswith(incomplete)]

    return ids
