"""What a person at a terminal sees, and nobody else: colour, bars, completion, logs of libraries."""

import io
import logging
import os
import pty
import re
import shlex
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import python
from dsg_cli.cli.following import next_command
from dsg_cli.report.console import captioned
from handmade import write
from rich.console import Console
from rich.table import Table

from dsg_cli.cli.output import rate_of, spoken
from dsg_cli.errors import DsgError
from dsg_cli.workspace import Workspace


@pytest.fixture
def written(dsg, tmp_path):
    return write(Workspace(tmp_path / "dsg-workspace"))


BAR = """
import time
from dsg_cli.cli import output
with output.progress(quiet=False) as tell:
    output.rate_of = lambda *_: "1,234,567 tokens/s"
    tell("relearning, all, lr 0.0003, guard in loop, steps", 5, 10)
    time.sleep(0.3)
"""


def on_a_terminal(*arguments, program=("-m", "dsg_cli"), **environment):
    """What `dsg ...` writes to stdout and stderr where both are terminals."""
    main, side = pty.openpty()
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    process = subprocess.Popen(
        [sys.executable, *program, *arguments],
        stdin=side,
        stdout=side,
        stderr=side,
        env=clean | {"TERM": "xterm-256color", **environment},
    )
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
    def run(*arguments, **environment):
        return python("-m", "dsg_cli", *arguments, env=os.environ | environment)

    for arguments in (["show", "eval-001"], ["ls"], ["--help"]):
        assert "\x1b" not in run(*arguments).stdout
    assert run("ls", FORCE_COLOR="1").stdout == "eval-001\nattack-001\n"
    assert run("show", "eval-001", "--json", FORCE_COLOR="1").stdout == run("show", "eval-001", "--json").stdout


@pytest.mark.parametrize(
    ("environment", "is_shown"), [({"TERM": "xterm"}, True), ({"TERM": "dumb"}, False), ({}, False)]
)
def test_bars_need_a_terminal_that_can_redraw(monkeypatch, capsys, environment, is_shown):
    from dsg_cli.progress import silent

    from dsg_cli.cli.output import progress

    monkeypatch.setattr(sys.stderr, "isatty", lambda: bool(environment), raising=False)
    monkeypatch.setenv("TERM", environment.get("TERM", "xterm"))
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress(quiet=False) as tell:
        assert (tell is not silent) is is_shown


# Completion.

HEAVY = """
import sys
from dsg_cli.cli.app import main
try:
    main()
finally:
    assert not {"torch", "transformers", "lm_eval", "datasets"} & set(sys.modules), "heavy"
"""


def completed(*words, **environment):
    """What bash would be offered for the last word."""
    asked = {"_DSG_COMPLETE": "complete_bash", "COMP_WORDS": shlex.join(["dsg", *words]), "COMP_CWORD": str(len(words))}
    done = python("-c", HEAVY, env=os.environ | asked | environment)
    assert done.stderr == "" and done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["ev"], ["eval"]),
        (["show", "ev"], ["eval-001"]),
        (["show", "-w", "elsewhere", "ev"], []),
        (["eval", "--bench", "lab-near-"], ["lab-near-held", "lab-near-novel", "lab-near-terse"]),
        (["attack", "--kind", "re"], ["relearn"]),
        (["calibrate", "--gate", "ca"], ["causal-mean"]),
        (["select", "--forget", "wmdp-c"], ["wmdp-cyber", "wmdp-cyber-retain"]),
        (["run", "gp"], ["gpt2"]),
        (["ls", "att"], ["attacks"]),
    ],
)
def test_values_are_completed_without_torch(written, words, offered):
    assert completed(*words) == offered


def test_from_completes_artifacts_of_the_kind_that_the_command_takes(written):
    for name in ("features-001", "threshold-001", "guardrail-001", "guardrail-002"):
        Path("elsewhere").mkdir(exist_ok=True)
        (Path("elsewhere") / f"{name}.json").write_text("{}")
    for command, found in (
        ("calibrate", ["features-001"]),
        ("apply", ["threshold-001", "features-001"]),
        ("eval", ["guardrail-001", "guardrail-002"]),
    ):
        assert completed(command, "--from", "", DSG_WORKSPACE="elsewhere") == found


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


# Libraries.

NOISE = """
import sys
from dsg_cli.cli import show
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
import dsg_cli.workspace
dsg_cli.workspace.Workspace.ids = noisy
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
        from dsg_cli.cli.app import quiet_libraries

        quiet_libraries()
        warnings.warn("one", stacklevel=1)
    assert caught == [] and not logging.getLogger("x").isEnabledFor(logging.WARNING)
    assert logging.getLogger("x").isEnabledFor(logging.ERROR)


# Width, hints and progress.

SAMPLES = [
    (schema.name, path.stem)
    for schema in sorted((Path(__file__).parent / "data").glob("schema-*"))
    for path in sorted(schema.glob("*-001.json"))
]


def of_a_chain(schema, name):
    """Some samples are of another chain than what lies beside them, and say so when they are read."""
    try:
        Workspace(Path(__file__).parent / "data" / schema).read(name)
    except DsgError:
        return False
    return True


@pytest.mark.parametrize(("schema", "name"), [one for one in SAMPLES if of_a_chain(*one)])
def test_every_kind_is_shown_in_80_columns(dsg, schema, name):
    code, out, err = dsg("show", name, "-w", Path(__file__).parent / "data" / schema)
    assert code == 0 and out.startswith(name) and len(out.splitlines()) > 4, err
    assert max(map(len, out.splitlines())) <= 80


def test_a_caption_has_the_width_of_the_screen_rather_than_of_its_table():
    table = Table("a")
    table.caption = "words " * 20
    console = Console(width=80, file=io.StringIO())
    console.print(captioned(table))
    assert console.file.getvalue().count("words words words words words words words words words words words") == 1


def test_an_empty_or_missing_workspace_says_what_to_do(tmp_path):
    for folder, words in ((tmp_path, "is empty"), (tmp_path / "a b", "does not exist yet")):
        out = " ".join(on_a_terminal("ls", "-w", str(folder), NO_COLOR="1").split())
        assert words in out and out.endswith(f"dsg demo -w {shlex.quote(str(folder))}")
        assert python("-m", "dsg_cli", "ls", "-w", str(folder)).stdout == ""


@pytest.mark.parametrize(
    ("schema", "name", "command"),
    [
        ("schema-1", "features-001", "dsg calibrate"),
        ("schema-1", "guardrail-001", "dsg eval --bench lab-hexes"),
        ("schema-1", "model-001", "dsg eval --bench lab-hexes"),
        ("schema-1", "eval-001", "dsg attack --kind dilution"),
    ],
)
def test_the_next_command_can_be_typed_as_it_stands(dsg, monkeypatch, schema, name, command):
    folder = Path(__file__).parent / "data" / schema
    stored = Workspace(folder).read(name)
    assert next_command(stored) == f"{command} -w {shlex.quote(str(folder))}"
    assert dsg(*shlex.split(next_command(stored))[1:], "--help")[0] == 0
    monkeypatch.setenv("DSG_WORKSPACE", str(folder))
    assert next_command(stored) == command
    other = replace(stored, body=replace(stored.body, forget=["my corpus"])) if command[4] == "e" else stored
    assert next_command(other) == ("dsg ls benches" if command[4] == "e" else command)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("forget, tokens", ("forget", "forget", "tokens")),
        ("training, loss 0.31, steps", ("training, loss 0.31", "training", "steps")),
        ("relearning, all, steps", ("relearning, all", "relearning, all", "steps")),
        ("guardrail", ("guardrail", "guardrail", "")),
        ("a" * 40, ("a" * 23 + "...", "a" * 40, "")),
    ],
)
def test_what_progress_says(what, said):
    assert spoken(what) == said


def test_rates():
    assert rate_of(9000, 2.0, "tokens") == "4,500 tokens/s" and rate_of(3, 2.0, "steps") == "1.5 steps/s"
    assert rate_of(9000, 0.5, "tokens") == rate_of(0, 9.0, "tokens") == rate_of(9, 9.0, "") == ""


def test_a_bar_fits_80_columns():
    out = on_a_terminal(program=("-c", BAR), COLUMNS="80")
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", one) for one in re.split(r"\x1b\[2K|\r|\n", out)]
    widest = max(lines, key=len)
    assert "1,234,567 tokens/s" in widest and "50%" in widest and len(widest) <= 80
