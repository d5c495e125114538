"""Several commands on one workspace at once, writers that are killed, and a workspace that can only be read."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SMALL_LAB
from test_workspace import BODY, HEADER, ROWS, TENSORS

from dsg_cli.stages import verify
from dsg_cli.workspace import Workspace

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
    findings = verify.run(workspace)
    assert len(findings) == N * N and {finding.state for finding in findings} == {"ok"} and not is_locked(workspace)


@pytest.mark.parametrize("moment", ["before the JSON file", "after it"])
def test_a_writer_killed_with_the_lock_in_its_hand_stops_nobody(tmp_path, monkeypatch, moment):
    from dsg_cli import committing

    workspace = Workspace(tmp_path / "ws")
    workspace.write(HEADER, BODY)
    real = committing.write_atomically

    def wait(path, content):
        if path.suffix != ".json" or moment == "after it":
            real(path, content)
        if path.suffix == ".json":
            (tmp_path / "there").touch()
            time.sleep(600)

    monkeypatch.setattr(committing, "write_atomically", wait)
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
    assert {finding.state for finding in verify.run(workspace)} == {"ok"}


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
def test_eight_commands_at_once(tmp_path):
    def dsg(*words):
        return subprocess.Popen(
            [sys.executable, "-m", "dsg_cli", *words],
            cwd=tmp_path, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    for command in ("select", "calibrate"):
        assert dsg(command, *SMALL_LAB).wait() == 0
    running = [dsg("apply", "--recipe", "lab") for _ in range(N)]
    printed = [process.communicate()[0].strip() for process in running]
    assert [process.returncode for process in running] == [0] * N
    assert sorted(printed) == [f"guardrail-{i:03d}" for i in range(1, N + 1)]
    workspace = Workspace(tmp_path / "dsg-workspace")
    assert {finding.state for finding in verify.run(workspace)} == {"ok"} and not is_locked(workspace)
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

    monkeypatch.setattr("dsg_cli.stages.verify.run", exhaust)
    code, out, err = dsg("verify")
    assert (code, out) == (1, "") and err.startswith("error: There is not enough memory") and "corpora.limit" in err
    message = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"
    monkeypatch.setattr("dsg_cli.stages.verify.run", lambda *_: (_ for _ in ()).throw(RuntimeError(message)))
    assert dsg("verify")[0] == 1
