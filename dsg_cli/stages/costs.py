"""What a method cost: all stages that led to an artifact, added up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dsg_cli.artifacts import Json, ModelWeights
from dsg_cli.errors import DsgError
from dsg_cli.stages.subject import Subject
from dsg_cli.workspace import Stored, Workspace


def cost_of(workspace: Workspace, subject: Subject) -> Json:
    """`{forward_tokens, backward_tokens, seconds, peak_memory_mb, bytes}` of everything that a subject was made by.

    Tokens are those that passed through the model or a part of it; bytes are those of what later steps read.
    """
    made = {stored.json["sha256"]: stored for one in subject.weights for stored in _chain(workspace, one)}
    made |= {
        stored.json["sha256"]: stored
        for one in (*subject.guardrails, *subject.wrappers)
        for stored in _chain(workspace, one)
    }
    backward = sum(
        stored.body.cost["backward_tokens"] for stored in made.values() if isinstance(stored.body, ModelWeights)
    )
    acting = [*subject.weights, *subject.guardrails, *subject.wrappers]
    return {
        "forward_tokens": sum(stored.header.n_tokens for stored in made.values()),
        "backward_tokens": backward,
        "seconds": round(sum(stored.header.seconds for stored in made.values()), 1),
        "peak_memory_mb": max(stored.header.peak_memory_mb for stored in made.values()),
        "bytes": sum(_size(stored) for stored in acting),
    }


def _chain(workspace: Workspace, stored: Stored) -> Iterator[Stored]:
    """An artifact and all that it was computed from, as far as it is in the workspace."""
    yield stored
    for one in stored.header.inputs:
        try:
            yield from _chain(workspace, workspace.read(one.id))
        except DsgError:
            continue


def _size(stored: Stored) -> int:
    if not stored.path.is_file() or stored.path.suffix == ".safetensors":
        return stored.path.stat().st_size
    return stored.path.stat().st_size + sum((stored.path.parent / name).stat().st_size for name in stored.header.files)


def reset_peak(device: str) -> None:
    """Have peak memory counted from now on, where the system can: Linux, or an accelerator."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
