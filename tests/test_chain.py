"""The five commands one after another, on the lab and on a user's own folders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import SMALL_LAB, python, write_task

SCRIPT = """
set -euo pipefail
export DSG_WORKSPACE=ws
features=$($DSG select $SMALL --json | $GET id)
threshold=$($DSG calibrate --from "$features" $SMALL --json | $GET id)
guardrail=$($DSG apply --from "$threshold" $SMALL --json | $GET id)
$DSG eval --from "$guardrail" --bench lab-hexes --bench lab-near --expect 'lab-hexes<=0.30' --json > eval.json
$DSG attack --from "$guardrail" --kind dilution --kind relearn $SMALL --set 'attack.relearn_steps=[0, 4]' \
  --set 'attack.dilution_lengths=[0, 16]' --json > attacks.json
code=0; $DSG eval --bench lab-hexes --expect 'lab-hexes>0.9' --json > failed.json 2> failed.txt || code=$?
test "$code" = 3
test "$($DSG ls | wc -l)" = 7
code=0; $DSG show eval-009 2> error.txt || code=$?
test "$code" = 1
"""


def test_the_lab_recipe_reaches_its_targets(dsg, tmp_path):
    """The demo: one JSON document, artifacts that verify, and numbers on test questions."""
    code, out, err = dsg("demo", "--json", "-w", "ws")
    assert code == 0 and err == "", err
    summary = json.loads(out)
    accuracy = {bench: sides["unlearned"]["acc"] for bench, sides in summary["results"].items()}
    base = {bench: sides["base"]["acc"] for bench, sides in summary["results"].items()}
    assert min(base.values()) >= 0.97
    assert accuracy["lab-hexes"] <= 0.30
    assert accuracy["lab-near"] >= 0.95 * base["lab-near"]
    assert accuracy["lab-far"] >= 0.98 * base["lab-far"]
    assert summary["gate_rate"]["lab-hexes"] >= 0.95 and summary["gate_rate"]["lab-far"] <= 0.05
    assert summary["false_positive_rate"] <= 0.10
    dilution, relearn = (summary["attacks"][kind]["curve"] for kind in ("dilution", "relearn"))
    assert dilution[0]["unlearned"]["forget_acc"] == accuracy["lab-hexes"]
    assert relearn[0]["unlearned"]["forget_acc"] == accuracy["lab-hexes"]
    assert dilution[-1]["unlearned"]["forget_acc"] <= 0.35
    assert summary["artifacts"] == [
        "features-001", "threshold-001", "guardrail-001", "eval-001", "attack-001", "attack-002",
    ]  # fmt: skip
    for artifact in summary["artifacts"]:
        code, out, _ = dsg("show", artifact, "-w", "ws", "--json")
        header = json.loads(out)
        assert code == 0 and header["id"] == artifact and header["model"]["source"] == "lab"
        assert header["packages"]["torch"] and header["seconds"] > 0
        assert header["sae"]["hook"] == "blocks.1.hook_resid_post"
        assert dsg("show", artifact, "-w", "ws")[0] == 0
    assert {path.name for path in (tmp_path / "ws").glob("*-001.*") if path.suffix != ".json"} == {
        *(f"{kind}-001.safetensors" for kind in ("features", "guardrail", "eval")),
        *(f"{kind}-001.jsonl" for kind in ("threshold", "eval")),
    }
    rows = [json.loads(line) for line in (tmp_path / "ws/eval-001.jsonl").read_text().splitlines()]
    assert len(rows) == 48 * 7
    assert not any(" " in value for row in rows for value in row.values() if isinstance(value, str))
    assert (tmp_path / "ws/guardrail-001.safetensors").stat().st_size < 400_000

    # A table off the terminal too; --reuse runs nothing twice.
    code, out, _ = dsg("run", "lab", "-w", "ws", "--reuse")
    assert code == 0 and "(to forget)" in out and "Artifacts in ws: features-001, threshold-001" in out
    assert dsg("ls", "-w", "ws")[1].split() == summary["artifacts"]
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.slow
def test_the_papers_gate_is_diluted(dsg):
    """Its weakness, measured: what the default gate is there for."""
    code, out, err = dsg("run", "lab-paper", *SMALL_LAB[2:], "--set", "eval.benches=[lab-hexes]", "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert summary["gate"] == "mean" and summary["results"]["lab-hexes"]["unlearned"]["acc"] <= 0.30
    assert summary["attacks"]["dilution"]["curve"][-1]["unlearned"]["forget_acc"] > 0.9


@pytest.fixture
def my_bench(tmp_path):
    """A user's own lm-eval task over the words of the tiny tokenizer."""
    rows = [{"q": f"w{i} w{i + 1} w{i + 2}", "c": ["w50", "w51 w1", "w52"], "a": i % 3} for i in range(24)]
    return write_task(tmp_path / "tasks", rows)["include_path"]


def test_folders_of_my_own(dsg, folders, my_bench, tmp_path):
    model, sae = ("--model", folders["model"]), ("--sae", folders["sae"])
    corpora = ("--forget", folders["forget.txt"], "--retain", folders["retain.jsonl"])
    code, out, err = dsg("select", *model, *sae, *corpora, "-n", 4, "--ratio-percentile", 60, "--json")
    assert code == 0, err
    features = json.loads(out)
    scores = [feature["forget_score"] for feature in features["features"]]
    assert len(scores) == 4 and scores == sorted(scores, reverse=True)
    # A later command runs from another folder: sources are absolute.
    assert features["model"]["source"] == str(folders["model"])

    code, out, err = dsg("calibrate", "--gate", "mean", "--alpha", 0.2, "--lengths", "4:16", "--json")
    assert code == 0, err
    threshold = json.loads(out)
    assert threshold["n_calibration"] > 20 and threshold["inputs"][0]["id"] == "features-001"
    assert threshold["low"] <= threshold["false_positive_rate"] <= threshold["high"]
    rows = [json.loads(line) for line in (tmp_path / "dsg-workspace/threshold-001.jsonl").read_text().splitlines()]
    calibration = [row for row in rows if row["part"] == "calibrate"]
    assert len(calibration) == threshold["n_calibration"]
    assert sum(row["statistic"] > threshold["threshold"] for row in calibration) <= 0.2 * len(calibration)
    assert all(4 <= row["length"] <= 16 for row in rows if row["part"] != "long")
    assert [row["gated"] for row in rows] == [row["statistic"] > threshold["threshold"] for row in rows]

    # Settings that change what is computed are part of what --reuse compares.
    again = ("calibrate", "--gate", "mean", "--alpha", 0.2, "--lengths", "4:16", "--reuse")
    assert dsg(*again)[1] == "threshold-001\n"
    assert dsg(*again, "--set", "corpora.limit=70")[1] == "threshold-002\n"
    code, out, err = dsg("apply", "--from", "threshold-001", "--strength", "30")
    assert (code, out) == (0, "guardrail-001\n"), err
    # A threshold holds all that apply needs, wherever its features lie.
    elsewhere = ("--from", "dsg-workspace/features-001.json", "-w", "other")
    assert dsg("calibrate", *elsewhere, "--alpha", 0.2, "--gate", "mean")[0] == 0
    assert dsg("apply", "-w", "other")[1] == "guardrail-001\n"
    code, out, err = dsg("eval", "--bench", "mine", "--include-path", my_bench, "--json")
    assert code == 0, err
    assert json.loads(out)["results"]["mine"]["unlearned"]["n"] == 24
    attack = ("attack", "--kind", "dilution", "--bench", "mine", "--set", f"eval.include_path={my_bench}", "--json")
    sets = ("--set", "attack.dilution_lengths=[0, 8]", "--set", "attack.relearn_steps=[0, 2]")
    code, out, err = dsg(*attack, "--kind", "relearn", *sets)
    assert code == 0, err
    assert [document["attack"] for document in json.loads(out)] == ["dilution", "relearn"]
    expected = ("--expect", "dilution<=1", "--expect", "dilution<0", "--summary", "page.md")
    code, out, err = dsg(*attack, "--set", "attack.dilution_lengths=[0]", *expected)
    report = json.loads(out)
    # The random model answers at chance: what cannot be measured does not count as withstood.
    is_measurable = report["summary"]["n_measurable"] > 0
    assert code == 3 and "dilution<0" in err and [each["met"] for each in report["expected"]] == [is_measurable, False]
    assert "dilution<0" in (tmp_path / "page.md").read_text()


def test_the_same_seed_gives_the_same_features_and_threshold(dsg, folders):
    for _ in range(2):
        arguments = ("--model", folders["model"], "--sae", folders["sae"], "-n", 4, "--ratio-percentile", 60)
        assert dsg("select", *arguments, "--forget", folders["forget.txt"], "--retain", folders["retain.txt"])[0] == 0
        assert dsg("calibrate", "--alpha", 0.2, "--gate", "mean")[0] == 0
    documents = {name: json.loads(dsg("show", name, "--json")[1]) for name in dsg("ls")[1].split()}
    assert documents["features-001"]["features"] == documents["features-002"]["features"]
    digests = [[*documents[f"features-00{i}"]["files"].values()] for i in (1, 2)]
    assert digests[0] == digests[1]
    assert documents["threshold-001"]["threshold"] == documents["threshold-002"]["threshold"]


@pytest.mark.slow
def test_a_shell_script_chains_by_json_and_exit_codes(tmp_path):
    get = f'{sys.executable} -c "import json, sys; print(json.load(sys.stdin)[sys.argv[1]])"'
    environment = os.environ | {"DSG": f"{sys.executable} -m dsg_cli", "SMALL": " ".join(SMALL_LAB)}
    script = SCRIPT.replace("$GET", get)
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "check": False}
    done = subprocess.run(["bash", "-c", script], **options)
    assert done.returncode == 0, done.stderr
    met, attacks, failed = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("eval", "attacks", "failed")
    )
    assert met["expected"][0]["met"] is True and len(attacks) == 2 and failed["expected"][0]["met"] is False
    assert (tmp_path / "failed.txt").read_text().startswith("acting: guardrail-001 (dsg)\nnot met")
    assert "There is no artifact eval-009" in (tmp_path / "error.txt").read_text()


@pytest.mark.slow
def test_a_signal_leaves_only_whole_artifacts(tmp_path):
    """Between the stages of a run; test_processes has both signals, within a stage."""
    command = [sys.executable, "-m", "dsg_cli", "run", "lab", *SMALL_LAB[2:], "-w", "ws"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "ws/features-001.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped" in err and "Traceback" not in err
    assert not [path for path in (tmp_path / "ws").iterdir() if path.suffix in {".tmp", ".partial"}]
    assert (
        json.loads(python("-m", "dsg_cli", "ls", "-w", "ws", "--json", cwd=tmp_path).stdout)[0]["id"] == "features-001"
    )
