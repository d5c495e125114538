"""Errors through main(): the exit code and the words a user needs; help without torch."""

import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import SMALL_LAB, make_sae, python

from dsg_cli import __version__
from dsg_cli.errors import DsgError

ROOT = Path(__file__).parent.parent


CODE = """
import sys
from dsg_cli.cli.app import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert not stop.code, stop.code
assert not {"torch", "transformers", "lm_eval"} & set(sys.modules), "heavy"
"""


def test_help_and_version_do_not_import_torch():
    for arguments in (["--help"], ["select", "--help"], ["--version"], ["ls", "benches"], ["ls"]):
        done = python("-c", CODE, *arguments)
        assert done.returncode == 0, done.stderr
    assert __version__ in python("-m", "dsg_cli", "--version").stdout


def test_names_are_listed_one_a_line(dsg):
    assert dsg("ls", "benches")[1].splitlines()[:2] == ["lab-hexes", "lab-hexes-held"]
    assert dsg("ls", "models")[1].splitlines() == ["lab", "lab-retrain", "lab-retrain-1"]
    assert json.loads(dsg("ls", "corpora", "--json")[1])[0] == "lab-hexes"
    code, _, err = dsg("ls", "bench")
    assert code == 1 and "Did you mean benches?" in err
    assert dsg("ls")[:2] == (0, "")


def select(folders, **changes):
    arguments = {
        "model": folders["model"],
        "sae": folders["sae"],
        "forget": folders["forget.txt"],
        "retain": folders["retain.txt"],
        "n-features": 4,
        "ratio-percentile": 60,
    } | {key.replace("_", "-"): value for key, value in changes.items()}
    return ["select", *(str(part) for key, value in arguments.items() for part in (f"--{key}", value))]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "nowhere"}, "No model folder at nowhere"),
        ({"model": "."}, "is not a Hugging Face model folder"),
        ({"sae": "nowhere"}, "There is no SAE"),
        ({"sae": "lab"}, "reads activations of width 128"),
        ({"forget": "lab-hexs"}, "Did you mean lab-hexes"),
        ({"forget": "tiny.txt"}, "2 different documents"),
        ({"forget": "empty.txt"}, "is empty"),
        ({"forget": "binary.txt"}, "not UTF-8 text"),
        ({"retain": "bad.jsonl"}, "line 1 is not JSON"),
        ({"n_features": 49}, "49 features were asked for; the SAE has 48"),
        ({"n_features": 0}, "select.n_features is 0"),
        ({"ratio_percentile": 100}, "select.ratio_percentile is 100"),
        ({"n_features": 40, "ratio_percentile": 90}, "features pass the filter"),
        ({"workspace": "tiny.txt"}, "cannot be written to"),
        ({"device": "cuda:7"}, "device cuda:7 is not available"),
        ({"dtype": "float8"}, "model.dtype must be one of"),
        ({"score": "fisher"}, "select.score must be one of"),
        ({"limit": 2}, "--limit 2 is too small"),
        ({"set": "select.n_feature=3"}, "unknown key select.n_feature. Did you mean n_features"),
        ({"recipe": "labb"}, "There is no recipe labb"),
    ],
)
def test_select_errors(dsg, folders, tmp_path, changes, words):
    (tmp_path / "tiny.txt").write_text("one\n\ntwo")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xfd" * 50)
    (tmp_path / "bad.jsonl").write_text("hello\n")
    code, out, err = dsg(*select(folders, **changes))
    assert code == 1 and out == ""
    assert err.startswith("error: ") and words in err and "Traceback" not in err, err
    assert len(err.strip().splitlines()) <= 3
    assert not list((tmp_path / "dsg-workspace").glob("*"))


def test_what_must_not_be_both(dsg, folders):
    code, _, err = dsg(*select(folders, retain=folders["forget.txt"]))
    assert code == 1 and "both to be forgotten and to be retained" in err


def test_errors_come_before_weights_are_loaded(dsg, folders, monkeypatch):
    """Bad corpora, benches and SAEs are found without loading a model: the loader is gone."""
    monkeypatch.setattr("dsg_cli.model.AutoModelForCausalLM", None)
    for arguments, words in (
        (select(folders, forget="no-such"), "no corpus or file"),
        (select(folders, sae="lab"), "width 128"),
        (["select", "--forget", "lab-hexes"], "No retain corpus is named"),
        (["calibrate"], "has no features yet"),
        (["eval", "--bench", "lab-hexes"], "has no guardrail yet"),
    ):
        code, _, err = dsg(*arguments)
        assert code == 1 and words in err, err
    code, _, err = dsg(*select(folders))
    assert code == 1 and "cannot be loaded" in err


def test_a_stage_without_its_input_names_the_command_that_makes_it(dsg):
    for command, maker in (
        (["calibrate"], "dsg select"),
        (["apply"], "dsg calibrate"),
        (["eval", "--bench", "lab-hexes"], "dsg apply"),
        (["attack", "--kind", "dilution"], "dsg apply"),
    ):
        code, _, err = dsg(*command)
        assert code == 1 and f"Make it with: {maker}" in err


@pytest.fixture
def chain(dsg, folders):
    """A workspace with a guardrail in it."""
    assert dsg(*select(folders))[0] == 0
    assert dsg("calibrate", "--alpha", 0.2, "--gate", "mean")[0] == 0
    assert dsg("apply")[0] == 0
    return Path("dsg-workspace")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["calibrate", "--alpha", "2"], "calibrate.alpha is 2"),
        (["calibrate", "--gate", "mean", "--alpha", "0.001"], "at least 999 are needed"),
        (["calibrate", "--lengths", "8-128"], "neither of the form 8:128 nor a file"),
        (["calibrate", "--lengths", "128:8"], "give the shortest and the longest"),
        (["calibrate", "--gate", "median"], "calibrate.gate must be one of probe"),
        (["calibrate", "--retain", "lab-hexs"], "Did you mean lab-hexes"),
        (["calibrate", "--from", "threshold-001"], "is not of the kind features"),
        (["apply", "--strength", "strong"], "not a positive number"),
        (["apply", "--strength", "-5"], "not a positive number"),
        (["apply", "--strength", "1e39"], "not a positive number"),
        (["apply", "--strength", "1e308r"], "not a positive number"),
        (["apply", "--from", "threshold-009"], "no artifact threshold-009"),
        (["eval"], "No bench is named"),
        (["eval", "--bench", "lab-hexs"], "Did you mean lab-hexes"),
        (["eval", "--bench", "lab-far", "--expect", "lab-near<1"], "which is not run"),
        (["eval", "--bench", "lab-far", "--batch-size", "0"], "at least 1"),
        (["attack"], "No attack is named"),
        (["attack", "--kind", "relern"], "Did you mean relearn"),
        (["attack", "--kind", "dilution", "--expect", "relearn<=0.3"], "which is not run"),
        (["attack", "--kind", "dilution", "--bench", "lab-far", "--expect", "dilution.f1<=0.3"], "has no metric f1"),
        (["attack", "--kind", "dilution", "--set", "attack.dilution_lengths=[]"], "attack.dilution_lengths is []"),
        (["attack", "--kind", "dilution"], "No bench is named like the forget corpus"),
        (["attack", "--kind", "relearn", "--bench", "lab-hexes", "--set", "attack.relearn_steps=[3, 1]"], "ascending"),
        (
            ["attack", "--kind", "relearn", "--bench", "lab-far", "--set", "attack.known_questions=999"],
            "144 questions",
        ),
        (["attack", "--kind", "relearn", "--bench", "lab-far", "--limit", "0"], "eval.limit is 0"),
    ],
)
def test_later_stage_errors(dsg, chain, arguments, words):
    before = sorted(chain.iterdir())
    code, out, err = dsg(*arguments)
    assert code == 1 and out == "" and words in err and "Traceback" not in err, err
    assert sorted(chain.iterdir()) == before


def test_a_gate_that_can_never_fire_is_an_error(dsg, folders):
    assert dsg(*select(folders, n_features=40, ratio_percentile=0))[0] == 0
    code, _, err = dsg("calibrate", "--alpha", "0.05", "--gate", "mean")
    assert code == 1 and "could never fire" in err and "--ratio-percentile" in err


def test_an_artifact_altered_by_hand_is_refused(dsg, chain):
    path = chain / "threshold-001.json"
    path.write_text(path.read_text().replace('"alpha": 0.2', '"alpha": 0.3'))
    code, _, err = dsg("apply")
    assert code == 1 and "was altered after it was written" in err


def test_a_model_or_sae_that_changed_is_refused(dsg, folders, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    mine = {name: tmp_path / name for name in ("model", "sae")}
    for name, path in mine.items():
        shutil.copytree(folders[name], path)
    assert dsg(*select(folders, **mine))[0] == 0
    weights = load_file(mine["model"] / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] += 1
    save_file(weights, mine["model"] / "model.safetensors", metadata={"format": "pt"})
    code, _, err = dsg("calibrate", "--alpha", 0.2, "--gate", "mean")
    assert code == 1 and "is not the one that features-001 was made with" in err
    config = mine["sae"] / "cfg.json"
    original = config.read_text()
    config.write_text(original.replace("blocks.1.", "blocks.0."))
    code, _, err = dsg("calibrate", "--alpha", 0.2, "--gate", "mean")
    assert code == 1 and "SAE" in err and "its configuration changed" in err
    make_sae(mine["sae"], seed=1)
    code, _, err = dsg("calibrate", "--alpha", 0.2, "--gate", "mean")
    assert code == 1 and "SAE" in err and "its weights changed" in err


def test_usage_errors_exit_2(dsg):
    assert dsg("select", "--no-such-flag")[0] == 2
    assert dsg("selct")[0] == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(dsg, folders, monkeypatch, number, code):
    from dsg_cli.stages import select as stage

    monkeypatch.setattr(stage, "load_model", lambda *_, **__: os.kill(os.getpid(), number))
    found, out, err = dsg(*select(folders))
    assert found == code and out == "" and "stopped" in err


def test_debug_lets_the_traceback_through(dsg, monkeypatch):
    monkeypatch.setenv("DSG_DEBUG", "1")
    with pytest.raises(DsgError, match="has no features yet"):
        dsg("calibrate")


def test_a_closed_pipe_is_no_traceback(tmp_path):
    script = f"{sys.executable} -m dsg_cli ls benches | head -1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout == "lab-hexes\n" and done.stderr == ""


def test_the_lab_is_exported_in_plain_formats(dsg, tmp_path):
    code, out, err = dsg("lab", "export", "lab")
    assert (code, out) == (0, "lab\n"), err
    names = {path.name for path in (tmp_path / "lab").iterdir()}
    folders = {"model", "retrain", "retrain-1", "sae", "sae-1", "sae-2", "corpora", "questions", "tasks"}
    assert names == {*folders, "training.json"}
    code, _, err = dsg("lab", "export", "lab")
    assert code == 1 and "not empty" in err
    (tmp_path / "empty").mkdir()
    assert dsg("lab", "export", "empty")[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"lab", "empty"}
    # Its parts are ordinary folders and files: the chain runs on them, and lm-eval reads its tasks.
    parts = ("--model", "lab/model", "--sae", "lab/sae-1", "--limit", 40)
    code, _, err = dsg("select", *parts, "--forget", "lab/corpora/lab-hexes.jsonl", "--retain", "lab-retain", "-n", 5)
    assert code == 0, err
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tmp_path / "lab/tasks"), include_defaults=False)
    task = manager.load(["lab-near-terse"])["tasks"]["lab-near-terse"]
    assert len(task.dataset["test"]) == 192 and len(list(task.test_docs())) == 96


@pytest.mark.slow
def test_the_wheel_has_recipes_and_weights(tmp_path):
    done = python("-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path), str(ROOT))
    assert done.returncode == 0, done.stderr
    wheel = next(tmp_path.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    weights = [f"dsg_cli/lab/shipped/{folder}/model.safetensors" for folder in ("model", "retrain", "retrain-1")]
    recipes = [f"dsg_cli/recipes/{name}.yaml" for name in ("lab", "paper/muse-news")]
    assert {*recipes, *weights, "dsg_cli/py.typed"} <= set(names)
    assert wheel.stat().st_size < 8e6
    # Unpacked far from the checkout, it finds its recipe and its lab.
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    done = python(
        "-m", "dsg_cli", "ls", "recipes", cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    )
    assert {"lab", "wmdp-bio", "gpt2", "paper/muse-news"} <= set(done.stdout.split()), done.stderr
    options = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(tmp_path / "installed")}}
    done = python("-m", "dsg_cli", "select", *SMALL_LAB, "--json", **options)
    assert done.returncode == 0 and json.loads(done.stdout)["git"] == {}, done.stderr
