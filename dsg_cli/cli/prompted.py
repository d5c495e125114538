"""What `dsg inspect --prompt` prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsg_cli.cli.output import print_json, progress

if TYPE_CHECKING:
    from dsg_cli.recipe import Recipe


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
