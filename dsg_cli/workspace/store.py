"""A workspace: a flat folder of numbered, immutable artifacts that are either complete or not there.

`<kind>-<NNN>.json`, with `<kind>-<NNN>.safetensors` (tensors), `<kind>-<NNN>.jsonl` (rows), `<kind>-<NNN>.csv` (a
table) and a folder `<kind>-<NNN>/` (files of others) beside it. A JSON file that exists is complete (committing.py). It
holds the digests of its side files and of itself; every read verifies them, and that what it was computed from is what
lies beside it.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dsg_cli.artifacts import KINDS, MADE_BY, Body, BodyT, Header, InputArtifact, Json, to_json
from dsg_cli.committing import ID, check_side_file, commit, next_id, writing
from dsg_cli.errors import DsgError, nearest
from dsg_cli.integrity import (
    LARGEST_JSON,
    Content,
    artifact_text,
    content_digest,
    digest_of,
    file_digest,
    is_file,
    is_folder,
    parse_document,
    read_bounded,
    read_document,
)

if TYPE_CHECKING:
    from torch import Tensor


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
        """Make the folder if need be, before anything expensive.

        Raises:
            DsgError: It cannot be made or written to.
        """
        probe = self.folder / f".{secrets.token_hex(6)}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink(missing_ok=True)  # Whoever writes sweeps.
        except OSError as error:
            raise DsgError(
                f"The workspace {self.folder} cannot be written to: {error.strerror}.",
                "Name another with --workspace or DSG_WORKSPACE.",
            ) from error

    def ids(self, kind: str | None = None) -> list[str]:
        """Ids of all artifacts, or of those of one kind, oldest number first."""
        names = [path.stem for path in self.folder.glob("*.json")] if is_folder(self.folder) else []
        matches = [match for match in map(ID.fullmatch, names) if match and kind in (None, match[1])]
        order = list(KINDS)
        return [m[0] for m in sorted(matches, key=lambda m: (order.index(m[1]), int(m[2])))]

    def find(self, kind: str, wanted: str | None = None) -> Stored:
        """The newest artifact of a kind, or the one named by id or path; verified.

        Raises:
            DsgError: There is none, it is of another kind, or it does not verify.
        """
        if wanted is None:
            ids = self.ids(kind)
            if not ids:
                raise DsgError(f"The workspace {self.folder} has no {kind} yet.", f"Make it with: {MADE_BY[kind]}")
            return self.read(ids[-1])
        stored = self.read(wanted)
        if stored.header.kind != kind:
            raise DsgError(f"{stored.id} is not of the kind {kind}, which {MADE_BY[kind]} makes.")
        return stored

    def read(self, wanted: str) -> Stored:
        """Read and verify one artifact, by id or by path of its JSON file.

        Raises:
            DsgError: Missing, altered, incomplete, or of a newer schema.
        """
        path = Path(wanted) if wanted.endswith(".json") else self.folder / f"{wanted}.json"
        if not is_file(path) or not (wanted.endswith(".json") or ID.fullmatch(wanted)):
            raise DsgError(f"There is no artifact {wanted[:200]} in {self.folder}.", nearest(wanted[:200], self.ids()))
        data = read_document(_text_of(path), where=str(path), is_whole=True)
        header, body = parse_document(data, where=str(path))
        if header.id != path.stem:
            raise DsgError(f"{path} was renamed: it is {header.id[:200]}.", "Give it its name back.")
        for one in header.inputs:
            if not ID.fullmatch(one.id):
                raise DsgError(f"{path} names an input {one.id[:200]!r}, which is no artifact's name.")
        for name, side_digest in header.files.items():
            check_side_file(name, header.id)
            side = path.parent / name
            if not is_file(side):
                raise DsgError(f"{path} is incomplete: {name} is missing.", "Make it again.")
            if file_digest(side) != side_digest:
                raise DsgError(f"{side} was altered after it was written: its digest does not match.", "Make it again.")
        stored = Stored(header, body, data, path)
        self._check_inputs(stored)
        return stored

    def _has(self, named: InputArtifact) -> bool:
        path = self.folder / f"{named.id}.json"
        try:
            return path.is_file() and _digest_said(path) == named.sha256
        except DsgError:
            return False

    def _check_inputs(self, stored: Stored) -> None:
        """An artifact may travel alone; but what lies beside it under the name of an input must be that input."""
        for named in stored.header.inputs:
            path = stored.path.with_name(f"{named.id}.json")
            if not named.is_elsewhere and path.is_file() and _digest_said(path) != named.sha256:
                raise DsgError(
                    f"{stored.id} was computed from another {named.id} than the one in {path.parent}.",
                    f"It belongs to another chain: make it again with {MADE_BY[stored.header.kind]}.",
                )

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

        Args:
            header: Its id and files are filled in here.
            body: What was found.
            tensors: Written beside it as safetensors.
            rows: Written beside it as JSON lines.
            table: Written beside it, as CSV.
            folder: Files, by their paths, of a folder beside it that is named like it; those that are given as files
                are moved.

        Raises:
            DsgError: The workspace cannot be written to.
        """
        self.check_writable()
        content = dict(_contents(tensors, rows, table, folder or {}))
        try:
            with writing(self.folder):
                artifact_id = next_id(self.folder, header.kind)
                files = {f"{artifact_id}{name}": what for name, what in content.items()}
                for name in files:
                    check_side_file(name, artifact_id)
                digests = {name: content_digest(what) for name, what in files.items()}
                inputs = [replace(one, is_elsewhere=not self._has(one)) for one in header.inputs]
                header = replace(header, id=artifact_id, files=digests, inputs=inputs)
                data = to_json(header, body)
                data["sha256"] = digest_of(data)
                commit(self.folder, artifact_id, files, artifact_text(data))
        except OSError as error:
            raise DsgError(
                f"The new {header.kind} cannot be written to {self.folder}: {error.strerror}.",
                "Make room, or name another workspace with --workspace.",
            ) from error
        return Stored(header, body, data, self.folder / f"{artifact_id}.json")

    def tensors(self, stored: Stored) -> dict[str, Tensor]:
        """The tensors beside an artifact.

        Raises:
            DsgError: There are none.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = stored.path.with_suffix(".safetensors")
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise DsgError(f"{path} cannot be read: {error}.", "Make the artifact again.") from error

    def rows(self, stored: Stored) -> list[Json]:
        """The rows beside an artifact, which reading it has verified.

        Raises:
            DsgError: There are none, or they cannot be read.
        """
        path = stored.path.with_suffix(".jsonl")
        try:
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise DsgError(f"{path} cannot be read: {error}.", "Make the artifact again.") from error

    def matching(self, header: Header) -> Stored | None:
        """The newest artifact with the same settings, inputs, model, SAE and versions, for `--reuse`."""
        for artifact_id in reversed(self.ids(header.kind)):
            try:
                stored = self.read(artifact_id)
            except DsgError:  # A damaged artifact is no reason not to make a new one.
                continue
            if reuse_key(stored.header) == reuse_key(header):
                return stored
        return None


def _text_of(path: Path) -> str:
    try:
        return read_bounded(path, LARGEST_JSON).decode()
    except UnicodeDecodeError as error:
        raise DsgError(f"{path} is not an artifact of dsg, or is damaged.") from error


def _digest_said(path: Path) -> str:
    return str(read_document(_text_of(path), where=str(path), is_whole=True)["sha256"])


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
    for name, what in folder.items():
        yield f"/{name}", what


def reuse_key(header: Header) -> tuple[object, ...]:
    """What must agree for two runs to give the same result."""
    return (
        header.schema,
        header.settings,
        header.seed,
        header.model,
        header.sae,
        [(named.id, named.sha256) for named in header.inputs],
        header.device,
        header.dtype,
        header.dsg_version,
        header.packages,
        header.git,
        header.trust_remote_code,
    )
