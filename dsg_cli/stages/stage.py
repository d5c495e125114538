"""How a stage is run: who does it, from where it goes on, and what it returns instead of beginning at all."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import torch

from dsg_cli import __version__
from dsg_cli.errors import DsgError
from dsg_cli.job import ALONE, Report, Workers, launched, silent
from dsg_cli.settings import Recipe
from dsg_cli.workspace.artifacts import SCHEMAS, Header, ModelIdentity, SaeIdentity
from dsg_cli.workspace.checkpoints import SUFFIX, Checkpoint
from dsg_cli.workspace.files import Signalled
from dsg_cli.workspace.provenance import git_state
from dsg_cli.workspace.results import Json
from dsg_cli.workspace.store import Stored, Workspace, reuse_key, writing

PACKAGES = ("torch", "transformers", "sae-lens", "datasets", "lm-eval", "safetensors", "tokenizers")


def new_header(
    kind: str,
    recipe: Recipe,
    *,
    settings: Json,
    model: ModelIdentity,
    sae: SaeIdentity | None,
    inputs: Sequence[Stored],
    notes: Sequence[str] = (),
) -> Header:
    """A header without id, files and costs, which come last."""
    return Header(
        kind=kind,
        schema=SCHEMAS[kind],
        id="",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        dsg_version=__version__,
        git=git_state(),
        packages={"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in PACKAGES},
        device=recipe.model.device,
        dtype=recipe.model.dtype,
        seed=recipe.seed,
        settings=settings,
        model=model,
        sae=sae,
        inputs=[stored.as_input() for stored in inputs],
        notes=[
            *notes,
            *(["Python files that came with the model were run."] if recipe.model.trust_remote_code else []),
        ],
        trust_remote_code=recipe.model.trust_remote_code,
    )


@dataclass(frozen=True)
class Session:
    """What the command line says about running, as the settings say what is computed."""

    reuse: bool = False
    """Return an existing artifact whose settings, inputs and versions all match."""
    resume: bool = False
    """Go on from the checkpoint of an interrupted run."""
    workers: Workers = ALONE
    report: Report = silent
    say: Callable[[str], None] = field(default=lambda _: None)
    """What a person should know now."""

    def named(self, workspace: Workspace, kind: str, wanted: str | None) -> str | None:
        """The artifact to start from: what is the newest when several workers look is what the first one sees."""
        if wanted is not None or self.workers.n == 1:
            return wanted
        return str(self.workers.agreed(workspace.find(kind).id if self.workers.is_first else None))

    def named_together(
        self, workspace: Workspace, wanted: Sequence[str], newest: Callable[[Workspace], str]
    ) -> Sequence[str]:
        """The artifacts to start from together, likewise; what is made names the one that was taken (`composition`)."""
        if wanted:
            return wanted
        return [str(self.workers.agreed(newest(workspace) if self.workers.is_first else None))]

    def existing(self, workspace: Workspace, header: Header) -> Stored | None:
        """What `--reuse` returns: every worker the same."""
        if not self.reuse:
            return None
        found = workspace.matching(header) if self.workers.is_first else None
        wanted = self.workers.agreed(found.id if found else None)
        return workspace.read(wanted) if wanted else None

    @contextmanager
    def checkpoint(self, workspace: Workspace, header: Header) -> Iterator[Checkpoint]:
        """The checkpoint of this run of this stage; gone after the block, unless that fails or is interrupted."""
        path = workspace.folder / f".{header.kind}-{self._key(header)}{SUFFIX}"
        made = Checkpoint(path, resume=self.resume, lock=lambda: writing(workspace.folder))
        if self.resume:
            self.say("Going on from the checkpoint." if made.resumed else "No checkpoint of this run; it begins anew.")
        try:
            yield made
        except Signalled as stopped:
            made.write()
            stopped.is_kept = path.is_file()
            raise
        made.remove()

    def write(self, workspace: Workspace, make: Callable[[], Stored]) -> Stored:
        """The artifact that the first worker writes, in all of them."""
        stored = make() if self.workers.is_first else None
        wanted = self.workers.agreed(stored.id if stored else None)
        return stored or workspace.read(wanted)

    def _key(self, header: Header) -> str:
        """Digest of all that determines the result, and of how it is shared."""
        values = [repr(reuse_key(header)), self.workers.rank, self.workers.n]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


QUIET = Session()


def settle(recipe: Recipe, made: Header | None = None) -> Recipe:
    """The recipe with `auto` replaced: the GPU if there is one, and the dtype of the artifact that is gone on from."""
    device = recipe.model.device
    if recipe.model.device_map is not None and launched().n > 1:
        raise DsgError("--device-map and torchrun both share out the GPUs.", "Take one of them.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"  # Each process that torchrun starts on a machine has its own.
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DsgError(f"The device {device} is not available here.", "Try --device cpu.") from error
    dtype: Any = recipe.model.dtype
    if dtype == "auto" and made is not None:
        dtype = made.dtype
    elif dtype == "auto":
        has_bfloat16 = device.startswith("cuda") and torch.cuda.is_bf16_supported()
        dtype = "bfloat16" if has_bfloat16 else "float32"
    return replace(recipe, model=replace(recipe.model, device=device, dtype=dtype))
