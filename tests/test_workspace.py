"""Numbering, atomic writes and verified reads."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL_LAB
from handmade import header, made

from dsg_cli.errors import DsgError
from dsg_cli.report.gather import gather
from dsg_cli.report.tables import artifact_table, headline
from dsg_cli.stages.composition import find_composition
from dsg_cli.workspace import provenance, store
from dsg_cli.workspace.artifacts import (
    KINDS,
    Guardrail,
    ModelWeights,
    Wrapper,
    artifact_digest,
    parse_document,
    to_json,
)
from dsg_cli.workspace.files import KIND_NAMES, write_atomically
from dsg_cli.workspace.store import Workspace

BODY, HEADER = made(Guardrail), header()
SETS = ("--set", "attack.dilution_lengths=[0]", "--set", "eval.limit=2")
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


def test_the_newest_is_what_was_done_last_by_what_it_says(workspace, tmp_path):
    """Not by the times of files, which a copy has of its own, nor by the order in which they were written."""
    for second, seconds in ((3, 1.0), (5, 0.0), (2, 2.5), (4, 1.0)):
        workspace.write(HEADER.replace(created=f"2026-01-01T00:00:0{second}+00:00", seconds=seconds), BODY)
    copy = Workspace(shutil.copytree(workspace.folder, tmp_path / "copy"))
    for age, path in enumerate(sorted(copy.folder.glob("*.json"))):
        os.utime(path, (10**9 - age, 10**9 - age))
    for one in (workspace, copy):
        assert one.newest(["guardrail"]) == find_composition(one, []).named[0].id == "guardrail-004"
        assert one.find("guardrail").id == "guardrail-004" and one.newest(["eval"]) is None
    copy.write(header("wrapper", created="2026-01-01T00:00:06+00:00"), made(Wrapper))
    assert copy.newest(["guardrail", "wrapper"]) == gather(copy, []).artifacts[-1].id == "wrapper-001"
    (copy.folder / "guardrail-003.json").write_text("{")
    with pytest.raises(DsgError, match="guardrail-003"):  # It may be the newest: nothing else acts in its place.
        find_composition(copy, [])


def test_a_newer_model_that_was_finetuned_does_not_act(workspace):
    settings = {"forget": [], "retain": []}
    finetuned = header("model", created="2026-01-02T00:00:00+00:00", settings=settings)
    workspace.write(finetuned, made(ModelWeights, method="finetune"))
    with pytest.raises(DsgError, match="has no guardrail yet"):
        find_composition(workspace, [])
    assert gather(workspace, []).artifacts[0].id == "model-001"  # Where there is nothing else, the report is about it.
    workspace.write(HEADER, BODY)
    said = []
    assert find_composition(workspace, [], said.append).named[0].id == gather(workspace, []).artifacts[0].id
    assert said == ["acting: guardrail-001 (dsg)"]
    workspace.write(finetuned, made(ModelWeights))
    assert workspace.newest(["guardrail", "model"]) == find_composition(workspace, []).named[0].id == "model-002"


@pytest.mark.parametrize(
    ("words", "acting"),
    [
        (("generate", "Hello", "--max-new-tokens", 1), "guardrail-001 (dsg)"),
        (("eval", "--bench", "lab-hexes", "--limit", 2, "--batch-size", 8), "guardrail-001 (dsg)"),
        (("attack", "--kind", "dilution", *SETS), "guardrail-001 (dsg)"),
        (("export", "guard.safetensors"), "guardrail-001 (dsg)"),
        (("inspect", "--prompt", "Hello"), "guardrail-001 (dsg)"),
    ],
)
def test_what_acts_unnamed_is_said(dsg, lab_copy, words, acting):
    code, _, err = dsg(*words, "-w", lab_copy)
    assert code == 0 and err.splitlines().count(f"acting: {acting}") == 1, err


def test_what_is_named_is_not_said_nor_what_is_to_be_quiet(dsg, lab_copy):
    for words in (("--from", "guardrail-001"), ("--quiet",)):
        assert "acting" not in dsg("generate", "Hello", "--max-new-tokens", 1, "-w", lab_copy, *words)[2]


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


@pytest.mark.parametrize("n_whole", [0, 1])
def test_a_failed_write_leaves_nothing(workspace, monkeypatch, n_whole):
    """Where the first file does not fit, and where only the JSON file does not."""
    workspace.write(HEADER, BODY)
    before, calls, real = sorted(workspace.folder.iterdir()), [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > n_whole:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DsgError, match="No space left"):
        workspace.write(HEADER, BODY, tensors=TENSORS)
    assert len(calls) == n_whole + 1 and sorted(workspace.folder.iterdir()) == before


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
    data["sha256"] = artifact_digest(data)
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

    stored = workspace.write(HEADER, BODY)
    later = HEADER.replace(created="2027-01-01T00:00:00+00:00", seconds=9.0)
    assert workspace.matching(later).id == stored.id
    for change in ({"settings": {}}, {"seed": 1}, {"packages": {"torch": "3"}}, {"inputs": []}, {"dtype": "bfloat16"}):
        assert workspace.matching(HEADER.replace(**change)) is None


def test_an_interrupt_after_the_json_file_is_there_keeps_the_artifact_whole(workspace, monkeypatch):
    """It is committed then: the next who writes to the workspace moves it to its place."""

    def interrupted(path, content):
        write_atomically(path, content)
        if path.suffix == ".json":
            raise KeyboardInterrupt

    monkeypatch.setattr(store, "write_atomically", interrupted)
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


DATA = Path(__file__).parent / "data"


def _all_but(kind):
    return lambda folder, names: [n for n in names if Path(folder).parent == DATA and not n.startswith(f"{kind}-")]


def test_kinds_are_known_by_name_without_what_they_hold():
    assert tuple(KINDS) == KIND_NAMES


@pytest.mark.parametrize("kind", KINDS)
def test_every_schema_of_every_kind_is_kept_and_reads(kind, tmp_path):
    for schema in range(1, KINDS[kind].schema_number + 1):
        workspace = Workspace(tmp_path / str(schema))
        # Alone: those of one schema are not all of one chain.
        shutil.copytree(DATA / f"schema-{schema}", workspace.folder, ignore=_all_but(kind))
        stored = workspace.find(kind)
        assert stored.header.kind == kind and isinstance(stored.body, KINDS[kind])
        assert headline(stored) and artifact_table(stored)
        if stored.path.with_suffix(".safetensors").exists():
            assert workspace.tensors(stored)


def test_sides_of_an_attack_had_other_names():
    data = json.loads((DATA / "schema-3" / "attack-001.json").read_text())
    body = parse_document(data, where="it")[1]
    assert body.before == {"unlearned": data["before"]["guarded"], "base": data["before"]["unguarded"]}
    assert [point["unlearned"] for point in body.curve] == [point["guarded"] for point in data["curve"]]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        *(({"threshold": value}, "threshold") for value in ("0.3", True, None, 10**400)),
        *(({"window": value}, "window") for value in ("0", 1.0, 2**63, True)),
        *(({"indices": value}, "indices") for value in (1, ["1"], {"0": 1})),
        ({"seed": "0"}, "seed"),
        ({"strength_setting": 2}, "strength_setting"),
        ({"inputs": [{"id": "features-001"}]}, "inputs.0.sha256"),
        ({"git": {"commit": "x"}}, "git"),
        ({"slice": {"activation": "topk", "other": 1}}, "slice.other"),
        (
            {"strength_trials": [{"strength": "1", "setting": "r", "acc": 0, "gate_rate": 0}]},
            "strength_trials.0.strength",
        ),
    ],
)
def test_what_no_version_writes_is_refused_by_its_name(change, name):
    """Nothing is converted: a string is no number, and a number no string."""
    with pytest.raises(DsgError, match=f"it is not an artifact of dsg: {name}"):
        parse_document(to_json(HEADER, BODY) | change, where="it")


def test_settings_that_later_stages_read_are_checked():
    data = to_json(header("model", settings={"forget": [], "retain": [{"name": "a"}]}), made(ModelWeights))
    with pytest.raises(DsgError, match="settings.retain.0.sha256"):
        parse_document(data, where="it")


N = 8
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def forked(work):
    """Run in a child process; its number."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except BaseException:
        os._exit(70)
    os._exit(0)


def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def is_locked(workspace):
    with (workspace.folder / ".lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def test_eight_processes_write_eight_artifacts_each(tmp_path):
    workspace = Workspace(tmp_path / "ws")

    def write():
        for _ in range(N):
            workspace.write(HEADER, BODY, tensors=TENSORS, rows=ROWS, folder={"a/b.txt": b"x"})

    for pid in [forked(write) for _ in range(N)]:
        assert ended(pid) == 0
    assert workspace.ids() == [f"guardrail-{i:03d}" for i in range(1, N * N + 1)]
    verdicts = store.verify_all(workspace)
    assert len(verdicts) == N * N and {verdict.state for verdict in verdicts} == {"ok"} and not is_locked(workspace)


@pytest.mark.parametrize("moment", ["before the JSON file", "after it"])
def test_a_writer_killed_with_the_lock_in_its_hand_stops_nobody(tmp_path, monkeypatch, moment):
    workspace = Workspace(tmp_path / "ws")
    workspace.write(HEADER, BODY)

    def wait(path, content):
        if path.suffix != ".json" or moment == "after it":
            write_atomically(path, content)
        if path.suffix == ".json":
            (tmp_path / "there").touch()
            time.sleep(600)

    monkeypatch.setattr(store, "write_atomically", wait)
    pid = forked(lambda: workspace.write(HEADER, BODY, tensors=TENSORS))
    while not (tmp_path / "there").exists():
        time.sleep(0.01)
    monkeypatch.undo()
    assert is_locked(workspace) and workspace.ids() == ["guardrail-001"]  # Nothing half-written is to be seen.
    assert workspace.read("guardrail-001").body == BODY  # Nobody waits who only reads.
    os.kill(pid, signal.SIGKILL)
    assert ended(pid) == -signal.SIGKILL and not is_locked(workspace)
    last = workspace.write(HEADER, BODY, tensors=TENSORS)
    n = 3 if moment == "after it" else 2  # What was committed is finished; what was not is gone.
    assert last.id == f"guardrail-{n:03d}" and len(workspace.ids()) == n
    assert {verdict.state for verdict in store.verify_all(workspace)} == {"ok"}


def test_readers_never_see_half_an_artifact(tmp_path):
    workspace = Workspace(tmp_path / "ws")
    workspace.write(HEADER, BODY)

    def write():
        for _ in range(60):
            workspace.write(HEADER, BODY, tensors=TENSORS, rows=ROWS)

    pid, n_read = forked(write), 0
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        workspace.find("guardrail")
        n_read += 1
    assert n_read > 10 and len(workspace.ids()) == 61


@pytest.mark.slow
def test_eight_commands_at_once(dsg, tmp_path):
    def start(*words):
        return subprocess.Popen(
            [sys.executable, "-m", "dsg_cli", *words],
            cwd=tmp_path, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    for command in ("select", "calibrate"):
        assert dsg(command, *SMALL_LAB)[0] == 0
    running = [start("apply", "--recipe", "lab") for _ in range(N)]
    printed = [process.communicate()[0].strip() for process in running]
    assert [process.returncode for process in running] == [0] * N
    assert sorted(printed) == [f"guardrail-{i:03d}" for i in range(1, N + 1)]
    workspace = Workspace(tmp_path / "dsg-workspace")
    assert {verdict.state for verdict in store.verify_all(workspace)} == {"ok"} and not is_locked(workspace)
    assert len({workspace.read(name).header.files[f"{name}.safetensors"] for name in printed}) == 1


def in_own_mounts(script, folder):
    """A shell script that may mount things, which nobody else sees; skips where the system does not allow it."""
    run = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-euc"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*run, "mount -t tmpfs none /mnt"], capture_output=True).returncode
    ):
        pytest.skip("this machine lets nobody mount a file system of his own")
    return subprocess.run(
        [*run, script], cwd=folder, capture_output=True, text=True, check=False,
        env=ENVIRONMENT | {"DSG": f"{sys.executable} -m dsg_cli", "SMALL": " ".join(SMALL_LAB)},
    )  # fmt: skip


def test_a_workspace_that_can_only_be_read(tmp_path):
    kept = Path(__file__).parent / "data" / "schema-1"
    shutil.copytree(kept, tmp_path / "ws")
    done = in_own_mounts(
        """
        mount --bind ws ws
        mount -o remount,ro,bind ws
        if touch ws/x 2> /dev/null; then exit 9; fi
        $DSG ls -w ws
        $DSG show eval-001 -w ws > shown
        $DSG verify -w ws > verified
        status=0; $DSG apply -w ws || status=$?
        exit $((status + 20))
        """,
        tmp_path,
    )
    if done.returncode == 9:
        pytest.skip("this machine cannot make a folder that can only be read")
    assert done.returncode == 21, done.stderr
    assert done.stdout.split() == Workspace(kept).ids()
    assert "The workspace ws cannot be written to" in done.stderr and "--workspace" in done.stderr
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_full_disk(tmp_path):
    """A stage whose artifact does not fit says so and leaves nothing; with room it succeeds."""
    done = in_own_mounts(
        """
        mkdir small
        mount -t tmpfs -o size=4m tmpfs small
        cat /dev/zero > small/ballast 2> /dev/null || true
        status=0; $DSG select $SMALL -w small/ws --quiet || status=$?
        ls -A small/ws | grep -v '^.lock$' > left || true
        truncate -s 3000000 small/ballast
        $DSG select $SMALL -w small/ws --quiet
        $DSG verify -w small/ws > verified
        cat /dev/zero > small/more 2> /dev/null || true
        export DSG_CHECKPOINT_SECONDS=0
        second=0; $DSG calibrate $SMALL -w small/ws --quiet || second=$?
        ls -A small/ws > then
        rm small/more small/ballast
        $DSG calibrate $SMALL -w small/ws --quiet --resume
        $DSG verify -w small/ws > verified
        exit $((status * 10 + second + 20))
        """,
        tmp_path,
    )
    assert done.returncode == 31, done.stderr
    assert done.stdout.split() == ["features-001", "threshold-001"] and (tmp_path / "left").read_text() == ""
    assert done.stderr.count("error:") == 2 and done.stderr.count("No space left") == 2, done.stderr
    assert "Traceback" not in done.stderr and "broken" not in (tmp_path / "verified").read_text()
    assert sorted((tmp_path / "then").read_text().split()) == [".lock", "features-001.json", "features-001.safetensors"]


def test_no_memory_is_said_in_one_message(dsg, monkeypatch):
    def exhaust(*_arguments, **_options):
        raise MemoryError

    monkeypatch.setattr("dsg_cli.workspace.store.verify_all", exhaust)
    code, out, err = dsg("verify")
    assert (code, out) == (1, "") and err.startswith("error: There is not enough memory") and "corpora.limit" in err
    message = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"
    monkeypatch.setattr("dsg_cli.workspace.store.verify_all", lambda *_: (_ for _ in ()).throw(RuntimeError(message)))
    assert dsg("verify")[0] == 1
