"""What `dsg inspect --prompt` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsg_cli.cli.output import print_json, progress
from dsg_cli.cli.running import import_libraries
from dsg_cli.errors import DsgError

if TYPE_CHECKING:
    from dsg_cli.recipe import Recipe


def check_modes(modes: Mapping[str, object], others: Mapping[str, object]) -> None:
    """Refuse flags of one way to look at features beside those of another.

    Args:
        modes: Flags that choose what is done instead of an inspection, and their values.
        others: Flags that say how features are inspected.

    Raises:
        DsgError: There are such flags.
    """
    chosen = [flag for flag, value in modes.items() if value]
    given = [*chosen[1:], *([flag for flag, value in others.items() if value] if chosen else [])]
    if given:
        raise DsgError(f"{chosen[0]} does not go with {given[0]}.", "Leave one of the two out.")


def show_prompts(
    recipe: Recipe,
    workspace: Path,
    prompts: Sequence[str],
    artifact: str | None,
    features: Sequence[int],
    *,
    chat: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Prompts one after another, each with what features and gate see of it."""
    with progress(quiet):
        import_libraries()
        from dsg_cli.stages import trace
        from dsg_cli.workspace import Workspace

        seen = list(trace.run(recipe, Workspace(workspace), prompts, source=artifact, features=features, chat=chat))
    if as_json:
        print_json([one.as_json() for one in seen])
        return
    from dsg_cli.report.console import console
    from dsg_cli.report.traces import trace_view

    for one in seen:
        console().print(trace_view(one))
