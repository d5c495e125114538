"""`dsg ls`."""

from __future__ import annotations

import sys
from typing import Annotated, get_args

import typer

from dsg_cli.artifacts import Gate
from dsg_cli.benches.names import known_benches
from dsg_cli.catalogue import CATALOGUE
from dsg_cli.cli import options as opt
from dsg_cli.cli.output import console, print_json, print_names
from dsg_cli.errors import DsgError, nearest
from dsg_cli.lab import data as lab


def _recipes() -> list[str]:
    from dsg_cli.recipe import recipe_names

    return recipe_names()


def _saes() -> list[str]:
    from dsg_cli.releases import releases

    return [*lab.SAE_DIRS, *sorted(releases())]


def _ids(release: str) -> list[str]:
    from dsg_cli.releases import releases

    if release not in releases():
        raise DsgError(f"There is no SAE release {release}.", nearest(release, releases()))
    return [f"{release}/{one['id']}" for one in releases()[release]["saes"]]


NAMES = {
    "corpora": lambda: [*lab.CORPORA, *CATALOGUE],
    "benches": known_benches,
    "saes": _saes,
    "gates": lambda: list(get_args(Gate)),
    "attacks": lambda: ["relearn", "dilution"],
    "recipes": _recipes,
}


def command(
    what: Annotated[
        str | None, typer.Argument(help=f"{', '.join(NAMES)}, saes/RELEASE; by default the artifacts.")
    ] = None,
    workspace: opt.WorkspaceOption = opt.DEFAULT_WORKSPACE,
    as_json: opt.JsonOption = False,
) -> None:
    """List the artifacts of a workspace, or the names that options take."""
    if what is not None:
        if what not in NAMES and what.partition("/")[0] != "saes":
            raise DsgError(f"dsg ls knows no {what}.", nearest(what, NAMES))
        if what == "corpora" and not as_json and sys.stdout.isatty():
            from dsg_cli.report.tables import corpora_table

            console().print(corpora_table())
            return
        print_names(NAMES[what]() if what in NAMES else _ids(what.removeprefix("saes/")), as_json=as_json)
        return
    from dsg_cli.workspace import Workspace

    found = Workspace(workspace)
    if as_json:
        print_json([found.read(artifact_id).json for artifact_id in found.ids()])
    elif sys.stdout.isatty() and found.ids():
        from dsg_cli.report.tables import list_table

        console().print(list_table(found))
    else:
        print_names(found.ids(), as_json=False)
