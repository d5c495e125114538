"""How every stage runs: on which device, from which checkpoint, and what it leaves behind.

A stage first checks and reads all that it can without weights. Then, in `with stage(...) as this`, `this.existing` is
what `--reuse` takes instead, `this.job` is what long passes go on from, and `this.write` writes the artifact.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch

from dsg_cli import __version__
from dsg_cli.errors import DsgError
from dsg_cli.job import ALONE, Job, Report, Workers, launched, silent
from dsg_cli.settings import Recipe
from dsg_cli.workspace.artifacts import KINDS, Header, ModelIdentity, SaeIdentity
from dsg_cli.workspace.body import Body, Json
from dsg_cli.workspace.checkpoints import SUFFIX, Checkpoint
from dsg_cli.workspace.files import Content, Signalled
from dsg_cli.workspace.provenance import Clock, git_state
from dsg_cli.workspace.store import Stored, Workspace, reuse_key, writing

if TYPE_CHECKING:
    from torch import Tensor

SHORT = ("guardrail", "wrapper", "inspect")
"""Kinds whose work is not long enough for a checkpoint."""

PACKAGES = ("torch", "transformers", "sae-lens", "datasets", "lm-eval", "safetensors", "tokenizers")


@dataclass(frozen=True)
class RunOptions:
    """What the command line says about running, as the settings say what is computed."""

    reuse: bool = False
    """Return an existing artifact whose settings, inputs and versions all match."""
    resume: bool = False
    """Go on from the checkpoint of an interrupted run."""
    workers: Workers = ALONE
    report: Report = silent
    say: Callable[[str], None] = field(default=lambda _: None)
    """What a person should know now."""

    def agreed(self, choose: Callable[[], str]) -> str:
        """The artifact to start from; where several workers run, the newest is the one that the first of them sees."""
        return str(self.workers.agreed(choose() if self.workers.is_first else None))

    def newest(self, workspace: Workspace, kind: str, source: str | None) -> str | None:
        """The artifact of a kind to start from, likewise."""
        if source is not None or self.workers.n == 1:
            return source
        return self.agreed(lambda: workspace.find(kind).id)

    def by_first(self, workspace: Workspace, run: Callable[[RunOptions], Stored]) -> Stored:
        """A stage whose work is not worth sharing: the first worker runs it alone, the others read what it wrote."""
        stored = run(replace(self, workers=ALONE)) if self.workers.is_first else None
        artifact_id = self.workers.agreed(stored.id if stored else None)
        return stored or workspace.read(artifact_id)


QUIET = RunOptions()


@dataclass(frozen=True)
class Stage:
    """One run of a stage."""

    header: Header
    """Without id, files and costs, which come when it is written."""
    job: Job
    existing: Stored | None
    """Returned instead of computing anything (`--reuse`): the same in every worker."""
    workspace: Workspace
    clock: Clock

    def write(
        self,
        body: Body,
        *,
        n_tokens: int = 0,
        notes: Sequence[str] = (),
        model: ModelIdentity | None = None,
        tensors: dict[str, Tensor] | None = None,
        rows: Iterable[Json] | None = None,
        table: str | None = None,
        folder: Mapping[str, Content] | None = None,
    ) -> Stored:
        """The artifact, written by the first worker, in all of them.

        `notes` come after those of the header, and `model` replaces the header's, if the work was put on another.
        Beside the artifact lie tensors as safetensors, rows as JSON lines, a table as CSV, and a folder, into which
        files given as paths are moved.
        """
        stored = None
        if self.job.workers.is_first:
            header = self.header.replace(notes=[*self.header.notes, *notes], model=model or self.header.model)
            header = self.clock.close(header, n_tokens=n_tokens)
            stored = self.workspace.write(header, body, tensors=tensors, rows=rows, table=table, folder=folder)
        artifact_id = self.job.workers.agreed(stored.id if stored else None)
        return stored or self.workspace.read(artifact_id)


@contextmanager
def stage(
    kind: str,
    recipe: Recipe,
    workspace: Workspace,
    options: RunOptions,
    clock: Clock,
    settings: Json,
    *,
    origin: Stored | None = None,
    inputs: Sequence[Stored] | None = None,
    model: ModelIdentity | None = None,
    sae: SaeIdentity | None = None,
    notes: Sequence[str] = (),
    is_reusable: bool = True,
) -> Iterator[Stage]:
    """One run of a stage, from when all is known that determines its result.

    Its checkpoint is gone after the block, unless that fails or is interrupted. `settings` are all that it is computed
    from and is not in another field of the header. If it goes on from an artifact `origin`, model and SAE are that
    one's, and it is the only input unless others are named. Equal headers mean equal results only if `is_reusable`; not
    where nothing vouches for the data.
    """
    if origin is not None:
        inputs, model, sae = [origin] if inputs is None else inputs, origin.header.model, origin.header.sae
    assert inputs is not None and model is not None
    remote_code = ["Python files that came with the model were run."] if recipe.model.trust_remote_code else []
    header = Header(
        kind=kind,
        schema=KINDS[kind].schema_number,
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
        notes=[*notes, *remote_code],
        trust_remote_code=recipe.model.trust_remote_code,
    )
    workers = options.workers
    job = Job(workers=workers, progress=options.report)
    existing_id = None
    if options.reuse and is_reusable:
        match = workspace.matching(header) if workers.is_first else None
        existing_id = workers.agreed(match.id if match else None)
    if existing_id is not None or kind in SHORT:
        existing = workspace.read(existing_id) if existing_id is not None else None
        yield Stage(header, job, existing, workspace, clock)
        return
    # All that determines the result, and how it is shared.
    key = hashlib.sha256(json.dumps([repr(reuse_key(header)), workers.rank, workers.n]).encode()).hexdigest()[:16]
    path = workspace.folder / f".{kind}-{key}{SUFFIX}"
    checkpoint = Checkpoint(path, resume=options.resume, lock=lambda: writing(workspace.folder))
    if options.resume:
        begun = "Going on from the checkpoint." if checkpoint.resumed else "No checkpoint of this run; it begins anew."
        options.say(begun)
    try:
        yield Stage(header, replace(job, checkpoint=checkpoint), None, workspace, clock)
    except Signalled as stopped:
        checkpoint.write()
        stopped.is_kept = path.is_file()
        raise
    checkpoint.remove()


def settle(recipe: Recipe, origin: Header | None = None) -> Recipe:
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
    if dtype == "auto" and origin is not None:
        dtype = origin.dtype
    elif dtype == "auto":
        has_bfloat16 = device.startswith("cuda") and torch.cuda.is_bf16_supported()
        dtype = "bfloat16" if has_bfloat16 else "float32"
    return replace(recipe, model=replace(recipe.model, device=device, dtype=dtype))
