"""What a long pass has done so far, kept in one file, so that `--resume` goes on from there with the same result.

A checkpoint is a list of named entries, each a JSON object with tensors. A pass calls `reached` after every batch: the
file is written again if some time has passed or a signal waits. Its first line holds the digest of all that follows.
Two runs share a checkpoint only if all that determines the result agrees: it is named by a digest of that.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsg_cli.errors import DsgError
from dsg_cli.workspace.files import parse_json, pending, read_bounded, safe_point, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, Any]
"""Tensors, and values of JSON."""

MAGIC = b"dsg-checkpoint-1 "

LARGEST = 2**37

SUFFIX = ".checkpoint"


class Checkpoint:
    """The entries of one run of one stage, in a file that is written in the context that `lock` makes.

    Without a path nothing is kept; with `resume` it goes on from the file, if that is there.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        resume: bool = False,
        lock: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.path = path
        self.lock = lock
        self.entries: dict[str, State] = read_entries(path) if resume and path is not None and path.is_file() else {}
        self.resumed = bool(self.entries)
        self.interval = math.inf if path is None else _seconds_between()
        self.written = time.monotonic()

    def entry(self, name: str) -> State | None:
        """What was kept under a name."""
        return self.entries.get(name)

    def reached(self, name: str, state: Callable[[], State]) -> None:
        """To be called where the work under a name is whole: a signal that waits is raised here.

        The state is made only if it is written now.
        """
        if pending() or time.monotonic() - self.written >= self.interval:
            self.keep(name, state())
            self.write()
        safe_point()

    def keep(self, name: str, state: State) -> None:
        """Have an entry, as it is now, in the next write."""
        if self.path is not None:
            self.entries[name] = copy.deepcopy(state)

    def write(self) -> None:
        """Write the file."""
        self.written = time.monotonic()
        if self.path is None or not self.entries:
            return
        content = _encoded(self.entries)
        try:
            with self.lock():
                write_atomically(self.path, MAGIC + hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
        except OSError as error:
            raise DsgError(
                f"The checkpoint {self.path} cannot be written: {error.strerror}.",
                "Make room, or name another workspace with --workspace.",
            ) from error

    def remove(self) -> None:
        """The run is over."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _seconds_between() -> float:
    """How long a pass goes on between two writes: DSG_CHECKPOINT_SECONDS, else 30."""
    text = os.environ.get("DSG_CHECKPOINT_SECONDS", "30")
    try:
        return float(text)
    except ValueError as error:
        raise DsgError(f"DSG_CHECKPOINT_SECONDS is {text!r}, which is no number of seconds.") from error


def _encoded(entries: dict[str, State]) -> bytes:
    from safetensors.torch import save
    from torch import Tensor

    tensors: dict[str, Tensor] = {}
    described = []
    for number, (name, state) in enumerate(entries.items()):
        inner = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        tensors |= {f"{number}.{key}": value.cpu().contiguous() for key, value in inner.items()}
        described.append({"name": name, "values": {key: v for key, v in state.items() if key not in inner}})
    return save(tensors, metadata={"entries": json.dumps(described)})


def read_entries(path: Path) -> dict[str, State]:
    """The entries in a checkpoint's file, verified."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    head, _, content = read_bounded(path, LARGEST).partition(b"\n")
    try:
        if head != MAGIC + hashlib.sha256(content).hexdigest().encode():
            raise ValueError
        # The header of a safetensors file: its length in eight bytes, then JSON.
        header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")])
        entries: dict[str, State] = {}
        tensors = load(content)
        for number, entry in enumerate(parse_json(header["__metadata__"]["entries"])):
            prefix = f"{number}."
            inner = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            entries[entry["name"]] = {**entry["values"], **inner}
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DsgError(
            f"The checkpoint {path} is damaged: its digest does not match.",
            "Delete it, or leave --resume out to begin again.",
        ) from error
    return entries
