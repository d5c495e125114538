"""Interrupted passes go on from their checkpoints with the same result; damaged checkpoints are refused."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch

from dsg_cli.errors import DsgError
from dsg_cli.recipe import load_recipe
from dsg_cli.stages import attack, calibrate, evaluate, select
from dsg_cli.stages.stage import RunOptions
from dsg_cli.workspace import store as verify
from dsg_cli.workspace.checkpoints import Checkpoint, read_entries
from dsg_cli.workspace.files import Signalled, at_safe_points, install, safe_point
from dsg_cli.workspace.store import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")

SETS = [
    "eval.benches=[lab-hexes, lab-near]", "eval.batch_size=16", "eval.limit=24", "attack.dilution_lengths=[0, 8]",
    "calibrate.max_pieces=512", "corpora.limit=80",
]  # fmt: skip


@pytest.fixture(autouse=True)
def handlers(monkeypatch):
    """Our handlers while a test runs, Python's after it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    install()
    monkeypatch.setattr("dsg_cli.data.batches.batches.__kwdefaults__", {"batch_tokens": 1024, "device": "cpu"})
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("lab", sets=SETS)


@pytest.fixture(scope="module")
def calm(recipe, tmp_path_factory):
    """A workspace with a guardrail that nobody interrupted."""
    from dsg_cli.stages import apply as apply

    workspace = Workspace(tmp_path_factory.mktemp("calm"))
    for stage in (select, calibrate, apply):
        stage.run(recipe, workspace)
    return workspace


def stages(workspace, recipe):
    """Each long pass, from the calm chain's artifacts."""
    folder = workspace.folder

    def source(name):
        return str(folder / f"{name}-001.json")

    return {
        "features": lambda where, **options: select.run(recipe, where, **options),
        "threshold": lambda where, **options: calibrate.run(recipe, where, source=source("features"), **options),
        "eval": lambda where, **options: evaluate.run(recipe, where, sources=[source("guardrail")], **options),
        "attack": lambda where, **options: attack.run(
            recipe, where, ["dilution"], sources=[source("guardrail")], **options
        )[0],
    }


class Interrupting:
    """A progress report that sends a signal at its n-th call."""

    def __init__(self, n, number=signal.SIGTERM):
        self.left, self.number, self.calls = n, number, 0

    def __call__(self, _what, _done, _total):
        self.calls += 1
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)


def found(stored, workspace):
    """What a stage found, without time and place."""
    data = json.loads(stored.path.read_text())
    kept = {
        key: value
        for key, value in data.items()
        if key not in ("id", "created", "seconds", "peak_memory_mb", "sha256", "files", "inputs")
    }
    side = stored.path.with_suffix(".safetensors")
    return kept, workspace.tensors(stored) if side.exists() else {}


@pytest.mark.parametrize("kind", ["features", "threshold", "eval", "attack"])
def test_an_interrupted_pass_goes_on_bit_for_bit(kind, calm, recipe, tmp_path):
    run = stages(calm, recipe)[kind]
    counted = Interrupting(0)
    reference = Workspace(tmp_path / "reference")
    expected = found(run(reference, options=RunOptions(report=counted)), reference)
    assert counted.calls >= 3
    workspace = Workspace(tmp_path / "ws")
    for n in (1, counted.calls // 2):
        with pytest.raises(Signalled) as stopped:
            run(workspace, options=RunOptions(resume=True, report=Interrupting(n)))
        assert stopped.value.number == signal.SIGTERM and stopped.value.is_kept
        assert workspace.ids() == [] and [one.state for one in verify.verify_all(workspace)] == ["unfinished"]
    said = []
    last = Interrupting(0)
    stored = run(workspace, options=RunOptions(resume=True, report=last, say=said.append))
    assert said == ["Going on from the checkpoint."] and last.calls < counted.calls
    values, tensors = found(stored, workspace)
    assert values == expected[0] and tensors.keys() == expected[1].keys()
    assert all(torch.equal(tensors[name], expected[1][name]) for name in tensors)
    assert not list(workspace.folder.glob(".*.checkpoint"))


def test_a_checkpoint_belongs_to_one_setting_of_one_chain(calm, recipe, tmp_path):
    workspace = Workspace(tmp_path)
    with pytest.raises(Signalled):
        select.run(recipe, workspace, options=RunOptions(report=Interrupting(2)))
    said = []
    other = load_recipe("lab", sets=[*SETS, "select.n_features=9"])
    select.run(other, workspace, options=RunOptions(resume=True, say=said.append))
    assert said == ["No checkpoint of this run; it begins anew."]
    assert len(list(workspace.folder.glob(".features-*.checkpoint"))) == 1  # Of the interrupted one, still.


def test_without_resume_a_run_begins_anew(calm, recipe, tmp_path):
    workspace = Workspace(tmp_path)
    with pytest.raises(Signalled):
        select.run(recipe, workspace, options=RunOptions(report=Interrupting(2)))
    whole, again = Interrupting(0), Interrupting(0)
    select.run(recipe, Workspace(tmp_path / "other"), options=RunOptions(report=whole))
    select.run(recipe, workspace, options=RunOptions(report=again))
    assert again.calls == whole.calls and not list(workspace.folder.glob(".*.checkpoint"))


def test_entries_survive_with_their_tensors_and_numbers(tmp_path):
    path = tmp_path / ".features-0.checkpoint"
    checkpoint = Checkpoint(path)
    checkpoint.keep("a/1", {"n": 3, "scores": [[0, -1.5e-300, True, None]], "sums": torch.arange(3.0).double()})
    checkpoint.keep("b", {"sums": torch.zeros(0)})
    checkpoint.write()
    again = Checkpoint(path, resume=True)
    assert again.resumed and again.entry("c") is None
    assert again.entry("a/1")["scores"] == [[0, -1.5e-300, True, None]] and again.entry("b")["sums"].shape == (0,)
    assert torch.equal(again.entry("a/1")["sums"], torch.arange(3.0).double())
    assert not Checkpoint(path).resumed
    again.remove()
    assert not path.exists()


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b[:80], lambda b: b"", lambda b: b[:-1] + b"x", lambda b: b"{}\n"]
)
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    path = tmp_path / ".features-0.checkpoint"
    checkpoint = Checkpoint(path)
    checkpoint.keep("a", {"n": 3, "sums": torch.zeros(2)})
    checkpoint.write()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DsgError, match="damaged"):
        Checkpoint(path, resume=True)
    with pytest.raises(DsgError, match="damaged"):
        read_entries(path)


def test_a_full_disk_ends_a_pass_with_one_message(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("DSG_CHECKPOINT_SECONDS", "0")
    checkpoint = Checkpoint(tmp_path / "c")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DsgError, match="cannot be written: No space left"):
        checkpoint.reached("a", lambda: {"n": 1})
    assert list(tmp_path.iterdir()) == []


def test_seconds_must_be_a_number(monkeypatch, tmp_path):
    monkeypatch.setenv("DSG_CHECKPOINT_SECONDS", "soon")
    with pytest.raises(DsgError, match="DSG_CHECKPOINT_SECONDS"):
        Checkpoint(tmp_path / "a.checkpoint")


def test_a_signal_waits_for_the_next_safe_point_and_a_second_does_not():
    done = []
    with pytest.raises(Signalled) as stopped, at_safe_points():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("the rest of the batch")
        safe_point()
        done.append("never")
    assert stopped.value.number == signal.SIGINT and done == ["the rest of the batch"]
    with pytest.raises(Signalled), at_safe_points():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("once more")
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("never")
    assert done[1:] == ["once more"]
    with pytest.raises(Signalled), at_safe_points():
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Signalled):
        os.kill(os.getpid(), signal.SIGINT)
    safe_point()
