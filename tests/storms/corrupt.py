"""Random single-byte changes to every kind of file that dsg writes: each must be detected, by name, with one error.

    python tests/storms/corrupt.py --changes 300

A light file is a safetensors file of others' making, in which some bytes say nothing (padding): there a change may
also be proved harmless, that is the guardrail that is read is the same in all its values.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path


def make_workspace(folder: Path) -> None:
    """A whole chain on the lab, a light file, and a checkpoint."""
    from dsg_cli.cli.app import main

    light = folder.parent / "light.safetensors"
    commands = (
        ["select", "--recipe", "lab", "--limit", "80"],
        ["calibrate", "--recipe", "lab", "--set", "corpora.limit=80"],
        ["apply", "--recipe", "lab"],
        ["eval", "--recipe", "lab", "--bench", "lab-hexes", "--limit", "8"],
        ["attack", "--recipe", "lab", "--kind", "dilution", "--limit", "8"],
        ["export", str(light)],
    )
    for command in commands:
        try:
            main([*command, "-w", str(folder), "--quiet"])
        except SystemExit as stop:
            assert not stop.code, command
    import torch

    from dsg_cli.workspace.checkpoints import Checkpoint

    checkpoint = Checkpoint(folder / f".features-{'0' * 16}.checkpoint")
    checkpoint.keep("pass", {"n_batches": 1, "squares": torch.arange(64.0)})
    checkpoint.write()


def targets(folder: Path) -> dict[str, tuple[Path, Callable[[], object]]]:
    """Of each kind of file: one, and how it is read."""
    from dsg_cli.guardrail.loading import read_light
    from dsg_cli.workspace.checkpoints import read_entries
    from dsg_cli.workspace.store import Workspace

    workspace = Workspace(folder)
    found: dict[str, tuple[Path, Callable[[], object]]] = {}
    for artifact_id in workspace.ids():
        stored = workspace.read(artifact_id)
        for path in (stored.path, *(folder / name for name in stored.header.files)):
            kind = f"{stored.header.kind} {path.suffix if path.parent == folder else 'folder'}"
            found[kind] = (path, lambda artifact_id=artifact_id: workspace.read(artifact_id))
    (checkpoint,) = folder.glob(".*.checkpoint")
    found["checkpoint"] = (checkpoint, lambda: read_entries(checkpoint))
    light = folder.parent / "light.safetensors"

    def values() -> tuple:
        read = read_light(light)
        return read.header, read.body, {name: tensor.tolist() for name, tensor in read.module.tensors().items()}

    found["light file"] = (light, values)
    return found


def storm(n_changes: int, *, seed: int = 0, out=sys.stdout) -> dict[str, int]:
    """Run the storm; what was counted."""
    from dsg_cli.errors import DsgError

    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "ws"
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            make_workspace(folder)
        files = targets(folder)
        for number in range(n_changes):
            kind = sorted(files)[number % len(files)]
            path, read = files[kind]
            whole = path.read_bytes()
            expected = read() if kind == "light file" else None
            at = rng.randrange(len(whole))
            changed = bytearray(whole)
            changed[at] = rng.choice([byte for byte in range(256) if byte != whole[at]])
            path.write_bytes(changed)
            try:
                found = read()
            except DsgError as error:
                assert path.name in str(error) or path.stem in str(error), (kind, at, str(error))
                counts["detected"] += 1
            else:
                assert kind == "light file" and found == expected, f"{kind}: byte {at} of {path.name} went unnoticed"
                counts["harmless"] += 1
            finally:
                path.write_bytes(whole)
            counts[f"of {kind}"] += 1
        for _, read in files.values():
            read()
    out.write(json.dumps(counts, indent=1) + "\n")
    return dict(counts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--changes", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    storm(options.changes, seed=options.seed)
