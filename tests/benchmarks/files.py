"""The guardrail's file at Gemma-2-2b's width, and how long it and the package take to load."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from hook import best_of

from dsg_cli.guardrail.loading import light_file, load_guardrail
from dsg_cli.guardrail.runtime.slice import SliceSpec
from dsg_cli.workspace.artifacts import Guardrail
from dsg_cli.workspace.store import Workspace

WIDTH, N_CHOSEN, N_DETECTORS = 2304, 20, 8
KEPT = Path(__file__).parent.parent / "data" / "schema-2"


def rows() -> list[tuple[str, str, str]]:
    """What was measured, what it gave, and the target."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "guardrail.safetensors"
        path.write_bytes(gemma_sized())
        n_bytes = path.stat().st_size
        seconds = best_of(lambda: load_guardrail(path), 20)
    importing = best_of(lambda: python("import dsg_cli"), 10) - best_of(lambda: python("pass"), 10)
    what = f"light file, {N_CHOSEN} features and {N_DETECTORS} detectors of width {WIDTH}"
    return [
        (what, f"{n_bytes / 1000:.0f} kB", ""),
        ("the same without detectors", f"{len(gemma_sized(0)) / 1000:.0f} kB", "<= 400 kB"),
        ("load_guardrail of it (best of 20)", f"{1000 * seconds:.1f} ms", "<= 50 ms"),
        ("import dsg_cli, beyond an empty interpreter", f"{1000 * importing:.0f} ms", "<= 100 ms"),
    ]


def gemma_sized(n_detectors: int = N_DETECTORS) -> bytes:
    """A light file of random values in Gemma's shapes."""
    stored = Workspace(KEPT).read("guardrail-001")
    n_columns = N_CHOSEN + n_detectors
    body = stored.body_as(Guardrail).replace(
        indices=list(range(N_CHOSEN)), detectors=list(range(N_CHOSEN, n_columns)), slice=asdict(SliceSpec("threshold"))
    )
    tensors = {
        "W_enc": torch.randn(WIDTH, n_columns),
        "b_enc": torch.randn(n_columns),
        "active_above": torch.rand(n_columns),
        "W_dec": torch.randn(N_CHOSEN, WIDTH),
        "detect": torch.ones(n_columns),
    }
    return light_file(stored.header, body, tensors)


def python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)
