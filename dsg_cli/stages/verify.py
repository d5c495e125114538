"""`dsg verify`: is everything in a workspace what it says it is?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dsg_cli.artifacts import KINDS
from dsg_cli.checkpoints import SUFFIX, check_checkpoint
from dsg_cli.committing import ID, SIDE_FILES, leftovers
from dsg_cli.errors import DsgError
from dsg_cli.integrity import is_folder
from dsg_cli.workspace import Workspace

State = Literal["ok", "broken", "unfinished"]


@dataclass(frozen=True)
class Finding:
    """One thing in a workspace."""

    name: str
    state: State
    remark: str = ""


def run(workspace: Workspace) -> list[Finding]:
    """Verify every artifact with its side files and inputs, and name what else lies there.

    `broken` is what must not be relied on; `unfinished` is what an interrupted or a running command left, which does
    no harm.

    Raises:
        DsgError: There is no such folder.
    """
    if not is_folder(workspace.folder):
        raise DsgError(f"There is no workspace {str(workspace.folder)[:200]}.", "Name another with --workspace.")
    return [*_artifacts(workspace), *_strays(workspace), *_unfinished(workspace.folder)]


def _artifacts(workspace: Workspace) -> Iterator[Finding]:
    for artifact_id in workspace.ids():
        try:
            stored = workspace.read(artifact_id)
        except DsgError as error:
            yield Finding(artifact_id, "broken", error.message)
            continue
        missing = [
            one.id
            for one in stored.header.inputs
            if not one.is_elsewhere and not stored.path.with_name(f"{one.id}.json").is_file()
        ]
        yield Finding(artifact_id, "ok", f"its input {', '.join(missing)} is not here" if missing else "")


def _strays(workspace: Workspace) -> Iterator[Finding]:
    """Files with names of artifacts that belong to none."""
    for path in sorted(workspace.folder.iterdir()):
        match = ID.match(path.name)
        if match is None or not (path.is_dir() or path.suffix in SIDE_FILES):
            continue
        if path.stem != match[0]:
            continue
        if not (workspace.folder / f"{match[0]}.json").is_file():
            yield Finding(path.name, "broken", f"{match[0]}.json, which vouches for it, is missing")
        else:
            yield from _unlisted(workspace, path, match[0])


def _unlisted(workspace: Workspace, path: Path, artifact_id: str) -> Iterator[Finding]:
    try:
        listed = workspace.read(artifact_id).header.files
    except DsgError:
        return  # It has been named already.
    inside = [file for file in sorted(path.rglob("*")) if not file.is_dir()] if path.is_dir() else [path]
    for file in inside:
        name = file.relative_to(workspace.folder).as_posix()
        if name not in listed:
            yield Finding(name, "broken", f"{artifact_id} does not know it")


def _unfinished(folder: Path) -> Iterator[Finding]:
    for path in leftovers(folder):
        yield Finding(path.name, "unfinished", "the next command that writes here deals with it")
    for path in sorted(folder.glob(f".*{SUFFIX}")):
        kind = re.match(r"\.(" + "|".join(KINDS) + r")-[0-9a-f]{16}\b", path.name)
        if kind is None:
            continue
        try:
            check_checkpoint(path)
        except DsgError as error:
            yield Finding(path.name, "broken", error.message)
        else:
            yield Finding(
                path.name, "unfinished", f"of an interrupted run ({kind[1]}); go on with --resume, or delete it"
            )
