"""What a stage cost (seconds, tokens, peak memory), and the commit that it ran from."""

from __future__ import annotations

import hashlib
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from dsg_cli.workspace.artifacts import Header
from dsg_cli.workspace.body import Json


@dataclass(frozen=True)
class Clock:
    """Started with a stage; closes its header."""

    start: float = field(default_factory=time.monotonic)

    def close(self, header: Header, *, n_tokens: int = 0) -> Header:
        """The header with wall seconds, tokens read and peak memory of the process."""
        seconds, memory = round(time.monotonic() - self.start, 3), round(peak_memory_mb(header.device), 1)
        return header.replace(seconds=seconds, n_tokens=n_tokens, peak_memory_mb=memory)


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


def reset_peak_memory(device: str) -> None:
    """Have peak memory counted from now on, where the system can: Linux, or an accelerator."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
