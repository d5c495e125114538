"""Methods side by side: the same search for each, one table, and a row that says why where a method fails."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path

import pytest
from conftest import write_task
from rich.console import Console

from dsg_cli.errors import DsgError
from dsg_cli.methods import METHODS, section_of
from dsg_cli.recipe import load_recipe, with_values
from dsg_cli.report.comparison import comparison_markdown, comparison_table
from dsg_cli.stages import compare
from dsg_cli.stages.stage import RunOptions
from dsg_cli.workspace.files import Signalled, install
from dsg_cli.workspace.results import Comparison
from dsg_cli.workspace.store import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")

SETS = [
    *("compare.budget=2", "eval.limit=12", "attack.known_questions=4", "compare.relearn_steps=[0, 2]"),
    *("compare.other=[lab-far]", "compare.saes=[lab-1]", "compare.sequence=[lab-ciphers]", "corpora.limit=80"),
    *("methods.gradient_ascent.steps=4", "compare.grids={gradient-ascent: {learning_rate: [1e-4, 1e30]}}"),
    *("compare.methods=[static-clamp, prompt, gradient-ascent, grad-diff]", "select.probe_features=0"),
    *("methods.grad_diff.learning_rate=1e30", "methods.static_clamp.strength=4r", "compare.relearn_learning_rate=1e-3"),
]


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("lab-compare", sets=SETS)


@pytest.fixture(scope="module")
def compared(recipe, tmp_path_factory):
    workspace = Workspace(tmp_path_factory.mktemp("compared"))
    return workspace, compare.run(recipe, workspace)


def test_every_method_has_its_row_and_every_trial_is_there(compared):
    workspace, stored = compared
    body = stored.body_as(Comparison)
    trained = ["prompt", "gradient-ascent", "grad-diff"]
    assert [row["method"] for row in body.rows] == ["static-clamp", "static-clamp", *trained]
    assert [row["sae"] for row in body.rows] == ["lab", "lab-1", "", "", ""]
    failed = body.rows[-1]
    assert "not finite" in failed["error"] and failed["results"] == {} and failed["artifacts"] == []
    assert [trial["method"] for trial in body.trials] == [
        *("static-clamp", "prompt", "gradient-ascent", "gradient-ascent", "grad-diff")
    ]
    assert [trial["is_chosen"] for trial in body.trials] == [True, True, True, False, False]
    assert [bool(trial["error"]) for trial in body.trials] == [False, False, False, True, True]
    chosen = next(trial for trial in body.trials if trial["method"] == "gradient-ascent" and trial["is_chosen"])
    assert chosen["values"] == {"methods.gradient_ascent.learning_rate": 1e-4} == body.rows[3]["values"]
    assert set(chosen["dev"]) == {"lab-hexes", "lab-near", "lab-far"} == set(body.rows[3]["results"])
    assert chosen["forget"] == chosen["dev"]["lab-hexes"]
    for row in body.rows[:-1]:
        assert workspace.read(row["artifacts"][-1]) and workspace.read(row["eval"]) and workspace.read(row["attack"])
        assert row["relearned"]["x"] == 2
    # Everybody's unguarded side is the same model under the same attack.
    assert len({row["relearned"]["unguarded"] for row in body.rows[:-1]}) == 1
    clamp, prompt, ascent = body.rows[0], body.rows[2], body.rows[3]
    assert clamp["n_features"] == 20 and clamp["gate"] and not prompt["gate"] and not ascent["gate"]
    assert ascent["cost"]["backward_tokens"] > 0 == clamp["cost"]["backward_tokens"] < clamp["cost"]["forward_tokens"]
    assert prompt["cost"]["bytes"] < clamp["cost"]["bytes"] < ascent["cost"]["bytes"]


def test_requests_come_one_after_another(compared):
    workspace, stored = compared
    sequences = stored.body_as(Comparison).sequences
    assert not any(sequence["error"] for sequence in sequences)
    curves = {sequence["method"]: sequence["curve"] for sequence in sequences}
    assert set(curves) == {"static-clamp", "prompt", "gradient-ascent"}
    for name, (first, second) in curves.items():
        assert (first["request"], second["request"]) == ("lab-hexes", "lab-ciphers")
        assert set(second["results"]) == {"lab-hexes", "lab-ciphers", "lab-near", "lab-far"}
        assert len(second["artifacts"]) == (1 if name == "gradient-ascent" else 2)
    first, second = curves["gradient-ascent"]
    last = workspace.read(second["artifacts"][0])
    assert last.header.model.source.endswith(first["artifacts"][0])
    assert [corpus["name"] for corpus in last.header.settings["retain"]] == ["lab-near", "lab-far", "lab-elixirs"]


def test_the_tables(compared):
    body = compared[1].body_as(Comparison)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(comparison_table(body))
    text = console.export_text()
    assert all(len(line) <= 80 for line in text.splitlines())
    markdown = comparison_markdown(body)
    for shown in (text, markdown):
        for words in ("static-clamp, lab-1", "prompt", "gradient-ascent", "(base model)", "not finite", "lab-ciphers"):
            assert words in shown, words
    rows = [line for line in markdown.splitlines() if line.startswith("| `")]
    assert len({line.count("|") for line in rows[:5]}) == 1
    acc = body.rows[3]["results"]["lab-hexes"]["acc"]
    assert f"| `gradient-ascent` | {acc:.2f} |" in markdown


def test_collecting_what_is_there(compared, recipe):
    workspace, stored = compared
    row = stored.body_as(Comparison).rows[3]
    sources = [row["artifacts"][0], f"{row['artifacts'][0]}+wrapper-001"]
    collected = compare.run(recipe, workspace, sources=sources).body_as(Comparison)
    assert [one["method"] for one in collected.rows] == ["gradient-ascent", "gradient-ascent + prompt"]
    assert collected.trials == [] and collected.rows[0]["results"] == row["results"]
    assert comparison_table(collected) and comparison_markdown(collected)


def test_an_interrupted_search_goes_on_with_the_trials_it_has(recipe, compared, tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    install()
    short = with_values(recipe, {"compare.methods": ["gradient-ascent"], "compare.saes": [], "compare.sequence": []})
    said = []

    def interrupt(text):
        said.append(text)
        if "trial 2" in text:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        with pytest.raises(Signalled):
            compare.run(short, Workspace(tmp_path), options=RunOptions(say=interrupt))
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert any("trial 1" in text for text in said) and not list(tmp_path.glob(".compare-*.tmp"))
    again = []
    stored = compare.run(short, Workspace(tmp_path), options=RunOptions(say=again.append, resume=True))
    assert not any("trial 1" in text for text in again)
    whole = compared[1].body_as(Comparison)
    trials = [trial for trial in whole.trials if trial["method"] == "gradient-ascent"]
    assert [one["dev"] for one in stored.body_as(Comparison).trials] == [one["dev"] for one in trials]
    assert stored.body_as(Comparison).rows[0]["results"] == whole.rows[3]["results"]


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["compare.methods=[npoo]"], "compare.methods.0 is 'npoo'; there is no method"),
        (["compare.grids={npo: {betta: [1]}}", "compare.methods=[npo]"], "betta"),
        (["compare.grids={npo: {beta: [0]}}", "compare.methods=[npo]"], r"methods\.npo\.beta is 0"),
        (["compare.budget=0"], r"compare\.budget is 0"),
        (["compare.near=[lab-near, lab-far]"], "stands twice"),
        (["compare.near=[lab-nearr]"], "There is no bench named lab-nearr"),
        (["compare.sequence=[lab-retain]"], "No bench is named like the forget corpus"),
        (["compare.relearn_steps=[5, 10]"], r"compare\.relearn_steps"),
        (["corpora.forget=[]"], "Nothing says what the methods should unlearn"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(sets, words, tmp_path):
    with pytest.raises(DsgError, match=words):
        compare.run(load_recipe("lab-compare", sets=[*SETS, *sets]), Workspace(tmp_path))
    assert not Workspace(tmp_path).ids()


def test_the_command_line(dsg):
    small = ["--set", "compare.relearn_steps=[]", "--set", "compare.sequence=[]", "--set", "eval.limit=4", "-w", "ws"]
    code, out, err = dsg("compare", "--recipe", "lab-compare", "--method", "prompt", *small, "--summary", "summary.md")
    assert code == 0 and "prompt" in out and "compare-001 in ws" in out, err
    assert "## dsg: compare-001" in Path("summary.md").read_text()
    code, out, _ = dsg("compare", "--recipe", "lab-compare", "--method", "prompt", *small, "--json", "--reuse")
    assert code == 0 and json.loads(out)["id"] == "compare-001"
    code, out, _ = dsg("compare", "--from", "wrapper-001", "--bench", "lab-hexes", *small, "--markdown")
    assert code == 0 and "| `prompt` |" in out
    code, out, err = dsg("compare", "--from", "wrapper-009", "--bench", "lab-hexes", *small)
    assert code == 1 and "no artifact wrapper-009" in err and not out


def test_what_is_reported_is_never_searched_on(folders, tmp_path):
    write_task(tmp_path / "tasks", [{"q": f"w{i} w{i + 1}", "c": [" w40", " w41"], "a": i % 2} for i in range(24)])
    sets = [f"model.source={folders['model']}", f"eval.include_path={tmp_path / 'tasks'}", "compare.forget=mine"]
    sets += [f"corpora.{role}=[{folders[f'{role}.jsonl']}]" for role in ("forget", "retain")]
    sets += ["compare.methods=[prompt]", "compare.relearn_steps=[0, 1]", "attack.known_questions=4"]
    grid = "compare.grids={prompt: {topic: [a, b]}}"
    with pytest.raises(DsgError, match="mine is reported, so the settings of prompt cannot be searched"):
        compare.run(load_recipe(sets=[*sets, grid]), Workspace(tmp_path / "a"))
    alone = compare.run(load_recipe(sets=sets), Workspace(tmp_path / "b")).body_as(Comparison)
    assert alone.trials == [] and alone.base["dev"] == {} and len(alone.rows) == 1 and not alone.rows[0]["error"]
    assert comparison_table(alone) and comparison_markdown(alone)


@pytest.mark.slow
def test_every_method_at_a_tiny_budget(tmp_path):
    """The table of recipes/RESULTS.md, with a trial a method and hardly any training."""
    steps = [f"methods.{section_of(name)}.steps=3" for name, one in METHODS.items() if one.is_trained]
    small = ["corpora.limit=100", "eval.limit=24", "attack.known_questions=8", "methods.ssd.n_rows=16"]
    small += ["compare.budget=1", "compare.saes=[]", "compare.sequence=[]", "compare.relearn_steps=[0, 2]"]
    small += ["compare.grids={dsg: {select.n_features: [8]}}"]
    small += [f"methods.{name}.strength=4r" for name in ("static_clamp", "conditional_clamp")]
    recipe = load_recipe("lab-compare", sets=[*small, "methods.refusal_clamp.coefficient=4r", *steps])
    body = compare.run(recipe, Workspace(tmp_path)).body_as(Comparison)
    rivals = [name for name, one in METHODS.items() if not one.finetunes]
    assert [row["method"] for row in body.rows] == rivals and not any(row["error"] for row in body.rows)
    found = {row["method"]: row["results"] for row in body.rows}
    assert found["dsg"]["lab-hexes"]["acc"] <= 0.35 and found["dsg"]["lab-near"]["acc"] >= 0.9
    assert found["input-filter"]["lab-hexes"]["acc"] <= 0.4 and found["prompt"]["lab-hexes"]["acc"] >= 0.9
    assert all(method in comparison_markdown(body) for method in rivals)
