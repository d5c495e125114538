"""What every stage writes into its header: when, where, with which versions and from what."""

from __future__ import annotations

import hashlib
import importlib.metadata
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from dsg_cli import __version__
from dsg_cli.artifacts import SCHEMAS, Header, Json, ModelIdentity, SaeIdentity
from dsg_cli.recipe import Recipe
from dsg_cli.workspace import Stored

PACKAGES = ("torch", "transformers", "sae-lens", "datasets", "lm-eval", "safetensors", "tokenizers")


@dataclass(frozen=True)
class Clock:
    """Started with a stage; closes its header."""

    start: float = field(default_factory=time.monotonic)

    def close(self, header: Header, *, n_tokens: int = 0) -> Header:
        """The header with wall seconds, tokens read and peak memory of the process."""
        return replace(
            header,
            seconds=round(time.monotonic() - self.start, 3),
            n_tokens=n_tokens,
            peak_memory_mb=round(peak_memory_mb(header.device), 1),
        )


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


def git_state() -> Json:
    """Commit and changes of the code that this package runs from; empty for an installed package.

    Workspaces and exports that lie in the checkout are no changes of the code.
    """
    root, code = Path(__file__).parents[2], ("--", Path(__file__).parents[1].name)
    if not (root / ".git").exists():
        return {}
    try:
        changes = _git(root, "status", "--porcelain", *code) + _git(root, "diff", "HEAD", *code)
        state: Json = {"commit": _git(root, "rev-parse", "HEAD").strip(), "dirty": bool(changes)}
        return state | ({"changes_sha256": hashlib.sha256(changes.encode()).hexdigest()} if changes else {})
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout


def peak_memory_mb(device: str = "cpu") -> float:
    """Peak memory of the device, or of the process if that is the CPU."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # Linux: ru_maxrss also counts the process that started this one.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
