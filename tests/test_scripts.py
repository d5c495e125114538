"""What scripts and CI jobs rely on: conditions, summaries, one JSON document."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import SMALL_LAB, python
from handmade import RESULTS, chain, judged, judged_header, report, write
from test_docs import README

from dsg_cli.errors import DsgError
from dsg_cli.evals.expect import check_expected, check_metrics, parse_expected
from dsg_cli.report.rendering import code
from dsg_cli.report.summary import markdown
from dsg_cli.workspace.store import Workspace


@pytest.fixture
def written(dsg, tmp_path):
    return write(Workspace(tmp_path / "dsg-workspace"))


@pytest.mark.parametrize(
    ("condition", "bound", "is_met"),
    [
        ("lab-hexes<=0.7", 0.7, True),
        ("lab-hexes<0.7", 0.7, False),
        ("lab-hexes > 7e-1", 0.7, False),
        ("lab-hexes>=base", 0.8, False),
        ("lab-hexes<base", 0.8, True),
        ("lab-hexes>=base-0.1", 0.7, True),  # 0.8 - 0.1 is more than 0.7 in floating point.
        ("lab-hexes>=0.5*base + 0.4", 0.8, False),
        (" lab-hexes.acc >= 0.875 * base ", 0.7, True),
        ("gsm.exact_match>=2*base", 0.5, True),
        ("a|b>=.99*base-0.01", 0.98, False),
        ("a|b.gate<=0.25", 0.25, True),
        ("lab-hexes.gate>0.99", 0.99, False),
    ],
)
def test_conditions(condition, bound, is_met):
    [verdict] = judged(condition)
    assert verdict["bound"] == pytest.approx(bound) and verdict["met"] is is_met
    assert set(verdict) == {"expect", "value", "bound", "met"} and verdict["expect"] == condition


NO_CONDITIONS = (
    "lab-hexes", "lab-hexes<=", "lab-hexes.n==50", "<=0.3", "lab-hexes<=base*0.9",
    "lab-hexes<=0.9*", "lab-hexes<=base-", "lab-hexes<=1..2", "lab-hexes<=1e999", "lab-hexes<=nan",
)  # fmt: skip


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("lab-hexs<=0.3", "Did you mean lab-hexes"),
        ("lab-hexes.gate<=base", "the base model has no gate"),
        *((text, "not a condition") for text in NO_CONDITIONS),
    ],
)
def test_what_is_no_condition(condition, words):
    with pytest.raises(DsgError, match=words):
        parse_expected(condition, list(RESULTS))


def test_a_bench_whose_own_name_has_a_dot():
    for condition, metric in (("v1.1>=0.5", "acc"), ("v1.1.f1>=0.5", "f1")):
        parsed = parse_expected(condition, ["v1.1"])
        assert (parsed.bench, parsed.metric) == ("v1.1", metric)


def test_metrics_are_checked_before_they_are_measured():
    def check(condition):
        check_metrics([parse_expected(condition, ["lab-hexes", "tag"])], {"lab-hexes": {"acc"}})

    for fine in ("lab-hexes<1", "lab-hexes.acc_low<1", "lab-hexes.gate<1", "lab-hexes.n>5"):
        check(fine)
    with pytest.raises(DsgError, match=r"no metric accuracy"):
        check("lab-hexes.accuracy<1")
    with pytest.raises(DsgError, match="stands for several benches"):
        check("tag<1")


def test_metrics_of_tasks_and_groups():
    from dsg_cli.evals.benches import load_tasks, metrics_of

    group = SimpleNamespace(name="wmdp", aggregate_metric_list=[SimpleNamespace(metric="acc")])
    measured = metrics_of([*load_tasks(["lab-hexes"], split="test"), group])
    assert measured["lab-hexes"] == measured["wmdp"] == measured["mmlu-paper"] == {"acc"}


def test_bad_conditions_come_before_everything(dsg, monkeypatch):
    monkeypatch.setattr("dsg_cli.models.language_model.AutoModelForCausalLM", None)
    for command in (
        ["eval", "--bench", "lab-hexes", "--expect", "lab-hexes<=bse"],
        ["run", "lab", "--set", "eval.expect=['lab-hexes<=bse']"],
        ["run", "lab", "--dry-run", "--set", "eval.expect=['lab-hexes<=bse']"],
    ):
        code, out, err = dsg(*command)
        assert code == 1 and out == "" and "is not a condition" in err and len(err.splitlines()) <= 2
    code, out, err = dsg("run", "lab", "--set", "eval.expect=['lab-hexes.f1<=0.5']")
    assert code == 1 and out == "" and "has no metric f1" in err and not Path("dsg-workspace").exists()


def returns(monkeypatch, written):
    """`dsg eval` and `dsg run` without their work: what the stages would return is there."""
    monkeypatch.setattr("dsg_cli.stages.evaluate.run", lambda *_, **__: written[0])
    monkeypatch.setattr("dsg_cli.stages.attack.run", lambda *_, **__: [written[1]])
    run = chain(Workspace("of-a-run"))
    monkeypatch.setattr("dsg_cli.stages.run.run", lambda *_, **__: run)


MISSED = """\
not met              base  guarded  bound    n
a|b>=0.99*base-0.01     1        0.5   0.98  1,000
a|b.gate<=0.05          -       0.25   0.05    900
"""


@pytest.mark.parametrize("command", [["eval", "--bench", "lab-hexes"], ["run", "lab"]])
@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_missed_conditions_are_a_table_on_stderr_and_exit_3(dsg, written, monkeypatch, command, json_flag):
    returns(monkeypatch, written)
    code, out, err = dsg(*command, *json_flag, "--summary", "page.md")
    assert code == 3
    assert [line.split() for line in err.splitlines()] == [line.split() for line in MISSED.splitlines()]
    assert all(len(line) <= 80 for line in err.splitlines())
    if json_flag:
        assert [verdict["met"] for verdict in json.loads(out)["expected"]] == [True, False, False, True]
    elif command[0] == "eval":
        assert out == "eval-001\n"
    assert "❌ | `a\\|b>=0.99*base-0.01`" in Path("page.md").read_text()


def test_an_evaluation_of_before_bounds_is_shown_all_the_same(dsg, written):
    old = report("lab-hexes<=0.5")
    old = old.replace(expected=[{key: value for key, value in old.expected[0].items() if key != "bound"}])
    Workspace("dsg-workspace").write(judged_header(), old)
    code, out, _ = dsg("show", "eval-002")
    assert code == 0 and "NOT MET" in out


def test_long_conditions_stay_within_80_columns(dsg, tmp_path, monkeypatch):
    bench = "a-bench-with-a-very-long-name-of-its-own-that-hardly-fits-a-line-of-a-log"
    body = report().replace(
        results={bench: RESULTS["a|b"]},
        expected=check_expected([parse_expected(f"{bench}>=0.99*base", [bench])], {bench: RESULTS["a|b"]}, {}),
    )
    stored = Workspace(tmp_path / "ws").write(judged_header(), body)
    monkeypatch.setattr("dsg_cli.stages.evaluate.run", lambda *_, **__: stored)
    monkeypatch.setenv("COLUMNS", "300")
    code, _, err = dsg("eval", "--bench", bench)
    assert code == 3 and all(len(line) <= 80 for line in err.splitlines()) and "0.99" in err and "1,000" in err


def test_the_summary_is_a_pure_function_of_the_artifacts(written):
    text = markdown(written)
    assert text == markdown(written) and text.startswith("## dsg: guardrail-001\n") and text.endswith(".\n")
    assert "model `org/mo|del`; SAE `lab` at `blocks.1.hook_resid_post`; dsg 0.1.0 (0123456789, changed)" in text
    rows = text.splitlines()
    assert "| bench | base | guarded | 95 % interval | gated | n |" in rows
    assert "| `lab-hexes` | 0.800 | 0.700 | 0.560 to 0.810 | 0.980 | 50 of 60 |" in rows
    assert "| `a\\|b` | 1.000 | 0.500 | - | 0.250 | 1000 |" in rows
    assert "| `gsm.exact_match` | 0.250 | 0.500 | - | - | 4 |" in rows
    assert not any("part-of-gsm" in row for row in rows) and "1 parts more in `eval-001`." in rows
    assert "| ✅ | `lab-hexes<=0.75` | 0.8 | 0.7 | 0.75 | 50 |" in rows
    assert "| ❌ | `a\\|b.gate<=0.05` | - | 0.25 | 0.05 | 900 |" in rows
    assert "| dilution | `a\\|b` | 0.000 | 0.480 | 48 benign tokens | 0.900 |" in rows
    assert "Artifacts: `eval-001`, `attack-001`." in rows
    # Every row of a table has as many cells as its head.
    for block in text.split("\n\n"):
        cells = {len(re.findall(r"(?<!\\)\|", row)) for row in block.splitlines() if row.startswith("|")}
        assert len(cells) <= 1
    assert "expected" not in markdown(written[1:]) and "| bench | base" not in markdown(written[1:])


def test_names_cannot_break_out_of_the_markdown():
    assert code("a`|\n# b", in_table=True) == "`a'\\| # b`"
    assert code("a|b") == "`a|b`"


@pytest.mark.parametrize(
    "command", [["eval", "--bench", "lab-hexes"], ["attack", "--kind", "dilution"], ["run", "lab"], ["demo"]]
)
def test_summaries_are_appended_and_refused_before_the_work(dsg, written, tmp_path, monkeypatch, command):
    def works(*_, **__):
        raise AssertionError("work began")

    for name in ("evaluate", "attack", "run"):
        monkeypatch.setattr(f"dsg_cli.stages.{name}.run", works)
    for file, words in (("nowhere/page.md", "No such file"), (tmp_path, "Is a directory"), ("", "Is a directory")):
        code, out, err = dsg(*command, "--summary", file)
        assert code == 1 and out == "" and "cannot be written to" in err and words in err
    returns(monkeypatch, written)
    page = tmp_path / "page.md"
    page.write_text("before\n")
    dsg(*command, "--summary", page)
    dsg(*command, "--summary", page)
    text = page.read_text()
    assert text.startswith("before\n\n## dsg: guardrail-001\n") and text.count("\n\n## dsg: guardrail-001\n") == 2


def test_every_command_that_prints_a_result_has_json():
    from typer.main import get_command

    from dsg_cli.cli.app import app

    commands = get_command(app).commands
    for name, command in [*commands.items(), *commands["lab"].commands.items()]:
        if name != "lab":
            assert "--json" in {option for parameter in command.params for option in parameter.opts}, name


def test_json_is_one_document_and_nothing_else(dsg, written, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    for command in (
        ["ls"],
        ["ls", "corpora"],
        ["ls", "recipes"],
        ["show", "eval-001"],
        ["run", "lab", "--dry-run"],
        ["lab", "export", "lab"],
    ):
        code, out, err = dsg(*command, "--json")
        assert code == 0 and err == "", err
        assert json.loads(out) and "\x1b" not in out
    lab = json.loads(out)
    assert lab["to"] == "lab" and {"path", "bytes"} == set(lab["files"][0])
    assert (Path("lab") / lab["files"][0]["path"]).stat().st_size == lab["files"][0]["bytes"]


def test_what_libraries_print_does_not_reach_stdout(dsg, written, monkeypatch):
    def chatty(*_, **__):
        sys.stdout.write("Welcome to a library!\n")
        return [written[1]]

    monkeypatch.setattr("dsg_cli.stages.attack.run", chatty)
    code, out, err = dsg("attack", "--kind", "dilution", "--json")
    assert code == 0 and json.loads(out)["id"] == "attack-001" and "Welcome" in err
    assert dsg("attack", "--kind", "dilution")[1] == "attack-001\n"


WORKFLOW = yaml.safe_load(re.search(r"```yaml\n(.*?)```", README, flags=re.S)[1])
STEPS = WORKFLOW["jobs"]["guardrail"]["steps"]
COMMANDS = [
    shlex.split(line)[1:] for step in STEPS for line in step.get("run", "").splitlines() if line.startswith("dsg ")
]


def test_the_workflow_has_all_that_a_pull_request_needs():
    assert WORKFLOW[True] == "pull_request"  # YAML 1.1 reads the key `on` so.
    uses = [step["uses"].partition("@")[0] for step in STEPS if "uses" in step]
    assert uses == [f"actions/{name}" for name in ("checkout", "setup-python", "cache", "upload-artifact")]
    environment = WORKFLOW["jobs"]["guardrail"]["env"]
    assert environment["HF_HOME"].endswith(STEPS[2]["with"]["path"])
    assert STEPS[-1]["with"]["path"] == environment["DSG_WORKSPACE"] and "cancelled" in STEPS[-1]["if"]
    assert [words[0] for words in COMMANDS] == ["run", "eval"]
    assert all("$GITHUB_STEP_SUMMARY" in words for words in COMMANDS)


def test_the_workflow_s_commands_are_understood(dsg):
    """`run` up to its plan, which reads the conditions; `eval` up to the guardrail that is not there."""
    (_, *run), (_, *evaluation) = COMMANDS
    code, out, err = dsg("run", *run, "--dry-run", "--json")
    assert code == 0 and json.loads(out), err
    code, _, err = dsg("eval", *evaluation)
    assert code == 1 and "has no guardrail yet" in err


@pytest.mark.slow
def test_the_workflow_passes_on_the_lab(tmp_path, monkeypatch):
    """That it fails when forgetting does is seen by test_chain's script, and above."""
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "page.md"))
    monkeypatch.setenv("DSG_WORKSPACE", WORKFLOW["jobs"]["guardrail"]["env"]["DSG_WORKSPACE"])
    (_, *run), (_, *evaluation) = COMMANDS
    for words in (["run", *run, *SMALL_LAB[2:]], ["eval", *evaluation]):
        done = python("-m", "dsg_cli", *map(os.path.expandvars, words), cwd=tmp_path)
        assert done.returncode == 0 and set(done.stderr.splitlines()) <= {"acting: guardrail-001 (dsg)"}, done.stderr
    page = (tmp_path / "page.md").read_text()
    assert page.count("## dsg") == 2 and page.count("✅") == 4 and "❌" not in page
