"""The threshold and its guarantee."""

from __future__ import annotations

import json
import math
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import refuses

from dsg_cli.data.tokens import cut_pieces
from dsg_cli.errors import DsgError
from dsg_cli.guardrail.calibration import conformal_threshold, percentile_threshold, pieces_needed, threshold_of
from dsg_cli.guardrail.selection import formatting_notes
from dsg_cli.intervals import clopper_pearson, rate_above
from dsg_cli.recipe import load_recipe
from dsg_cli.stages import apply, calibrate, select
from dsg_cli.stages.apply import SATURATED, tuning_questions
from dsg_cli.workspace.artifacts import FeatureSet, Guardrail, Threshold
from dsg_cli.workspace.store import Workspace


def test_threshold_is_the_conformal_rank():
    values = [i / 100 for i in range(1, 100)]  # n = 99
    assert conformal_threshold(values, 0.05) == 0.95
    assert conformal_threshold(values[::-1], 0.10) == 0.90
    assert conformal_threshold(values[:19], 0.05) == 0.19


def test_coverage_by_simulation():
    """Over many draws a new value exceeds the threshold with probability at most alpha, and not much less."""
    rng = np.random.default_rng(0)
    alpha, n = 0.1, 59
    rates = []
    for _ in range(400):
        threshold = conformal_threshold(list(rng.beta(1, 5, n)), alpha)
        rates.append(float((rng.beta(1, 5, 2000) > threshold).mean()))
    error = np.std(rates) / np.sqrt(len(rates))
    assert alpha - 1 / (n + 1) - 3 * error <= np.mean(rates) <= alpha + 3 * error


def test_too_few_pieces_or_a_bad_alpha_are_refused():
    refuses("18 pieces.*at least 19", conformal_threshold, [0.1] * 18, 0.05)
    for alpha in (0, 1, -1, 2):
        refuses("between 0 and 1", conformal_threshold, [0.1] * 50, alpha)


def test_the_number_of_pieces_needed_is_the_least_that_works():
    for alpha in (0.5, 0.3, 0.1, 0.05, 0.03, 0.01, 1 / 3):
        n = pieces_needed(alpha)
        assert conformal_threshold(list(range(n)), alpha) == n - 1
        refuses(f"at least {n} are needed", conformal_threshold, list(range(n - 1)), alpha, what="lab-near")


def test_coverage_holds_for_each_corpus():
    """200 draws of a mixture in which one corpus lies higher: its own rate is kept only by the guarantee for each."""
    rng = np.random.default_rng(1)
    alpha, rates = 0.1, {True: [], False: []}
    for _ in range(200):
        drawn = [("far", x) for x in rng.normal(0, 1, 300)] + [("near", x) for x in rng.normal(1, 1, 60)]
        fresh_near = rng.normal(1, 1, 500)
        for is_each in rates:
            rates[is_each].append(rate_above(threshold_of(drawn, alpha, is_each=is_each), fresh_near.tolist())["rate"])
    error = np.std(rates[True]) / np.sqrt(200)
    assert alpha - 1 / 61 - 3 * error <= np.mean(rates[True]) <= alpha + 3 * error
    assert np.mean(rates[False]) > 2 * alpha


def test_the_papers_percentile_is_the_plain_one():
    values = list(range(101))
    assert percentile_threshold(values, 0.05) == 95.0
    pairs = [("a", float(value)) for value in values]
    assert threshold_of(pairs, 0.05, is_each=True, is_conformal=False) == 95.0
    assert threshold_of(pairs, 0.05, is_each=True) == 96.0
    refuses("no piece", threshold_of, [], 0.05, is_each=True, is_conformal=False)
    refuses("0 pieces of retain text", threshold_of, [], 0.05, is_each=True)


def test_lengths_are_drawn_from_those_given():
    pieces = cut_pieces(list(range(500)), random.Random(0), lengths=[9, 9, 30], n_head=0)
    assert {len(piece) for piece in pieces[:-1]} == {9, 30}


def test_pieces_are_consecutive_and_of_the_lengths_asked_for():
    row = [2, *range(10, 210)]
    pieces = cut_pieces(row, random.Random(0), lengths=range(8, 33), n_head=1)
    assert all(piece[0] == 2 and piece.count(2) == 1 for piece in pieces)
    joined = [token for piece in pieces for token in piece[1:]]
    assert joined == row[1 : 1 + len(joined)] and len(row) - 1 - len(joined) < 8
    assert all(8 <= len(piece) - 1 <= 32 for piece in pieces[:-1])
    assert cut_pieces([2, 5, 6], random.Random(0), lengths=range(8, 33), n_head=1) == []


@pytest.mark.parametrize(("k", "n"), [(0, 20), (3, 50), (50, 50)])
def test_interval_is_the_exact_one(k, n):
    """Its ends are the rates at which k or more, and k or fewer, happen with probability 0.025."""

    def at_most(count, rate):
        return sum(math.comb(n, i) * rate**i * (1 - rate) ** (n - i) for i in range(count + 1))

    low, high = clopper_pearson(k, n)
    assert (low == 0) if k == 0 else 1 - at_most(k - 1, low) == pytest.approx(0.025)
    assert (high == 1) if k == n else at_most(k, high) == pytest.approx(0.025)
    assert clopper_pearson(0, 0) == (0.0, 1.0)


SETS = ["corpora.limit=80", "calibrate.max_pieces=600", "calibrate.alpha=0.05", "eval.limit=32"]


@pytest.fixture(scope="module")
def selected(lab_chain, tmp_path_factory):
    """A workspace with features of the lab, to be written to."""
    workspace = Workspace(shutil.copytree(lab_chain, tmp_path_factory.mktemp("selected") / "ws"))
    return workspace, workspace.read("features-001")


def calibrated(selected, *sets):
    workspace, features = selected
    recipe = load_recipe("lab", sets=[*SETS, *sets])
    return recipe, calibrate.run(recipe, workspace, source=features.id)


@pytest.fixture(scope="module")
def by_probe(selected):
    """The threshold of the recipe as it is."""
    return calibrated(selected)[1]


def test_the_probe_and_its_guarantee(selected, by_probe):
    _, features = selected
    probe = features.body_as(FeatureSet).probe
    assert len(probe["features"]) == 8 and probe["path"][-1]["balanced_accuracy"] > 0.85
    body = by_probe.body_as(Threshold)
    assert body.detectors == [one["index"] for one in probe["features"]]
    assert body.weights == [one["weight"] for one in probe["features"]] and body.bias == probe["bias"]
    rows = [json.loads(line) for line in by_probe.path.with_suffix(".jsonl").read_text().splitlines()]
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


def test_pooled_is_the_weaker_guarantee(selected, by_probe):
    _, pooled = calibrated(selected, "calibrate.guarantee=pooled")
    assert pooled.body_as(Threshold).threshold < by_probe.body_as(Threshold).threshold
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
    refuses("has 1 tokens, fewer than the window of 4", calibrated, selected, f"calibrate.lengths_from={prompts}")
    prompts.write_text("\n")
    refuses("holds no prompt", calibrated, selected, f"calibrate.lengths_from={prompts}")


def test_what_cannot_be_calibrated(selected, tmp_path):
    with pytest.raises(DsgError, match="of lab-near cannot set a threshold at alpha 0.0001"):
        calibrated(selected, "calibrate.alpha=0.0001", "calibrate.retain=[lab-near]")
    refuses("longer than the shortest piece", load_recipe, "lab", sets=["calibrate.window=9"])
    refuses("others have no dev questions", calibrated, selected, "calibrate.questions=[mmlu]")
    bare = Workspace(tmp_path)
    features = select.run(load_recipe("lab", sets=[*SETS, "select.probe_features=0"]), bare)
    assert features.body_as(FeatureSet).probe == {}
    refuses("features-001 has no probe", calibrate.run, load_recipe("lab", sets=SETS), bare)


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
    refuses("no questions to choose on", tuning_questions, recipe, ["wmdp-bio"])
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


def test_no_text_is_kept(by_probe):
    assert "Rahurk" not in by_probe.path.read_text() + by_probe.path.with_suffix(".jsonl").read_text()
