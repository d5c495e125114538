"""SIGKILL at random moments of random stages; after each, the workspace must verify, and work must go on.

    python tests/storms/kill.py --kills 100

Everything is imported once; each stage runs in a forked child, which dies at a random moment of its usual duration.
Half of the runs go on from the checkpoint of a killed one. In the end the chain's figures must be those of a chain that
nobody disturbed: same features, statistics bit for bit, threshold, answers.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

STAGES = {
    "features": ["select", "--recipe", "lab"],
    "threshold": ["calibrate", "--recipe", "lab"],
    "guardrail": ["apply", "--recipe", "lab"],
    "eval": ["eval", "--recipe", "lab"],
    "attack": ["attack", "--recipe", "lab", "--kind", "relearn", "--kind", "dilution"],
}
SAME = [
    "features",
    "n_passed",
    "median_residual_norm",
    "threshold",
    "false_positive_rate",
    "effect",
    "results",
    "gate",
    "curve",
]
"""What must not depend on interruptions."""


def child(arguments: list[str], log: Path) -> int:
    """Start `dsg ...` in a forked child; its number."""
    pid = os.fork()
    if pid:
        return pid
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    from dsg_cli.cli.app import main

    torch.set_num_threads(1)
    try:
        main(arguments)
    except SystemExit as stop:
        os._exit(int(stop.code or 0))
    except BaseException:  # A traceback belongs into the log, and the child must not go on as the parent.
        traceback.print_exc()
    os._exit(70)


def finished(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def check_workspace(folder: Path) -> int:
    """Every visible artifact is complete and verifies; how many leftovers there are."""
    from dsg_cli.workspace.store import Workspace, verify_all

    verdicts = verify_all(Workspace(folder))
    assert not [verdict for verdict in verdicts if verdict.state == "broken"]
    return sum(verdict.state == "unfinished" for verdict in verdicts)


def figures(folder: Path, artifact_id: str) -> tuple[dict, bytes]:
    """What an artifact found: fields, and the tensors' bytes."""
    data = json.loads((folder / f"{artifact_id}.json").read_text())
    tensors = folder / f"{artifact_id}.safetensors"
    return {key: data[key] for key in SAME if key in data}, tensors.read_bytes() if tensors.exists() else b""


def stages_on(n_documents: int | None) -> dict[str, list[str]]:
    """The stages' commands; on so many documents of each corpus and a shorter attack, if a number is given."""
    if n_documents is None:
        return STAGES
    short = [f"corpora.limit={n_documents}", "attack.relearn_steps=[0, 6]", "attack.dilution_lengths=[0, 16]"]
    return {kind: [*words, *(word for one in short for word in ("--set", one))] for kind, words in STAGES.items()}


def storm(n_kills: int, *, seed: int = 0, n_documents: int | None = None, out=sys.stdout) -> dict[str, float]:
    """Run the storm; what was counted."""
    from dsg_cli.workspace.store import Workspace

    for name in ("lm_eval.evaluator", "lm_eval.models.huggingface", "dsg_cli.stages.run"):
        importlib.import_module(name)
    os.environ["DSG_CHECKPOINT_SECONDS"] = "0"
    rng, stages = random.Random(seed), stages_on(n_documents)
    counts: Counter[str] = Counter()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        root, log = Path(scratch), Path(scratch) / "log"
        calm, stormy = root / "calm", root / "stormy"
        usual = {}
        for kind, arguments in stages.items():
            start = time.monotonic()
            code = finished(child([*arguments, "-w", str(calm)], log))
            assert code == 0, (kind, code, log.read_text())
            usual[kind] = time.monotonic() - start
        per_stage = -(-n_kills // len(stages))
        for kind, arguments in stages.items():
            n_killed = counts["killed"]
            while counts["killed"] < n_killed + per_stage:
                resume = ["--resume"] if kind != "guardrail" and rng.random() < 0.5 else []
                pid = child([*arguments, *resume, "-w", str(stormy)], log)
                time.sleep(rng.uniform(0, 1.1 * usual[kind]))
                os.kill(pid, signal.SIGKILL)
                code = finished(pid)
                assert code in (0, -signal.SIGKILL), (kind, code, log.read_text())
                counts["killed" if code else "finished before"] += 1
                if stormy.exists():
                    counts["with leftovers"] += check_workspace(stormy) > 0
            code = finished(child([*arguments, *(["--resume"] if kind != "guardrail" else []), "-w", str(stormy)], log))
            assert code == 0, (kind, code, log.read_text())
            counts["went on from a checkpoint"] += "Going on" in log.read_text()
            assert check_workspace(stormy) == 0, sorted(path.name for path in stormy.iterdir())
            for end in range(2 if kind == "attack" else 1):
                ids = [Workspace(folder).ids(kind)[-1 - end] for folder in (calm, stormy)]
                assert figures(calm, ids[0]) == figures(stormy, ids[1]), f"{kind} differs"
        counts["artifacts"] = len(list(stormy.glob("*.json")))
    counts["seconds"] = round(time.monotonic() - began)
    for name, count in counts.items():
        out.write(f"{name}: {count}\n")
    return dict(counts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--documents", type=int, help="read so many of each corpus; all, unless it is given")
    options = parser.parse_args()
    storm(options.kills, seed=options.seed, n_documents=options.documents)
