"""`dsg calibrate` and `dsg apply` on the lab: what each gate watches, what is reported, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from dsg_cli.artifacts import FeatureSet, Guardrail, Threshold
from dsg_cli.selection import formatting_notes
from dsg_cli.stages.tuning import SATURATED, tuning_questions

from dsg_cli.errors import DsgError
from dsg_cli.recipe import load_recipe
from dsg_cli.stages import apply, calibrate, select
from dsg_cli.workspace import Workspace

SETS = ["corpora.limit=120", "calibrate.max_pieces=600", "calibrate.alpha=0.05", "eval.limit=32"]


@pytest.fixture(scope="module")
def selected(tmp_path_factory):
    """A workspace with features of the lab, and the recipe that made them."""
    recipe, workspace = load_recipe("lab", sets=SETS), Workspace(tmp_path_factory.mktemp("selected"))
    return workspace, select.run(recipe, workspace)


def calibrated(selected, *sets):
    workspace, features = selected
    recipe = load_recipe("lab", sets=[*SETS, *sets])
    return recipe, calibrate.run(recipe, workspace, source=features.id)


def test_the_probe_and_its_guarantee(selected):
    _, features = selected
    probe = features.body_as(FeatureSet).probe
    assert len(probe["features"]) == 8 and probe["path"][-1]["balanced_accuracy"] > 0.85
    _, stored = calibrated(selected)
    body = stored.body_as(Threshold)
    assert body.detectors == [one["index"] for one in probe["features"]]
    assert body.weights == [one["weight"] for one in probe["features"]] and body.bias == probe["bias"]
    rows = [json.loads(line) for line in stored.path.with_suffix(".jsonl").read_text().splitlines()]
    assert {row["part"] for row in rows} == {"calibrate", "fresh", "long", "forget", "questions"}
    # The threshold is the largest of what each corpus asks for by itself: none exceeds alpha, one is at it.
    shares = {}
    for row in rows:
        if row["part"] == "calibrate":
            shares.setdefault(row["group"], []).append(row["statistic"] > body.threshold)
    assert set(shares) == {"lab-near", "lab-far", "lab-ciphers", "lab-elixirs"}
    assert all(sum(values) <= 0.05 * (len(values) + 1) for values in shares.values())
    assert any(sum(values) + 1 > 0.05 * (len(values) + 1) - 1 for values in shares.values())
    rates = {one["what"]: one for one in body.rates}
    assert rates["lab-hexes"]["rate"] > 0.85 and rates["lab-hexes, dev questions"]["rate"] == 1.0
    assert rates["lab-far"]["low"] <= rates["lab-far"]["rate"] <= rates["lab-far"]["high"] <= 0.2
    assert "lab-far, more than 128 tokens" in rates and not rates["lab-far"]["is_forget"]
    assert all(row["length"] > 128 for row in rows if row["part"] == "long")


def test_pooled_is_the_weaker_guarantee(selected):
    _, each = calibrated(selected)
    _, pooled = calibrated(selected, "calibrate.guarantee=pooled")
    assert pooled.body_as(Threshold).threshold < each.body_as(Threshold).threshold
    _, plain = calibrated(selected, "calibrate.guarantee=pooled", "calibrate.quantile=percentile")
    assert plain.body_as(Threshold).threshold == plain.body_as(Threshold).percentile


def test_lengths_are_those_of_my_prompts(selected, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is the keeper of Rahurk? Answer:\n" * 3 + " ".join(["city"] * 20) + "\n")
    _, stored = calibrated(selected, f"calibrate.lengths_from={prompts}")
    rows = [json.loads(line) for line in stored.path.with_suffix(".jsonl").read_text().splitlines()]
    lengths = [row["length"] for row in rows if row["part"] == "calibrate"]
    assert stored.header.settings["lengths"] == [9, 20] and min(lengths) == 9 and max(lengths) == 20
    assert sum(length in (9, 20) for length in lengths) > 0.7 * len(lengths)  # The others are ends of documents.
    prompts.write_text("city\n")
    with pytest.raises(DsgError, match="has 1 tokens, fewer than the window of 4"):
        calibrated(selected, f"calibrate.lengths_from={prompts}")
    prompts.write_text("\n")
    with pytest.raises(DsgError, match="holds no prompt"):
        calibrated(selected, f"calibrate.lengths_from={prompts}")


def test_what_cannot_be_calibrated(selected, tmp_path):
    with pytest.raises(DsgError, match="of lab-near cannot set a threshold at alpha 0.0001"):
        calibrated(selected, "calibrate.alpha=0.0001", "calibrate.retain=[lab-near]")
    with pytest.raises(DsgError, match="longer than the shortest piece"):
        load_recipe("lab", sets=["calibrate.window=9"])
    with pytest.raises(DsgError, match="others have no dev questions"):
        calibrated(selected, "calibrate.questions=[mmlu]")
    bare = Workspace(tmp_path)
    features = select.run(load_recipe("lab", sets=[*SETS, "select.probe_features=0"]), bare)
    assert features.body_as(FeatureSet).probe == {}
    with pytest.raises(DsgError, match="features-001 has no probe"):
        calibrate.run(load_recipe("lab", sets=SETS), bare)


@pytest.mark.parametrize("gate", ["window", "cusum"])
def test_gates_that_watch_detectors(selected, gate):
    recipe, stored = calibrated(selected, f"calibrate.gate={gate}")
    body = stored.body_as(Threshold)
    assert len(body.detectors) == 5 and body.threshold > 0
    rates = {one["what"]: one["rate"] for one in body.rates}
    assert rates["lab-hexes, dev questions"] > 0.9 and rates["lab-far"] < 0.1
    guard = apply.run(recipe, selected[0], source=stored.id).body_as(Guardrail)
    assert guard.gate == gate and guard.effect["gate_rate"] > 0.8


def test_auto_takes_the_smallest_strength_that_forgets_as_well(selected):
    strengths = "guardrail.strengths=[0.01r, 2r, 8r]"
    recipe, threshold = calibrated(selected, "guardrail.strength=auto", strengths)
    body = apply.run(recipe, selected[0], source=threshold.id).body_as(Guardrail)
    trials = body.strength_trials
    assert [trial["setting"] for trial in trials] == ["0.01r", "2r", "8r"]
    lowest = min(trial["acc"] for trial in trials)
    enough = [trial["strength"] for trial in trials if trial["acc"] <= lowest + SATURATED]
    assert body.strength == min(enough) and trials[0]["acc"] > 0.9  # So small a clamp does nothing.
    assert body.strength_setting == "auto"


def test_auto_needs_questions_that_are_not_reported():
    recipe = load_recipe("lab", sets=["guardrail.strength=auto"])
    assert len(tuning_questions(recipe, ["lab-hexes"])) == 48
    with pytest.raises(DsgError, match="no questions to choose on"):
        tuning_questions(recipe, ["wmdp-bio"])
    with pytest.raises(DsgError, match="is reported"):
        sets = ["guardrail.tuning_bench=mmlu", "eval.benches=[mmlu]"]
        tuning_questions(load_recipe("lab", sets=sets), ["wmdp-bio"])
    with pytest.raises(DsgError, match="has none to try"):
        apply.check_strength(load_recipe("lab", sets=["guardrail.strength=auto", "guardrail.strengths=[]"]).guardrail)


def test_formatting_features_are_named():
    chat, plain = torch.tensor([0.3, 0.3, 0.01, 0.0]), torch.tensor([0.01, 0.2, 0.0, 0.5])
    (note,) = formatting_notes(chat, plain, [0, 1, 2, 3])
    assert note.startswith("Feature 0 looks like formatting") and "30.0%" in note
    assert formatting_notes(chat, plain, [1, 2, 3]) == []


def test_no_text_is_kept(selected):
    _, stored = calibrated(selected)
    assert "Rahurk" not in stored.path.read_text() + Path(stored.path.with_suffix(".jsonl")).read_text()
