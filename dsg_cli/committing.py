"""How an artifact gets into a workspace: whole, or not at all, whatever happens to the process that writes it.

All its files are written to a scratch folder `.<id>.partial`, the JSON file last. From then on it is *committed*: its
files are moved to where they belong, the JSON file last again, and if the process dies on the way, the next one that
writes to the workspace moves what is left. A scratch folder without its JSON file is removed. One lock a workspace is
held by whoever writes; nobody needs it to read.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from dsg_cli.artifacts import KINDS
from dsg_cli.errors import DsgError
from dsg_cli.integrity import Content, place_content, sync_folder, write_atomically
from dsg_cli.interruption import at_safe_points
from dsg_cli.locks import locked

LOCK = ".lock"
PARTIAL = ".partial"
ID = re.compile(r"(" + "|".join(KINDS) + r")-([0-9]{3,18})(?![0-9])")
SIDE_FILES = (".safetensors", ".jsonl", ".csv")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """While the block runs, nobody else writes to the workspace; what a killed process left has been dealt with.

    Raises:
        DsgError: The file system has no locks.
        OSError: The folder cannot be written to.
    """
    with locked(folder / LOCK):
        for scratch in leftovers(folder):
            if scratch.is_dir():
                _finish(folder, scratch)
            else:
                scratch.unlink(missing_ok=True)  # A probe, which its owner may have taken away.
        yield


def leftovers(folder: Path) -> list[Path]:
    """Scratch folders and files; of a process that writes now, or of one that was killed."""
    own = re.compile(rf"\.({ID.pattern}){re.escape(PARTIAL)}|\..*\.[0-9a-f]{{12}}\.tmp")
    return sorted(path for path in folder.glob(".*") if own.fullmatch(path.name))


def next_id(folder: Path, kind: str) -> str:
    """The number after the highest that any file of that kind has; to be asked while `writing`."""
    taken = (ID.match(path.name) for path in folder.iterdir())
    number = max((int(match[2]) for match in taken if match and match[1] == kind), default=0)
    return f"{kind}-{number + 1:03d}"


def commit(folder: Path, artifact_id: str, files: Mapping[str, Content], text: str) -> None:
    """Write an artifact; to be called while `writing`.

    Args:
        folder: The workspace.
        artifact_id: Its id.
        files: Its side files, by their names: what is in them, or a file that is moved to there.
        text: Of its JSON file.

    Raises:
        OSError: It cannot be written; nothing of it is left.
    """
    scratch = folder / f".{artifact_id}{PARTIAL}"
    try:
        scratch.mkdir()
        for name, content in files.items():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            place_content(scratch / name, content)
        with at_safe_points():
            write_atomically(scratch / f"{artifact_id}.json", text.encode())
            _finish(folder, scratch)
    finally:
        if not (scratch / f"{artifact_id}.json").exists():
            shutil.rmtree(scratch, ignore_errors=True)


def check_side_file(name: str, artifact_id: str) -> None:
    """Refuse a name of a side file that does not belong to an artifact, or lies outside the workspace.

    Raises:
        DsgError: It is such a name.
    """
    parts = PurePosixPath(name).parts
    is_own_file = any(name == f"{artifact_id}{suffix}" for suffix in SIDE_FILES)
    is_inside = len(parts) > 1 and parts[0] == artifact_id and ".." not in parts and "\x00" not in name
    if not is_own_file and not is_inside:
        raise DsgError(f"{artifact_id} names the file {name[:100]!r}, which is none of its own.")


def _finish(folder: Path, scratch: Path) -> None:
    """Move a committed artifact to where it belongs, its JSON file last; remove one that is not committed."""
    last = scratch / f"{scratch.name.removeprefix('.').removesuffix(PARTIAL)}.json"
    if last.exists():
        for path in sorted(scratch.iterdir()):
            if path != last:
                path.rename(folder / path.name)
        sync_folder(folder)
        last.rename(folder / last.name)
        sync_folder(folder)
    shutil.rmtree(scratch)
