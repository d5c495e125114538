"""`dsg report`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from dsg_cli.cli import options as opt
from dsg_cli.cli.names import complete_artifact
from dsg_cli.cli.output import check_new_file, print_json, print_line, progress
from dsg_cli.errors import DsgError
from dsg_cli.integrity import is_taken


def command(
    artifacts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ARTIFACT]...",
            help="What it is about. By default the newest comparison, inspection and study of each name, and the "
            "newest guardrail, model or wrapper with all its evaluations and attacks; with what these were made from.",
            autocompletion=complete_artifact(),
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path("dsg-report.html"),
    figures: Annotated[Path | None, typer.Option("--figures", help="Folder for the figures as files, too.")] = None,
    formats: Annotated[list[str] | None, typer.Option("--format", help="svg (default), png, pdf; repeatable.")] = None,
    title: Annotated[str, typer.Option("--title", help="Of the page.")] = "Unlearning report",
    with_text: Annotated[
        bool,
        typer.Option("--with-text", help="Show texts in which features fire, where dsg inspect --samples kept them."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    workspace: opt.WorkspaceOption = opt.DEFAULT_WORKSPACE,
    recipe: opt.RecipeOption = None,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """Put what was found into one HTML file that needs nothing else, with figures.

    Example: dsg report -o report.html --figures figures --format pdf
    """
    start = time.monotonic()
    kinds = list(dict.fromkeys(formats or ["svg"]))
    _check(output, figures, kinds, force=force)
    resolved = opt.settings(recipe, None, device=None, dtype=None, seed=None)
    with progress(quiet) as report:
        from dsg_cli.report.files import write_report
        from dsg_cli.report.page import report_of
        from dsg_cli.report.published import beside
        from dsg_cli.stages.gathering import gather
        from dsg_cli.workspace import Workspace

        report("reading", 0, 0)
        gathered = gather(Workspace(workspace), artifacts or [])
        results = {bench: sides for one in gathered.of("eval") for bench, sides in one.json["results"].items()}
        report("drawing", 0, 0)
        made = report_of(gathered, title, beside(resolved.published, results) if recipe else (), has_text=with_text)
        files = write_report(made, output, figures, kinds, force=force)
    if as_json:
        found = {"path": str(output), "bytes": output.stat().st_size, "seconds": round(time.monotonic() - start, 2)}
        ids = [stored.id for stored in gathered.artifacts]
        print_json({**found, "artifacts": ids, "figures": [str(path) for path in files]})
    else:
        print_line(str(output))


def _check(output: Path, figures: Path | None, kinds: list[str], *, force: bool) -> None:
    """Refuse bad options before anything is read.

    Raises:
        DsgError: They are.
    """
    unknown = [kind for kind in kinds if kind not in ("svg", "png", "pdf")]
    if unknown:
        raise DsgError(f"Figures are written as svg, png or pdf, not as {unknown[0][:40]}.")
    check_new_file(output, "--output", force=force)
    if figures is not None and is_taken(figures) and not figures.is_dir():
        raise DsgError(f"{figures} is no folder.", "Name another with --figures.")
