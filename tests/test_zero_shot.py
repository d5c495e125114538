"""Features picked by meaning: the whole chain on the lab without a word of forget text, and what it refuses."""

import dataclasses
import io
import json
import shutil

import pytest
from dsg_cli.artifacts import FeatureSet, Guardrail, Inspection, Threshold
from dsg_cli.report.picked import candidates_table
from dsg_cli.stages.gathering import gather
from dsg_cli.stages.session import Session

from dsg_cli.recipe import load_recipe
from dsg_cli.report.page import report_of
from dsg_cli.report.tables import artifact_table
from dsg_cli.stages import apply, calibrate, describe, evaluate, inspect, run_recipe, select
from dsg_cli.workspace import Workspace

DOMAINS = ("lab-hexes", "lab-ciphers", "lab-elixirs", "lab-near", "lab-far")
WORDS = "hex cursed dire baneful grim foul"
SMALL = ("corpora.limit=60", "calibrate.alpha=0.1", "eval.benches=[lab-hexes, lab-near]", "eval.limit=16")
SMALL += ("attack.dilution_lengths=[0, 16]", "select.max_rows=8")


def small(folder, *sets):
    file = f"select.descriptions={folder / 'lab.jsonl'}"
    return load_recipe("lab-zero-shot", sets=[*SMALL, file, *sets])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_thread):
    """With descriptions of the lab's features, made from all domains together."""
    made = tmp_path_factory.mktemp("zero-shot")
    recipe = load_recipe(sets=["model.source=lab", "corpora.limit=60"])
    found = describe.run(recipe, Workspace(made / "ws"), made / "lab.jsonl", DOMAINS)
    assert len(found) > 300 and not (made / "ws").exists()
    return made


@pytest.fixture(scope="module")
def workspace(folder):
    return Workspace(folder / "ws")


@pytest.fixture(scope="module")
def chain(folder, workspace):
    return run_recipe.run(small(folder), workspace)


@pytest.fixture(scope="module")
def unseen(folder, workspace, chain):
    """A guardrail of the default gate, which nobody has seen fire."""
    recipe = small(folder, "calibrate.gate=probe", "guardrail.tuning_bench=null")
    threshold = calibrate.run(recipe, workspace, source=chain[0].id)
    return apply.run(recipe, workspace, source=threshold.id)


def shown(stored):
    from rich.console import Console

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(artifact_table(stored))
    return " ".join(console.export_text().split())


def test_descriptions_are_lines_that_select_and_people_read(folder):
    rows = [json.loads(line) for line in (folder / "lab.jsonl").read_text().splitlines()]
    assert all(set(row) == {"index", "description", "n", "rate"} for row in rows)
    assert all(row["n"] >= 1 and 0 < row["rate"] <= 1 and row["description"] for row in rows)
    assert [row["index"] for row in rows] == sorted({row["index"] for row in rows})


def test_the_chain_forgets_what_was_only_described(chain):
    assert [stored.header.kind for stored in chain] == ["features", "threshold", "guardrail", "eval", "attack"]
    results = {bench: sides["unlearned"]["acc"] for bench, sides in chain[3].body.results.items()}
    assert results["lab-hexes"] <= 0.45 and results["lab-near"] >= 0.9
    assert chain[3].body.gate["lab-hexes"]["rate"] >= 0.9 and chain[3].body.gate["lab-near"]["rate"] <= 0.1
    assert chain[4].body.bench == "lab-hexes"  # As the guardrail says, which was tried on it.


def test_what_is_not_known_is_null(chain):
    features = chain[0].body_as(FeatureSet)
    assert chain[0].header.settings["forget"] == [] and features.forget_tokens == 0 and features.probe == {}
    assert all(one.forget_score is None and one.ratio is None for one in features.features)
    assert features.ratio_cut is features.forget_cut is features.percentiles_over is None
    described = features.described
    assert described["query"] == WORDS and described["ranker"] == "bm25" and described["source"] == "lab.jsonl"
    order = [row["index"] for row in described["ranking"]]
    assert [one.index for one in features.features] == [i for i in order if i in {f.index for f in features.features}]
    scores = [row["score"] for row in described["ranking"]]
    assert scores == sorted(scores, reverse=True)
    assert "lab.jsonl" in shown(chain[0]) and "no forget text was read" in shown(chain[0])


def test_text_of_descriptions_is_kept_only_if_asked_for(folder, workspace, chain):
    assert all(set(row) == {"index", "score"} for row in chain[0].body.described["ranking"])
    found = []
    kept = select.run(small(folder, "select.samples=true"), workspace, ranked=found.append)
    texts = {row["index"]: row["description"] for row in kept.body.described["ranking"]}
    assert texts and all(text == found[0].texts[j] for j, text in texts.items())
    assert "dire" in shown(kept) and candidates_table(found[0]).row_count == min(40, len(texts))


def test_an_embedding_model_ranks_too(folder, workspace):
    stored = select.run(small(folder, "select.embedding=lab", "select.max_retain_rate=null"), workspace)
    described = stored.body.described
    assert described["ranker"] == "embedding lab" and len(stored.body.features) == 12
    n_described = len((folder / "lab.jsonl").read_text().splitlines())
    assert len(described["ranking"]) == n_described and all(
        -1.001 <= row["score"] <= 1.001 for row in described["ranking"]
    )


def test_other_descriptions_are_another_selection(folder, workspace, chain):
    again = run_recipe.run(small(folder), workspace, session=Session(reuse=True))
    assert [stored.id for stored in again] == [stored.id for stored in chain]
    lines = (folder / "lab.jsonl").read_text()
    (folder / "lab.jsonl").write_text(lines + "\n")
    assert select.run(small(folder), workspace, session=Session(reuse=True)).id != chain[0].id
    (folder / "lab.jsonl").write_text(lines)


def test_features_that_fire_on_retain_text_are_dropped_and_named(folder, workspace):
    strict, loose = (
        select.run(small(folder, f"select.max_retain_rate={rate}", "select.n_features=4"), workspace)
        for rate in ("0.002", "null")
    )
    rates = workspace.tensors(strict)["retain_rate"]
    assert all(rates[one.index] <= 0.002 for one in strict.body.features)
    dropped = next(note for note in strict.header.notes if note.startswith("Dropped"))
    order = [row["index"] for row in strict.body.described["ranking"]]
    before_last = order[: order.index(strict.body.features[-1].index)]
    assert [int(i) for i in dropped.split(": ")[1][:-1].split(", ")] == [i for i in before_last if rates[i] > 0.002]
    assert [one.index for one in loose.body.features] == order[:4] and not loose.header.notes


def test_the_default_gate_gives_way_and_an_untried_guardrail_says_so(unseen, workspace):
    threshold = workspace.read(unseen.header.inputs[0].id)
    body, guardrail = threshold.body_as(Threshold), unseen.body_as(Guardrail)
    assert body.gate == threshold.header.settings["gate"] == "window" and body.detectors == body.features
    assert any("in the place of the probe" in note for note in threshold.header.notes)
    assert guardrail.effect == {} and guardrail.forget == []
    assert any("nobody has seen it fire" in note for note in unseen.header.notes)
    assert "tried on nothing" in shown(unseen)


def test_apply_tries_it_on_a_forget_corpus(folder, workspace, unseen):
    recipe = small(folder, "corpora.forget=[lab-hexes]", "guardrail.tuning_bench=null")
    tried = apply.run(recipe, workspace, source=unseen.header.inputs[0].id)
    assert tried.body.effect["gate_rate"] > 0.9 and tried.body.forget == ["lab-hexes"]
    assert tried.header.settings["forget"][0]["name"] == "lab-hexes"


@pytest.mark.parametrize("gate", ["mean", "causal-mean"])
def test_the_papers_gates_need_no_forget_text(folder, workspace, chain, gate):
    stored = calibrate.run(small(folder, f"calibrate.gate={gate}"), workspace, source=chain[0].id)
    assert stored.body.gate == gate and stored.body.detectors == [] and not stored.header.notes


def test_a_threshold_may_be_given(folder, workspace, chain):
    recipe = small(folder, "calibrate.gate=mean", "calibrate.threshold=0.6")
    stored = calibrate.run(recipe, workspace, source=chain[0].id)
    assert stored.body.threshold == 0.6 and any("was given" in note for note in stored.header.notes)
    assert "promises nothing" in report_of(gather(workspace, [stored.id]), "t").text
    fresh = [row for row in workspace.rows(stored) if row["part"] == "fresh"]
    assert stored.body.false_positive_rate == sum(row["statistic"] > 0.6 for row in fresh) / len(fresh)


def test_what_was_only_described_can_be_inspected(folder, workspace, unseen):
    found = inspect.run(small(folder), workspace, source=unseen.id, wanted=inspect.Wanted(limit=10)).stored
    features = found.body_as(Inspection).features
    assert features and all(one["forget_score"] is None and one["retain_score"] >= 0 for one in features)
    assert not [warning for one in features for warning in one["warnings"] if "forgotten" in warning]


def test_a_report_shows_descriptions_only_with_the_text_and_says_what_was_never_tried(folder, workspace, unseen):
    kept = select.run(small(folder, "select.samples=true"), workspace)
    gathered = gather(workspace, [kept.id, unseen.id])
    described = kept.body.described["ranking"][0]["description"]
    assert described not in report_of(gathered, "t").text
    assert described in report_of(gathered, "t", has_text=True).text
    assert "never tried on text that it should catch" in report_of(gathered, "t").text


def test_eval_says_that_it_cannot_check_what_nobody_named(folder, workspace, unseen):
    stored = evaluate.run(small(folder), workspace, sources=[unseen.id])
    assert any("is not checked" in note and "--expect" in note for note in stored.header.notes)


def test_features_by_hand_with_and_without_forget_text(folder, workspace, chain):
    recipe = small(folder, "select.describe=null", "select.descriptions=null", "select.features=[331, 7, 468]")
    alone = select.run(recipe, workspace)
    assert [one.index for one in alone.body.features] == [331, 7, 468] and alone.body.described == {}
    assert all(one.ratio is None for one in alone.body.features) and "Named by hand" in shown(alone)
    corpora = dataclasses.replace(recipe.corpora, forget=["lab-hexes"])
    measured = select.run(dataclasses.replace(recipe, corpora=corpora), workspace)
    first, formatted, _ = measured.body.features
    assert first.index == 331 and first.ratio > 10 * formatted.ratio and measured.body.probe
    assert [one.retain_score for one in measured.body.features] == [one.retain_score for one in alone.body.features]
    assert calibrate.run(load_recipe(sets=["calibrate.alpha=0.1"]), workspace, source=measured.id).body.gate == "probe"


LAB = ("--model", "lab", "--retain", "lab-near")
SELECT = {
    ("--describe", "hex"): "Nobody is known to have described the features of lab",
    ("--describe", "hex", "--descriptions", "missing.jsonl"): "missing.jsonl cannot be read",
    ("--describe", "hex", "--descriptions", "bad.jsonl"): "bad.jsonl",
    ("--describe", "dragons", "--descriptions", "lab.jsonl"): "No description matches 'dragons'",
    ("--describe", "hex", "--features", "1"): "leave one out",
    ("--descriptions", "lab.jsonl"): "for select.describe, which is not given",
    ("--features", "1,768"): "there is no 768",
    ("--features", "1,1"): "different whole numbers",
    ("--features", "1,x"): "no list of indices",
    ("--features", "-1"): "no list of indices",
    ("--features", "1", "--set", "select.max_retain_rate=2"): "a share from 0 to 1",
    ("--describe", "hex", "--descriptions", "lab.jsonl", "--embedding", "./none"): "No model folder",
    (): "No forget corpus is named",
}


@pytest.fixture
def unloaded(monkeypatch):
    """No model's weights are loaded."""

    def refuse(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)


@pytest.mark.parametrize("arguments", SELECT, ids=" ".join)
def test_select_refuses_before_weights_are_loaded(dsg, tmp_path, folder, unloaded, arguments):
    shutil.copy(folder / "lab.jsonl", tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"index": 9999, "description": "hex"}\n')
    code, out, err = dsg("select", *LAB, *arguments)
    assert code == 1 and SELECT[arguments] in err and not out, err
    assert not list((tmp_path / "dsg-workspace").glob("*"))


def test_select_needs_retain_text_all_the_same(dsg, folder, unloaded):
    code, _, err = dsg("select", "--model", "lab", "--describe", "hex", "--descriptions", folder / "lab.jsonl")
    assert code == 1 and "No retain corpus is named" in err


LATER = {
    "calibrate --from {features} --gate cusum": "the gate cusum lies half-way",
    "apply --from {threshold} --strength auto": "no questions to choose on",
    "apply --from {threshold} --forget lab-near": "both to be forgotten and to be retained",
    "apply --method static-clamp --from {features}": "picked without forget text",
    "apply --method npo --from {features}": "No forget corpus is named",
    "attack --from {guardrail} --kind dilution": "Nothing says what was to be forgotten",
    "study stability --from {features}": "a study selects by forget text",
    "study stability --recipe lab-zero-shot": "a study selects by forget text",
    "compare --recipe lab-zero-shot": "Nothing says what the methods should unlearn",
    "compare --from {guardrail}": "Nothing says what was to be forgotten",
}


@pytest.mark.parametrize("command", LATER)
def test_later_commands_say_what_they_need_forget_text_for(dsg, workspace, chain, unseen, unloaded, command):
    ids = {"features": chain[0].id, "threshold": unseen.header.inputs[0].id, "guardrail": unseen.id}
    code, out, err = dsg(*command.format(**ids).split(), "-w", workspace.folder.resolve())
    assert code == 1 and LATER[command] in err and not out, err


DESCRIBE = {
    ("there.jsonl", "--corpus", "lab-far"): "there.jsonl exists",
    ("folder", "--corpus", "lab-far", "--force"): "folder exists",
    ("no/such/file", "--corpus", "lab-far"): "There is no folder no/such",
    ("new.jsonl", "--corpus", "lab-fra"): "Did you mean lab-far",
    ("new.jsonl", "--corpus", "lab-far", "--sae", "gemma-scope-2b-pt-res/layer_3/width"): "has no SAE layer_3/width",
}


@pytest.mark.parametrize("arguments", DESCRIBE, ids=" ".join)
def test_describe_refuses_before_weights_are_loaded(dsg, tmp_path, unloaded, arguments):
    (tmp_path / "there.jsonl").write_text("mine")
    (tmp_path / "folder").mkdir()
    code, out, err = dsg("describe", *arguments, "--model", "lab")
    assert code == 1 and DESCRIBE[arguments] in err and not out, err
    assert (tmp_path / "there.jsonl").read_text() == "mine" and not (tmp_path / "new.jsonl").exists()


def test_describe_and_select_as_commands(dsg, tmp_path):
    (tmp_path / "mine.jsonl").write_text("old")
    small = ("--model", "lab", "--limit", "12")
    code, out, err = dsg("describe", "mine.jsonl", "--force", "--corpus", "lab-hexes", *small)
    assert code == 0 and out == "mine.jsonl\n", err
    words = (
        "--describe",
        "hex dragon",
        "--descriptions",
        "mine.jsonl",
        "-n",
        "3",
        "--set",
        "select.max_retain_rate=0.2",
    )
    code, out, err = dsg("select", *words, *LAB, "--limit", "12")
    assert code == 0 and out == "features-001\n", err
    assert "match 'hex dragon'" in err and "No description has the word dragon" in err
    code, out, err = dsg("select", "--features", "5, 9", "--samples", *LAB, "--limit", "12", "--json", "--quiet")
    assert code == 0 and err == "" and [one["index"] for one in json.loads(out)["features"]] == [5, 9]
