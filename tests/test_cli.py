"""Errors through main(): the exit code and the words a user needs; help without torch."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import SMALL_LAB, make_sae, python
from handmade import write
from rich.console import Console

from dsg_cli import __version__
from dsg_cli.cli.output import next_command, rate_of, spoken
from dsg_cli.errors import DsgError
from dsg_cli.report.rendering import Table
from dsg_cli.workspace.store import Workspace

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data"
LIGHT = """
import sys
from dsg_cli.cli.app import main
spared = {"torch", "transformers", "lm_eval", "datasets", "sae_lens", *sys.argv.pop().split()}
try:
    main()
finally:
    assert not spared & set(sys.modules), spared & set(sys.modules)
"""
"""A command that loads none of these, nor what the last argument names, which the command does not see."""
SETTINGS = "dsg_cli.settings dsg_cli.workspace.artifacts"
MODELS = f"pydantic {SETTINGS}"
"""What Typer loads for itself, too, where it reads a command's options."""


@pytest.mark.parametrize(
    ("arguments", "spared"),
    [("--help", MODELS), ("select --help", SETTINGS), ("--version", MODELS), ("ls benches", SETTINGS), ("ls", "")],
)
def test_light_commands_load_little(arguments, spared):
    done = python("-c", LIGHT, *arguments.split(), spared)
    assert done.returncode == 0 and (arguments != "--version" or __version__ in done.stdout), done.stderr


def test_names_are_listed_one_a_line(dsg):
    assert dsg("ls", "benches")[1].splitlines()[:2] == ["lab-hexes", "lab-hexes-held"]
    assert dsg("ls", "models")[1].splitlines() == ["lab", "lab-retrain", "lab-retrain-1"]
    assert json.loads(dsg("ls", "corpora", "--json")[1])[0] == "lab-hexes"
    code, _, err = dsg("ls", "bench")
    assert code == 1 and "Did you mean benches?" in err
    assert dsg("ls")[:2] == (0, "")


def select(folders, **changes):
    arguments = {name: folders[name] for name in ("model", "sae")}
    arguments |= {name: folders[f"{name}.txt"] for name in ("forget", "retain")}
    arguments |= {"n_features": 4, "ratio_percentile": 60, **changes}
    return [
        "select",
        *(str(part) for key, value in arguments.items() for part in (f"--{key.replace('_', '-')}", value)),
    ]


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
        ({"dtype": "float8"}, "model.dtype is 'float8'; it should be 'auto', "),
        ({"score": "fisher"}, "select.score is 'fisher'"),
        ({"limit": 2}, "--limit 2 is too small"),
        ({"set": "select.n_feature=3"}, "unknown key select.n_feature. Did you mean n_features"),
        ({"recipe": "labb"}, "There is no recipe labb"),
    ],
)
def test_select_errors(dsg, folders, tmp_path, changes, words):
    texts = {"tiny.txt": b"one\n\ntwo", "empty.txt": b"", "binary.txt": b"\xff\xfe\xfd" * 50, "bad.jsonl": b"hello\n"}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
    code, out, err = dsg(*select(folders, **changes))
    assert code == 1 and out == ""
    assert err.startswith("error: ") and words in err and "Traceback" not in err, err
    assert len(err.strip().splitlines()) <= 3
    assert not list((tmp_path / "dsg-workspace").glob("*"))


def test_errors_come_before_weights_are_loaded(dsg, folders, monkeypatch):
    """Bad corpora, benches and SAEs are found without loading a model, and what makes an input is named."""
    monkeypatch.setattr("dsg_cli.models.language_model.AutoModelForCausalLM", None)
    for arguments, words in (
        (select(folders, forget="no-such"), "no corpus or file"),
        (select(folders, sae="lab"), "width 128"),
        (select(folders, retain=folders["forget.txt"]), "both to be forgotten and to be retained"),
        (["select", "--forget", "lab-hexes"], "No retain corpus is named"),
        (["calibrate"], "has no features yet.\nMake it with: dsg select"),
        (["apply"], "has no threshold yet.\nMake it with: dsg calibrate"),
        (["eval", "--bench", "lab-hexes"], "has no guardrail yet.\nMake it with: dsg apply"),
        (["attack", "--kind", "dilution"], "has no guardrail yet.\nMake it with: dsg apply"),
    ):
        code, _, err = dsg(*arguments)
        assert code == 1 and words in err, err
    code, _, err = dsg(*select(folders))
    assert code == 1 and "cannot be loaded" in err


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
        (["calibrate", "--gate", "median"], "calibrate.gate is 'median'; it should be 'mean', "),
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
        (["attack", "--kind", "dilution", "--set", "attack.dilution_lengths=[]"], "attack.dilution_lengths is empty"),
        (["attack", "--kind", "dilution"], "No bench is named like the forget corpus"),
        (["attack", "--kind", "relearn", "--bench", "lab-hexes", "--set", "attack.relearn_steps=[3, 1]"], "ascending"),
        (["attack", "--kind", "relearn", "--bench", "lab-far", "--set", "attack.known_questions=999"], "144 questions"),
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
    from safetensors.torch import load_file, save_file

    mine = {name: tmp_path / name for name in ("model", "sae")}
    for name, path in mine.items():
        shutil.copytree(folders[name], path)

    def calibration():
        code, _, err = dsg("calibrate", "--alpha", 0.2, "--gate", "mean")
        assert code == 1
        return err

    assert dsg(*select(folders, **mine))[0] == 0
    weights = load_file(mine["model"] / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] += 1
    save_file(weights, mine["model"] / "model.safetensors", metadata={"format": "pt"})
    assert "is not the one that features-001 was made with" in calibration()
    config = mine["sae"] / "cfg.json"
    config.write_text(config.read_text().replace("blocks.1.", "blocks.0."))
    assert re.search("SAE.*its configuration changed", calibration(), flags=re.S)
    make_sae(mine["sae"], seed=1)
    assert re.search("SAE.*its weights changed", calibration(), flags=re.S)


def test_usage_errors_exit_2(dsg):
    assert dsg("select", "--no-such-flag")[0] == dsg("selct")[0] == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(dsg, folders, monkeypatch, number, code):
    from dsg_cli.stages import select as stage

    monkeypatch.setattr(stage, "load_model", lambda *_, **__: os.kill(os.getpid(), number))
    exit_code, out, err = dsg(*select(folders))
    assert exit_code == code and out == "" and "stopped" in err


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
    names = ["model", "retrain", "retrain-1", "sae", "sae-1", "sae-2", "corpora", "questions", "tasks", "training.json"]
    assert {path.name for path in (tmp_path / "lab").iterdir()} == {*names}
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
    weights = [f"dsg_cli/lab/shipped/{folder}/model.safetensors" for folder in ("model", "retrain", "retrain-1")]
    recipes = [f"dsg_cli/recipes/{name}.yaml" for name in ("lab", "paper/muse-news")]
    assert {*recipes, *weights, "dsg_cli/py.typed"} <= set(zipfile.ZipFile(wheel).namelist())
    assert wheel.stat().st_size < 8e6
    # Unpacked far from the checkout, it finds its recipe and its lab.
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    options = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(tmp_path / "installed")}}
    done = python("-m", "dsg_cli", "ls", "recipes", **options)
    assert {"lab", "wmdp-bio", "gpt2", "paper/muse-news"} <= set(done.stdout.split()), done.stderr
    done = python("-m", "dsg_cli", "select", *SMALL_LAB, "--json", **options)
    assert done.returncode == 0 and json.loads(done.stdout)["git"] == {}, done.stderr


@pytest.fixture
def written(dsg, tmp_path):
    return write(Workspace(tmp_path / "dsg-workspace"))


BAR = """
import time
from dsg_cli.cli import output
with output.Output().progress() as tell:
    output.rate_of = lambda *_: "1,234,567 tokens/s"
    tell("relearning, all, lr 0.0003, guard in loop, steps", 5, 10)
    time.sleep(0.3)
"""


def on_a_terminal(*arguments, program=("-m", "dsg_cli"), **environment):
    """What `dsg ...` writes to stdout and stderr where both are terminals."""
    main, side = pty.openpty()
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), side)
    environment = clean | {"TERM": "xterm-256color", **environment}
    process = subprocess.Popen([sys.executable, *program, *arguments], **streams, env=environment)
    os.close(side)
    written = b""
    try:
        while piece := os.read(main, 65536):
            written += piece
    except OSError:  # The other side was closed.
        pass
    os.close(main)
    process.wait()
    return written.decode()


def test_a_terminal_has_colour_unless_it_says_no(written):
    assert "\x1b[1m" in on_a_terminal("show", "eval-001")
    for plain in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        out = on_a_terminal("show", "eval-001", **plain)
        assert "\x1b" not in out and "lab-hexes" in out
    assert "\x1b" not in on_a_terminal("show", "eval-001", "--json", FORCE_COLOR="1")


def test_no_bars_and_no_colour_off_a_terminal(written):
    def out(*arguments, **environment):
        return python("-m", "dsg_cli", *arguments, env=os.environ | environment).stdout

    for arguments in (["show", "eval-001"], ["ls"], ["--help"]):
        assert "\x1b" not in out(*arguments)
    assert out("ls", FORCE_COLOR="1") == "eval-001\nattack-001\n"
    assert out("show", "eval-001", "--json", FORCE_COLOR="1") == out("show", "eval-001", "--json")


@pytest.mark.parametrize(
    ("environment", "is_shown"), [({"TERM": "xterm"}, True), ({"TERM": "dumb"}, False), ({}, False)]
)
def test_bars_need_a_terminal_that_can_redraw(monkeypatch, capsys, environment, is_shown):
    from dsg_cli.cli.output import Output
    from dsg_cli.job import silent

    monkeypatch.setattr(sys.stderr, "isatty", lambda: bool(environment), raising=False)
    monkeypatch.setenv("TERM", environment.get("TERM", "xterm"))
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Output().progress() as tell:
        assert (tell is not silent) is is_shown


def completed(*words, **environment):
    """What bash would be offered for the last word."""
    spared = "" if words[0] == "run" else SETTINGS  # Recipes are listed by what reads them.
    asked = {"_DSG_COMPLETE": "complete_bash", "COMP_WORDS": shlex.join(["dsg", *words]), "COMP_CWORD": str(len(words))}
    done = python("-c", LIGHT, spared, env=os.environ | asked | environment)
    assert done.stderr == "" and done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("ev", "eval"),
        ("show ev", "eval-001"),
        ("show -w elsewhere ev", ""),
        ("eval --bench lab-near-", "lab-near-held lab-near-novel lab-near-terse"),
        ("attack --kind re", "relearn"),
        ("calibrate --gate ca", "causal-mean"),
        ("select --forget wmdp-c", "wmdp-cyber wmdp-cyber-retain"),
        ("run gp", "gpt2"),
        ("ls att", "attacks"),
    ],
)
def test_values_are_completed_without_loading_much(written, words, offered):
    assert completed(*words.split()) == offered.split()


@pytest.mark.parametrize(
    ("command", "offered"),
    [("calibrate", "features-001"), ("apply", "threshold-001 features-001"), ("eval", "guardrail-001 guardrail-002")],
)
def test_from_completes_artifacts_of_the_kind_that_the_command_takes(tmp_path, monkeypatch, command, offered):
    monkeypatch.chdir(tmp_path)
    for name in ("features-001", "threshold-001", "guardrail-001", "guardrail-002"):
        Path(f"{name}.json").write_text("{}")
    assert completed(command, "--from", "", DSG_WORKSPACE=".") == offered.split()


def test_the_completion_script_of_bash_works(written, tmp_path):
    """Bash itself: the script defines a function that fills COMPREPLY."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "dsg").write_text(f'#!/bin/sh\nexec {sys.executable} -m dsg_cli "$@"\n')
    (folder / "dsg").chmod(0o755)
    script = """
    eval "$(dsg --show-completion)"
    complete -p dsg
    COMP_WORDS=(dsg show ""); COMP_CWORD=2
    $(complete -p dsg | sed -E 's/.*-F ([^ ]+).*/\\1/') dsg
    echo "${COMPREPLY[@]}"
    """
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.splitlines()[-1] == "eval-001 attack-001" and "complete -o default" in done.stdout


NOISE = """
import sys
from dsg_cli.cli.app import main
def noisy(*_):
    import logging, os, warnings
    for name in ("transformers", "datasets", "lm_eval", "huggingface_hub", "torch", "anything"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.DEBUG)
        logger.warning("%s logged", name)
    warnings.warn("one warned")
    sys.stderr.write(f"bars {os.environ.get('TQDM_DISABLE', 'on')}\\n")
    return []
import dsg_cli.workspace.store
dsg_cli.workspace.store.Workspace.ids = noisy
main()
"""


def test_libraries_are_silent_unless_verbose(tmp_path):
    clean = {name: value for name, value in os.environ.items() if name not in ("TQDM_DISABLE", "PYTHONWARNINGS")}
    done = python("-c", NOISE, "ls", cwd=tmp_path, env=clean)
    assert done.returncode == 0 and set(done.stderr.splitlines()) == {"bars 1"}, done.stderr
    for flag in ("-v", "--verbose"):
        loud = python("-c", NOISE, flag, "ls", cwd=tmp_path, env=clean).stderr
        assert "lm_eval logged" in loud and "torch logged" in loud and "one warned" in loud and "bars on" in loud


def test_quiet_libraries_silences_this_process_too():
    with warnings.catch_warnings(record=True) as caught:
        from dsg_cli.cli.output import quiet_libraries

        quiet_libraries()
        warnings.warn("one", stacklevel=1)
    assert caught == [] and not logging.getLogger("x").isEnabledFor(logging.WARNING)
    assert logging.getLogger("x").isEnabledFor(logging.ERROR)


def of_a_chain(path):
    """Some samples are of another chain than what lies beside them, and say so when they are read."""
    try:
        return Workspace(path.parent).read(path.stem)
    except DsgError:
        return None


@pytest.mark.parametrize("path", filter(of_a_chain, sorted(DATA.glob("schema-*/*-001.json"))), ids=str)
def test_every_kind_is_shown_in_80_columns(dsg, path):
    code, out, err = dsg("show", path.stem, "-w", path.parent)
    assert code == 0 and out.startswith(path.stem) and len(out.splitlines()) > 4, err
    assert max(map(len, out.splitlines())) <= 80


def test_a_caption_has_the_width_of_the_screen_rather_than_of_its_table():
    console = Console(width=80, file=io.StringIO())
    console.print(Table(["a"], [], notes=["words " * 20]))
    assert console.file.getvalue().count("words words words words words words words words words words words") == 1


def test_an_empty_or_missing_workspace_says_what_to_do(tmp_path):
    for folder, words in ((tmp_path, "is empty"), (tmp_path / "a b", "does not exist yet")):
        out = " ".join(on_a_terminal("ls", "-w", str(folder), NO_COLOR="1").split())
        assert words in out and out.endswith(f"dsg demo -w {shlex.quote(str(folder))}")
        assert python("-m", "dsg_cli", "ls", "-w", str(folder)).stdout == ""


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("features-001", "dsg calibrate"),
        ("guardrail-001", "dsg eval --bench lab-hexes"),
        ("model-001", "dsg eval --bench lab-hexes"),
        ("eval-001", "dsg attack --kind dilution"),
    ],
)
def test_the_next_command_can_be_typed_as_it_stands(dsg, monkeypatch, name, command):
    folder = DATA / "schema-1"
    stored = Workspace(folder).read(name)
    assert next_command(stored) == f"{command} -w {shlex.quote(str(folder))}"
    assert dsg(*shlex.split(next_command(stored))[1:], "--help")[0] == 0
    monkeypatch.setenv("DSG_WORKSPACE", str(folder))
    assert next_command(stored) == command
    other = replace(stored, body=stored.body.replace(forget=["my corpus"])) if command[4] == "e" else stored
    assert next_command(other) == ("dsg ls benches" if command[4] == "e" else command)


@pytest.mark.parametrize(
    ("what", "shown", "work", "unit"),
    [
        ("forget, tokens", "forget", "forget", "tokens"),
        ("training, loss 0.31, steps", "training, loss 0.31", "training", "steps"),
        ("relearning, all, steps", "relearning, all", "relearning, all", "steps"),
        ("guardrail", "guardrail", "guardrail", ""),
        ("a" * 40, "a" * 23 + "...", "a" * 40, ""),
    ],
)
def test_what_progress_says(what, shown, work, unit):
    assert spoken(what) == (shown, work, unit)


def test_rates():
    assert rate_of(9000, 2.0, "tokens") == "4,500 tokens/s" and rate_of(3, 2.0, "steps") == "1.5 steps/s"
    assert rate_of(9000, 0.5, "tokens") == rate_of(0, 9.0, "tokens") == rate_of(9, 9.0, "") == ""


def test_a_bar_fits_80_columns():
    out = on_a_terminal(program=("-c", BAR), COLUMNS="80")
    widest = max((re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"\x1b\[2K|\r|\n", out)), key=len)
    assert "1,234,567 tokens/s" in widest and "50%" in widest and len(widest) <= 80
