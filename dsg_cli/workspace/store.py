"""A workspace: a flat folder of numbered, immutable artifacts that are either complete or not there.

`<kind>-<NNN>.json`, with `<kind>-<NNN>.safetensors` (tensors), `<kind>-<NNN>.jsonl` (rows), `<kind>-<NNN>.csv` (a
table) and a folder `<kind>-<NNN>/` (files of others) beside it. A JSON file that exists is complete. It
holds the digests of its side files and of itself; every read verifies them, and that what it was computed from is what
lies beside it.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from dsg_cli.errors import DsgError, nearest
from dsg_cli.methods import finetunes
from dsg_cli.workspace.artifacts import (
    KINDS,
    BodyT,
    Header,
    InputArtifact,
    artifact_digest,
    artifact_text,
    parse_document,
    read_document,
    to_json,
)
from dsg_cli.workspace.body import Body, Json
from dsg_cli.workspace.checkpoints import SUFFIX, read_entries
from dsg_cli.workspace.files import (
    ID,
    LARGEST_JSON,
    Content,
    artifact_ids,
    at_safe_points,
    content_digest,
    file_digest,
    is_file,
    is_folder,
    locked,
    parse_json,
    place_content,
    read_bounded,
    sync_folder,
    write_atomically,
)

if TYPE_CHECKING:
    from torch import Tensor


LOCK = ".lock"

PARTIAL = ".partial"

SIDE_FILES = (".safetensors", ".jsonl", ".csv")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """While the block runs, nobody else writes to the workspace; what a killed process left has been dealt with."""
    with locked(folder / LOCK):
        for scratch in leftovers(folder):
            if scratch.is_dir():
                _finish(folder, scratch)
            else:
                scratch.unlink(missing_ok=True)  # A trial file, which its owner may have taken away.
        yield


def leftovers(folder: Path) -> list[Path]:
    """Scratch folders and files; of a process that writes now, or of one that was killed."""
    own = re.compile(rf"\.({ID.pattern}){re.escape(PARTIAL)}|\..*\.[0-9a-f]{{12}}\.tmp")
    return sorted(path for path in folder.glob(".*") if own.fullmatch(path.name))


def _next_id(folder: Path, kind: str) -> str:
    """The number after the highest that any file of that kind has; to be asked while `writing`."""
    taken = (ID.match(path.name) for path in folder.iterdir())
    number = max((int(match[2]) for match in taken if match and match[1] == kind), default=0)
    return f"{kind}-{number + 1:03d}"


def _commit(folder: Path, artifact_id: str, files: Mapping[str, Content], text: str) -> None:
    """Write an artifact while `writing`; of one that cannot be written nothing is left."""
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
    """Refuse a name of a side file that does not belong to an artifact, or lies outside the workspace."""
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


@dataclass(frozen=True)
class Stored:
    """An artifact that has been written, or read and verified."""

    header: Header
    body: Body
    json: Json
    """The file's object, digest included."""
    path: Path

    @property
    def id(self) -> str:
        return self.header.id

    def as_input(self) -> InputArtifact:
        """How an artifact made from this one refers to it."""
        return InputArtifact(id=self.id, sha256=self.json["sha256"])

    def body_as(self, kind: type[BodyT]) -> BodyT:
        """The body, which must be of this kind."""
        assert isinstance(self.body, kind)
        return self.body


class Workspace:
    """A folder of artifacts."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def check_writable(self) -> None:
        """Make the folder if need be, before anything expensive."""
        trial_file = self.folder / f".{secrets.token_hex(6)}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            trial_file.touch()
            trial_file.unlink(missing_ok=True)  # Whoever writes sweeps.
        except OSError as error:
            raise DsgError(
                f"The workspace {self.folder} cannot be written to: {error.strerror}.",
                "Name another with --workspace or DSG_WORKSPACE.",
            ) from error

    def ids(self, kind: str | None = None) -> list[str]:
        """Ids of all artifacts, or of those of one kind, oldest number first."""
        return artifact_ids(self.folder, kind)

    def find(self, kind: str, wanted: str | None = None) -> Stored:
        """The newest artifact of a kind, or the one named by id or path; verified."""
        name = self.newest([kind]) if wanted is None else wanted
        if name is None:
            raise DsgError(f"The workspace {self.folder} has no {kind} yet.", f"Make it with: {KINDS[kind].made_by}")
        stored = self.read(name)
        if stored.header.kind != kind:
            raise DsgError(f"{stored.id} is not of the kind {kind}, which {KINDS[kind].made_by} makes.")
        return stored

    def newest(self, kinds: Sequence[str], *, finetuned: bool = True) -> str | None:
        """Id of the artifact of these kinds that was done last, by the time that it states: a copied file has another.

        Without `finetuned`, models do not count that were trained on text and unlearned nothing.
        """
        stated = {artifact_id: self._stated(artifact_id) for kind in kinds for artifact_id in self.ids(kind)}
        ids = [name for name, json in stated.items() if finetuned or not finetunes(str(json.get("method")))]
        return max(ids, key=lambda name: _done(name, stated[name]), default=None)

    def done(self, artifact_id: str) -> tuple[float, int]:
        """When an artifact was done, and its number."""
        return _done(artifact_id, self._stated(artifact_id))

    def _stated(self, artifact_id: str) -> Json:
        """What an artifact says, unverified; empty if that is not to be made out."""
        try:
            stated = parse_json(read_bounded(self.folder / f"{artifact_id}.json", LARGEST_JSON))
        except (DsgError, ValueError):
            return {}
        return stated if isinstance(stated, dict) else {}

    def read(self, wanted: str) -> Stored:
        """Read and verify one artifact, by id or by path of its JSON file."""
        path = Path(wanted) if wanted.endswith(".json") else self.folder / f"{wanted}.json"
        if not is_file(path) or not (wanted.endswith(".json") or ID.fullmatch(wanted)):
            raise DsgError(f"There is no artifact {wanted[:200]} in {self.folder}.", nearest(wanted[:200], self.ids()))
        data = _read_json(path)
        header, body = parse_document(data, where=str(path))
        if header.id != path.stem:
            raise DsgError(f"{path} was renamed: it is {header.id[:200]}.", "Give it its name back.")
        for used in header.inputs:
            if not ID.fullmatch(used.id):
                raise DsgError(f"{path} names an input {used.id[:200]!r}, which is no artifact's name.")
        for name, side_digest in header.files.items():
            check_side_file(name, header.id)
            side = path.parent / name
            if not is_file(side):
                raise DsgError(f"{path} is incomplete: {name} is missing.", "Make it again.")
            if file_digest(side) != side_digest:
                raise DsgError(f"{side} was altered after it was written: its digest does not match.", "Make it again.")
        # An artifact may travel alone; but what lies beside it under the name of an input must be that input.
        for used in header.inputs:
            beside = path.with_name(f"{used.id}.json")
            if not used.is_elsewhere and beside.is_file() and _read_json(beside)["sha256"] != used.sha256:
                raise DsgError(
                    f"{header.id} was computed from another {used.id} than the one in {path.parent}.",
                    f"It belongs to another chain: make it again with {body.made_by}.",
                )
        return Stored(header, body, data, path)

    def _has(self, used: InputArtifact) -> bool:
        path = self.folder / f"{used.id}.json"
        try:
            return path.is_file() and bool(_read_json(path)["sha256"] == used.sha256)
        except DsgError:
            return False

    def write(
        self,
        header: Header,
        body: Body,
        *,
        tensors: dict[str, Tensor] | None = None,
        rows: Iterable[Json] | None = None,
        table: str | None = None,
        folder: Mapping[str, Content] | None = None,
    ) -> Stored:
        """Write an artifact under the next number; all or nothing.

        Id and files of the header are filled in here. Beside the JSON file lie tensors as safetensors, rows as JSON
        lines, the table as CSV, and files, by their paths, of a folder of its name; content that is a file is moved.
        """
        self.check_writable()
        contents = dict(_contents(tensors, rows, table, folder or {}))
        try:
            with writing(self.folder):
                artifact_id = _next_id(self.folder, header.kind)
                files = {f"{artifact_id}{suffix}": content for suffix, content in contents.items()}
                for name in files:
                    check_side_file(name, artifact_id)
                digests = {name: content_digest(content) for name, content in files.items()}
                inputs = [used.replace(is_elsewhere=not self._has(used)) for used in header.inputs]
                header = header.replace(id=artifact_id, files=digests, inputs=inputs)
                data = to_json(header, body)
                data["sha256"] = artifact_digest(data)
                _commit(self.folder, artifact_id, files, artifact_text(data))
        except OSError as error:
            raise DsgError(
                f"The new {header.kind} cannot be written to {self.folder}: {error.strerror}.",
                "Make room, or name another workspace with --workspace.",
            ) from error
        return Stored(header, body, data, self.folder / f"{artifact_id}.json")

    def tensors(self, stored: Stored) -> dict[str, Tensor]:
        """The tensors beside an artifact."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = stored.path.with_suffix(".safetensors")
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise DsgError(f"{path} cannot be read: {error}.", "Make the artifact again.") from error

    def rows(self, stored: Stored) -> list[Json]:
        """The rows beside an artifact, which reading it has verified."""
        path = stored.path.with_suffix(".jsonl")
        try:
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise DsgError(f"{path} cannot be read: {error}.", "Make the artifact again.") from error

    def readable(self, artifact_ids: Iterable[str]) -> Iterator[Stored]:
        """These artifacts but for those that are damaged: they are no reason not to look at the others."""
        for artifact_id in artifact_ids:
            with suppress(DsgError):
                yield self.read(artifact_id)

    def matching(self, header: Header) -> Stored | None:
        """The newest artifact with the same settings, inputs, model, SAE and versions, for `--reuse`."""
        artifacts = self.readable(reversed(self.ids(header.kind)))
        return next((stored for stored in artifacts if reuse_key(stored.header) == reuse_key(header)), None)


def _read_json(path: Path) -> Json:
    try:
        text = read_bounded(path, LARGEST_JSON).decode()
    except UnicodeDecodeError as error:
        raise DsgError(f"{path} is not an artifact of dsg, or is damaged.") from error
    return read_document(text, where=str(path), is_whole=True)


def _done(artifact_id: str, stated: Json) -> tuple[float, int]:
    """What cannot be read counts as the newest, for who reads it says what is wrong."""
    number = int(artifact_id.rpartition("-")[2])
    try:
        return datetime.fromisoformat(stated["created"]).timestamp() + float(stated["seconds"]), number
    except (KeyError, TypeError, ValueError, OverflowError):
        return math.inf, number


def _contents(
    tensors: dict[str, Tensor] | None, rows: Iterable[Json] | None, table: str | None, folder: Mapping[str, Content]
) -> Iterator[tuple[str, Content]]:
    """Side files, by what follows the id in their names."""
    if tensors is not None:
        from safetensors.torch import save

        yield ".safetensors", save({k: v.contiguous() for k, v in tensors.items()})
    if rows is not None:
        yield ".jsonl", "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()
    if table is not None:
        yield ".csv", table.encode()
    yield from ((f"/{name}", content) for name, content in folder.items())


OF_ONE_RUN = dict.fromkeys(("id", "created", "files", "seconds", "n_tokens", "peak_memory_mb", "notes"), True)


def reuse_key(header: Header) -> Json:
    """What must agree for two runs to give the same result."""
    return header.model_dump(exclude={**OF_ONE_RUN, "inputs": {"__all__": {"is_elsewhere"}}})


@dataclass(frozen=True)
class Verdict:
    """On one thing in a workspace.

    `broken` is what must not be relied on; `unfinished` is what an interrupted or a running command left, which does
    no harm.
    """

    name: str
    state: Literal["ok", "broken", "unfinished"]
    remark: str = ""


def verify_all(workspace: Workspace) -> list[Verdict]:
    """Verify every artifact with its side files and inputs, and name what else lies there."""
    if not is_folder(workspace.folder):
        raise DsgError(f"There is no workspace {str(workspace.folder)[:200]}.", "Name another with --workspace.")
    return [*_artifacts(workspace), *_strays(workspace), *_unfinished(workspace.folder)]


def _artifacts(workspace: Workspace) -> Iterator[Verdict]:
    for artifact_id in workspace.ids():
        try:
            stored = workspace.read(artifact_id)
        except DsgError as error:
            yield Verdict(artifact_id, "broken", error.message)
            continue
        inputs = [used.id for used in stored.header.inputs if not used.is_elsewhere]
        missing = [name for name in inputs if not stored.path.with_name(f"{name}.json").is_file()]
        yield Verdict(artifact_id, "ok", f"its input {', '.join(missing)} is not here" if missing else "")


def _strays(workspace: Workspace) -> Iterator[Verdict]:
    """Files with names of artifacts that belong to none."""
    for path in sorted(workspace.folder.iterdir()):
        match = ID.match(path.name)
        if match is None or not (path.is_dir() or path.suffix in SIDE_FILES):
            continue
        if path.stem != match[0]:
            continue
        if not (workspace.folder / f"{match[0]}.json").is_file():
            yield Verdict(path.name, "broken", f"{match[0]}.json, which vouches for it, is missing")
        else:
            yield from _unlisted(workspace, path, match[0])


def _unlisted(workspace: Workspace, path: Path, artifact_id: str) -> Iterator[Verdict]:
    try:
        listed = workspace.read(artifact_id).header.files
    except DsgError:
        return  # It has been named already.
    inside = [file for file in sorted(path.rglob("*")) if not file.is_dir()] if path.is_dir() else [path]
    for file in inside:
        name = file.relative_to(workspace.folder).as_posix()
        if name not in listed:
            yield Verdict(name, "broken", f"{artifact_id} does not know it")


def _unfinished(folder: Path) -> Iterator[Verdict]:
    for path in leftovers(folder):
        yield Verdict(path.name, "unfinished", "the next command that writes here deals with it")
    for path in sorted(folder.glob(f".*{SUFFIX}")):
        kind = re.match(r"\.(" + "|".join(KINDS) + r")-[0-9a-f]{16}\b", path.name)
        if kind is None:
            continue
        try:
            read_entries(path)
        except DsgError as error:
            yield Verdict(path.name, "broken", error.message)
        else:
            yield Verdict(
                path.name, "unfinished", f"of an interrupted run ({kind[1]}); go on with --resume, or delete it"
            )
