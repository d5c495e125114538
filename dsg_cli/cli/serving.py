"""The live page of `dsg inspect --serve`."""

from __future__ import annotations

import sys
from pathlib import Path

from dsg_cli.cli.output import hint, print_line, progress
from dsg_cli.cli.running import import_libraries
from dsg_cli.recipe import Recipe


def serve(recipe: Recipe, workspace: Path, source: str | None, *, port: int, quiet: bool) -> None:
    """Load both models, say where the page is, and answer it until a signal comes.

    Raises:
        DsgError: Nothing to look at, or the port cannot be used; the port is taken before weights are loaded.
    """
    from dsg_cli.live.server import Server

    with Server(port) as server:
        with progress(quiet):
            import_libraries()
            from dsg_cli.stages import live
            from dsg_cli.workspace import Workspace

            looked = live.load(recipe, Workspace(workspace), [source] if source else [])
            server.about, server.ask = looked.about(), looked.ask
        print_line(server.url)
        sys.stdout.flush()  # A script waits for it.
        if not quiet:
            hint("Open it in a browser; Ctrl-C ends it.")
        server.serve_forever()
