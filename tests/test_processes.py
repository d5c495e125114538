"""Whole commands in processes of their own: two that share the work, ones that are told to stop, and small storms."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsg_cli.job import ALONE, Workers, launched
from dsg_cli.workspace.store import Workspace

STORMS = Path(__file__).parent / "storms"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

SMALL = (
    "corpora.limit=80",
    "eval.benches=[lab-hexes, lab-near]",
    "attack.relearn_steps=[0, 5]",
    "calibrate.gate=window",
)


def python(n, *arguments, folder):
    """Python in n processes, as torchrun starts them."""
    run = ["-m", "torch.distributed.run", "--nproc-per-node", str(n), "--standalone"] if n > 1 else []
    options = {"capture_output": True, "text": True, "check": False, "timeout": 600}
    return subprocess.run([sys.executable, *run, *arguments], cwd=folder, env=ENVIRONMENT, **options)


def launch(n, *arguments, folder):
    return python(n, "-m", "dsg_cli", *arguments, folder=folder)


def test_workers_share_pieces_without_gaps_or_overlap():
    assert launched({}) == ALONE and launched({"RANK": "1", "WORLD_SIZE": "3"}) == ALONE
    assert launched({"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "x"}) == Workers(1, 3)
    owned = [[number for number in range(20) if Workers(rank, 3).owns(number)] for rank in range(3)]
    assert sorted(itertools.chain(*owned)) == list(range(20))
    assert max(map(len, owned)) - min(map(len, owned)) <= 1
    assert ALONE.is_first and ALONE.agreed({"a": 1}) == {"a": 1} and ALONE.gathered(2) == [2]


SHARE = """
import torch
from dsg_cli.job import joined
with joined() as workers:
    whole = workers.total([torch.tensor([1.5, workers.rank + 0.25], dtype=torch.float64), torch.tensor(workers.rank)])
    values = workers.gathered({"rank": workers.rank, "text": "é" * (1 + 5 * workers.rank), "none": None})
    agreed = workers.agreed(["first", workers.rank])
    order = []
    with workers.in_turn():
        order.append(workers.rank)
    if workers.is_first:
        print([tensor.tolist() for tensor in whole], values, agreed)
"""


def test_what_is_exchanged_between_processes(tmp_path):
    (tmp_path / "share.py").write_text(SHARE)
    done = python(2, "share.py", folder=tmp_path)
    values = [{"rank": 0, "text": "é", "none": None}, {"rank": 1, "text": "é" * 6, "none": None}]
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"[[3.0, 1.5], 1] {values} ['first', 0]"


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    printed = []
    for n in (1, 2):
        sets = [word for item in SMALL for word in ("--set", item)]
        done = launch(n, "run", "lab", *sets, "-w", f"ws{n}", "--json", folder=tmp_path)
        assert done.returncode == 0, done.stderr
        printed.append(json.loads(done.stdout))  # Only the first of them speaks.
    assert printed[0]["artifacts"] == printed[1]["artifacts"]
    one, two = (Workspace(tmp_path / f"ws{n}") for n in (1, 2))
    assert one.ids() == two.ids()
    for artifact_id in one.ids():
        a, b = one.read(artifact_id), two.read(artifact_id)
        if a.header.kind == "features":
            assert [f.index for f in a.body.features] == [f.index for f in b.body.features]
            assert (a.body.forget_tokens, a.body.retain_tokens) == (b.body.forget_tokens, b.body.retain_tokens)
            for name, tensor in one.tensors(a).items():
                assert (tensor - two.tensors(b)[name]).abs().max() <= 1e-6 * tensor.abs().max()
        elif a.header.kind == "threshold":
            assert a.body.threshold == pytest.approx(b.body.threshold, abs=1e-6)
            assert [row["id"] for row in rows(a)] == [row["id"] for row in rows(b)]
        elif a.header.kind == "guardrail":
            assert a.body.indices == b.body.indices and a.body.effect["n_clamped"] == b.body.effect["n_clamped"]
        elif a.header.kind == "eval":
            assert [answer(row) for row in rows(a)] == [answer(row) for row in rows(b)] and rows(a)
            assert a.body.results == b.body.results
        else:
            curves = [[point["unlearned"]["forget_acc"] for point in stored.body.curve] for stored in (a, b)]
            assert curves[0] == curves[1]


def rows(stored):
    return [json.loads(line) for line in stored.path.with_suffix(".jsonl").read_text().splitlines()]


def answer(row):
    chosen = [max(range(len(row[side])), key=row[side].__getitem__) for side in ("base", "unlearned")]
    return row["bench"], row["id"], row["gated"], chosen


@pytest.mark.slow
def test_several_processes_complain_once_and_only_where_they_can_share(tmp_path):
    done = launch(2, "select", "--forget", "lab-hexes", "--retain", "nonsense", "--model", "lab", folder=tmp_path)
    assert done.returncode == 1 and done.stderr.count("There is no corpus or file named nonsense") == 1
    done = launch(2, "ls", folder=tmp_path)
    assert done.returncode == 1 and "dsg ls runs in one process" in done.stderr
    done = launch(2, "select", "--recipe", "lab", "--device-map", "auto", folder=tmp_path)
    assert done.returncode == 1 and "--device-map and torchrun" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_the_work_and_says_how_to_go_on(tmp_path, lab_chain, number):
    shutil.copytree(lab_chain, tmp_path / "dsg-workspace")
    for path in (tmp_path / "dsg-workspace").glob("eval*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    words = ["eval", "--recipe", "lab", "--batch-size", "4"]
    command = [sys.executable, "-m", "dsg_cli", *words]
    options = {"cwd": tmp_path, "env": ENVIRONMENT | {"DSG_CHECKPOINT_SECONDS": "0"}, "text": True}
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    folder = tmp_path / "dsg-workspace"
    while not list(folder.glob(".eval-*.checkpoint")):
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.01)
    running.send_signal(number)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 128 + number and out == "" and "Traceback" not in err
    typed = re.search(r"Go on with: dsg (.*)", err)[1]
    assert shlex.split(typed) == [*words, "--resume"]
    assert [path.name for path in folder.glob("eval*")] == []
    done = launch(1, *shlex.split(typed), folder=tmp_path)
    assert done.returncode == 0 and done.stdout == "eval-001\n" and "Going on from the checkpoint." in done.stderr
    assert not list(folder.glob(".*.checkpoint"))


@pytest.mark.slow
@pytest.mark.parametrize("words", ["kill --kills 5 --documents 80", "corrupt --changes 130"])
def test_a_small_storm(tmp_path, words):
    """The long ones are run by hand; recipes/RESULTS.md has their figures."""
    name, *options = words.split()
    done = python(1, str(STORMS / f"{name}.py"), *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
