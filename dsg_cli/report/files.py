"""A report on disk: the page, and its figures as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsg_cli.errors import DsgError
from dsg_cli.integrity import is_taken, write_atomically
from dsg_cli.report.page import Report


def write_report(
    made: Report, output: Path, figures: Path | None, kinds: Sequence[str], *, force: bool = False
) -> list[Path]:
    """Write both, each file whole or not at all; returns those of the figures.

    Args:
        made: The page.
        output: Its file.
        figures: Folder for its figures, if they are wanted as files.
        kinds: `svg`, `png`, `pdf`.
        force: Replace files that are there.

    Raises:
        DsgError: A figure's file is there already, or something cannot be written.
    """
    wanted = [(one, kind) for one in made.figures for kind in kinds] if figures is not None else []
    paths = [(figures or Path()) / f"{one.name}.{kind}" for one, kind in wanted]
    if not force and (taken := [path for path in paths if is_taken(path)]):
        raise DsgError(f"{taken[0]} is there already.", "Name another folder with --figures, or replace with --force.")
    try:
        if figures is not None:
            figures.mkdir(parents=True, exist_ok=True)
        for path, (one, kind) in zip(paths, wanted, strict=True):
            write_atomically(path, one.content(kind))
        write_atomically(output, made.text.encode())
    except OSError as error:
        where = error.filename or output
        raise DsgError(
            f"{where} cannot be written: {error.strerror or error}.", "Make room, or name another."
        ) from error
    return paths
