"""Numbering, atomic writes and verified reads."""

import json
import os
import subprocess
import threading

import pytest
import torch
from dsg_cli.artifacts import Guardrail, Header, InputArtifact, ModelIdentity
from dsg_cli.integrity import digest_of

from dsg_cli.errors import DsgError
from dsg_cli.workspace import Workspace

BODY = Guardrail(
    indices=[1, 2],
    detectors=[],
    bias=0.0,
    clip=0.0,
    gate="mean",
    window=0,
    threshold=0.1 + 0.2,
    strength=1e-3,
    strength_setting="2r",
    median_residual_norm=3.0,
    hook="blocks.1.hook_resid_post",
    hook_out="blocks.1.hook_resid_post",
    slice={"activation": "threshold"},
    activation="jumprelu",
    special_ids=[0, 1],
    bos=None,
    forget=["a"],
    retain=["b"],
    strength_trials=[],
    effect={},
    method="dsg",
    clamp="all",
    coefficients=[],
    above=[],
)
HEADER = Header(
    kind="guardrail",
    schema=5,
    id="",
    created="2026-01-01T00:00:00+00:00",
    dsg_version="0",
    git={},
    packages={"torch": "2"},
    device="cpu",
    dtype="float32",
    seed=0,
    settings={"strength": "2r"},
    model=ModelIdentity("lab", "X", 4, 8, 1, "f"),
    sae=None,
    inputs=[InputArtifact("threshold-001", "0" * 64)],
)
TENSORS = {"W": torch.arange(6.0).reshape(2, 3)}
ROWS = [{"id": "x", "value": 0.1}, {"id": "y", "value": None}]


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "ws")


def test_write_then_read_is_equality(workspace):
    written = workspace.write(HEADER, BODY, tensors=TENSORS, rows=ROWS)
    read = workspace.read("guardrail-001")
    assert read == written and read.body == BODY
    assert [json.loads(line) for line in written.path.with_suffix(".jsonl").read_text().splitlines()] == ROWS
    assert torch.equal(workspace.tensors(read)["W"], TENSORS["W"])
    assert workspace.read(str(written.path)).id == "guardrail-001"
    names = {path.name for path in workspace.folder.iterdir()}
    assert names == {".lock", *(f"guardrail-001.{end}" for end in ("json", "safetensors", "jsonl"))}


def test_numbers_follow_and_the_newest_is_found(workspace):
    for _ in range(3):
        workspace.write(HEADER, BODY)
    assert workspace.ids() == ["guardrail-001", "guardrail-002", "guardrail-003"]
    assert workspace.find("guardrail").id == "guardrail-003"
    assert workspace.find("guardrail", "guardrail-002").id == "guardrail-002"
    with pytest.raises(DsgError, match="is not of the kind features"):
        workspace.find("features", "guardrail-001")
    with pytest.raises(DsgError, match="dsg calibrate"):
        workspace.find("threshold")
    with pytest.raises(DsgError, match="There is no artifact guardrail-009"):
        workspace.read("guardrail-009")
    with pytest.raises(DsgError, match="There is no artifact"):
        workspace.read("../guardrail-001")


def test_numbers_beyond_999_and_of_other_kinds(workspace):
    workspace.folder.mkdir()
    (workspace.folder / "guardrail-999.json").write_text("{}")
    (workspace.folder / "eval-5000.json").write_text("{}")
    (workspace.folder / "notes.json").write_text("{}")
    assert workspace.write(HEADER, BODY).id == "guardrail-1000"
    assert workspace.ids("guardrail") == ["guardrail-999", "guardrail-1000"]


def test_two_writers_at_once_get_two_numbers(workspace):
    ids, errors = [], []

    def write():
        try:
            for _ in range(5):
                ids.append(workspace.write(HEADER, BODY, tensors=TENSORS).id)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and sorted(ids) == [f"guardrail-{i:03d}" for i in range(1, 41)]
    for artifact_id in ids:
        workspace.read(artifact_id)


def test_a_failed_write_leaves_nothing(workspace, monkeypatch):
    workspace.write(HEADER, BODY)
    before = sorted(workspace.folder.iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DsgError, match="No space left"):
        workspace.write(HEADER, BODY, tensors=TENSORS)
    assert sorted(workspace.folder.iterdir()) == before


def test_a_write_that_fails_between_side_file_and_json_leaves_nothing(workspace, monkeypatch):
    calls = []
    real = os.fsync

    def second_fails(descriptor):
        calls.append(descriptor)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return real(descriptor)

    monkeypatch.setattr(os, "fsync", second_fails)
    with pytest.raises(DsgError, match="No space left"):
        workspace.write(HEADER, BODY, tensors=TENSORS)
    assert [path.name for path in workspace.folder.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: p.write_text(p.read_text().replace('"2r"', '"9r"')), "was altered"),
        (lambda p: p.write_text(p.read_text()[:-40]), "is not an artifact"),
        (lambda p: p.write_text("[]"), "is not an artifact"),
        (lambda p: p.write_text(p.read_text().replace('"schema": 5', '"schema": "x"')), "is not an artifact"),
        (lambda p: p.write_text(p.read_text().replace("0.001", "NaN")), "is not an artifact"),
        (lambda p: p.rename(p.with_name("guardrail-002.json")), "was renamed: it is guardrail-001"),
        (lambda p: p.with_suffix(".safetensors").write_bytes(b"x"), "safetensors was altered"),
        (lambda p: p.with_suffix(".safetensors").unlink(), "is incomplete"),
    ],
)
def test_damage_is_named(workspace, damage, words):
    stored = workspace.write(HEADER, BODY, tensors=TENSORS)
    damage(stored.path)
    with pytest.raises(DsgError, match=words):
        workspace.find("guardrail")


def test_a_newer_schema_is_refused_with_both_numbers(workspace):
    stored = workspace.write(HEADER, BODY)
    data = json.loads(stored.path.read_text()) | {"schema": 7}
    data["sha256"] = digest_of(data)
    stored.path.write_text(json.dumps(data))
    with pytest.raises(DsgError, match="schema 7; this version reads up to 5"):
        workspace.read(stored.id)


def test_an_unwritable_workspace_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DsgError, match="cannot be written to"):
        Workspace(tmp_path / "file").check_writable()
    with pytest.raises(DsgError, match="cannot be written to"):
        Workspace(tmp_path / "file" / "below").check_writable()


def test_reuse_needs_everything_to_match(workspace):
    from dataclasses import replace

    stored = workspace.write(HEADER, BODY)
    later = replace(HEADER, created="2027-01-01T00:00:00+00:00", seconds=9.0)
    assert workspace.matching(later).id == stored.id
    for change in ({"settings": {}}, {"seed": 1}, {"packages": {"torch": "3"}}, {"inputs": []}, {"dtype": "bfloat16"}):
        assert workspace.matching(replace(HEADER, **change)) is None


def test_floats_survive_exactly(workspace):
    workspace.write(HEADER, BODY)
    assert workspace.read("guardrail-001").body.threshold == 0.1 + 0.2


def test_an_interrupt_after_the_json_file_is_there_keeps_the_artifact_whole(workspace, monkeypatch):
    """It is committed then: the next who writes to the workspace moves it to its place."""
    from dsg_cli import committing as module

    real = module.write_atomically

    def interrupted(path, content):
        real(path, content)
        if path.suffix == ".json":
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_atomically", interrupted)
    with pytest.raises(KeyboardInterrupt):
        workspace.write(HEADER, BODY, tensors=TENSORS)
    assert workspace.ids() == []
    monkeypatch.undo()
    assert workspace.write(HEADER, BODY).id == "guardrail-002"
    assert workspace.read("guardrail-001").body == BODY


def test_a_damaged_artifact_is_no_obstacle_to_reuse(workspace):
    workspace.write(HEADER, BODY)
    damaged = workspace.write(HEADER, BODY)
    damaged.path.write_text("{")
    assert workspace.matching(HEADER).id == "guardrail-001"


def test_what_lies_in_the_checkout_is_no_change_of_the_code(tmp_path, monkeypatch):
    """Else a workspace or an export beside the package would make each artifact another one for `--reuse`."""
    from dsg_cli.stages import provenance

    code = tmp_path / "dsg_cli" / "stages" / "provenance.py"
    code.parent.mkdir(parents=True)
    code.write_text("a = 1\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "First"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(provenance, "__file__", str(code))
    first = provenance.git_state()
    assert len(first["commit"]) == 40 and first["dirty"] is False
    (tmp_path / "dsg-demo").mkdir()
    (tmp_path / "dsg-demo" / "eval-001.json").write_text("{}")
    assert provenance.git_state() == first
    code.write_text("a = 2\n")
    changed = provenance.git_state()
    assert changed["dirty"] and changed["commit"] == first["commit"]
    (code.parent / "new.py").write_text("")
    assert provenance.git_state()["changes_sha256"] != changed["changes_sha256"]
