"""A workspace: a flat folder of numbered, immutable artifacts that are either complete or not there.

`<kind>-<NNN>.json`, with `<kind>-<NNN>.safetensors` (tensors) and `<kind>-<NNN>.jsonl` (rows) beside it. Side files
are written first and the JSON last, each under a temporary name that is then renamed: a JSON file that exists is
complete. It holds the digests of its side files and of itself; every read verifies them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dsg_cli.artifacts import (
    KINDS,
    MADE_BY,
    Body,
    BodyT,
    Header,
    InputArtifact,
    Json,
    body_from_json,
    header_from_json,
    migrate,
    to_json,
)
from dsg_cli.errors import DsgError, nearest
from dsg_cli.integrity import digest_of, file_digest, read_document, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

ID = re.compile(r"(" + "|".join(KINDS) + r")-(\d{3,})")


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
            probe.unlink()
        except OSError as error:
            raise DsgError(
                f"The workspace {self.folder} cannot be written to: {error.strerror}.",
                "Name another with --workspace or DSG_WORKSPACE.",
            ) from error

    def ids(self, kind: str | None = None) -> list[str]:
        """Ids of all artifacts, or of those of one kind, oldest number first."""
        names = [path.stem for path in self.folder.glob("*.json")] if self.folder.is_dir() else []
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
        if not path.is_file() or not (wanted.endswith(".json") or ID.fullmatch(wanted)):
            raise DsgError(f"There is no artifact {wanted} in {self.folder}.", nearest(wanted, self.ids()))
        try:
            text = path.read_text(encoding="utf-8")
        except (ValueError, OSError) as error:
            raise DsgError(f"{path} is not an artifact of dsg, or is damaged.") from error
        data = read_document(text, where=str(path))
        if data["id"] != path.stem:
            raise DsgError(f"{path} was renamed: it is {data['id']}.", "Give it its name back.")
        for name, side_digest in data["files"].items():
            side = path.parent / name
            if not side.is_file():
                raise DsgError(f"{path} is incomplete: {name} is missing.", "Make it again.")
            if file_digest(side) != side_digest:
                raise DsgError(f"{side} was altered after it was written: its digest does not match.", "Make it again.")
        return Stored(header_from_json(data), body_from_json(migrate(data)), data, path)

    def write(
        self,
        header: Header,
        body: Body,
        *,
        tensors: dict[str, Tensor] | None = None,
        rows: Iterable[Json] | None = None,
        folder: Mapping[str, bytes] | None = None,
    ) -> Stored:
        """Write an artifact under the next number; all or nothing.

        Args:
            header: Its id and files are filled in here.
            body: What was found.
            tensors: Written beside it as safetensors.
            rows: Written beside it as JSON lines.
            folder: Files, by their paths, of a folder beside it that is named like it.

        Raises:
            DsgError: The workspace cannot be written to.
        """
        self.check_writable()
        with self._number(header.kind) as artifact_id:
            path = self.folder / f"{artifact_id}.json"
            try:
                files = dict(self._side_files(artifact_id, tensors, rows, folder or {}))
                header = replace(header, id=artifact_id, files=files)
                data = to_json(header, body)
                data["sha256"] = digest_of(data)
                write_atomically(path, (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())
            except BaseException as error:
                # Without its JSON a side file is a leftover.
                for suffix in (".safetensors", ".jsonl") if not path.exists() else ():
                    path.with_suffix(suffix).unlink(missing_ok=True)
                if folder and not path.exists():
                    shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                if isinstance(error, OSError):
                    raise DsgError(f"{path} cannot be written: {error.strerror}.") from error
                raise
            return Stored(header, body, data, path)

    def _side_files(
        self,
        artifact_id: str,
        tensors: dict[str, Tensor] | None,
        rows: Iterable[Json] | None,
        folder: Mapping[str, bytes],
    ) -> Iterator[tuple[str, str]]:
        if tensors is not None:
            from safetensors.torch import save

            yield self._side_file(f"{artifact_id}.safetensors", save({k: v.contiguous() for k, v in tensors.items()}))
        if rows is not None:
            lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
            yield self._side_file(f"{artifact_id}.jsonl", lines.encode())
        for name, content in folder.items():
            yield self._side_file(f"{artifact_id}/{name}", content)

    def _side_file(self, name: str, content: bytes) -> tuple[str, str]:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / name, content)
        return name, hashlib.sha256(content).hexdigest()

    @contextlib.contextmanager
    def _number(self, kind: str) -> Iterator[str]:
        """Hold the next free number: of two commands at once, only one can create the reservation."""
        number = max((int(i.rsplit("-", 1)[1]) for i in self.ids(kind)), default=0)
        while True:
            number += 1
            artifact_id = f"{kind}-{number:03d}"
            reservation = self.folder / f"{artifact_id}.partial"
            try:
                reservation.touch(exist_ok=False)
            except FileExistsError:
                continue
            # Another command may have finished this number between our listing and our reservation.
            if not (self.folder / f"{artifact_id}.json").exists():
                break
            reservation.unlink()
        try:
            yield artifact_id
        finally:
            reservation.unlink(missing_ok=True)

    def tensors(self, stored: Stored) -> dict[str, Tensor]:
        """The tensors beside an artifact."""
        from safetensors.torch import load_file

        return load_file(stored.path.with_suffix(".safetensors"))

    def matching(self, header: Header) -> Stored | None:
        """The newest artifact with the same settings, inputs, model, SAE and versions, for `--reuse`."""
        for artifact_id in reversed(self.ids(header.kind)):
            try:
                stored = self.read(artifact_id)
            except DsgError:  # A damaged artifact is no reason not to make a new one.
                continue
            if _reuse_key(stored.header) == _reuse_key(header):
                return stored
        return None


def _reuse_key(header: Header) -> tuple[object, ...]:
    return (
        header.schema,
        header.settings,
        header.seed,
        header.model,
        header.sae,
        header.inputs,
        header.device,
        header.dtype,
        header.dsg_version,
        header.packages,
        header.git,
    )
