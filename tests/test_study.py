"""Studies: what a point measures is what the stages measure, nothing is computed twice, and failures keep their row."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import write_task
from rich.console import Console

from dsg_cli.data.corpora import load_corpora
from dsg_cli.errors import DsgError
from dsg_cli.intervals import median_interval
from dsg_cli.lab import data as lab
from dsg_cli.recipe import load_recipe, with_values
from dsg_cli.report.studies import failures, study_headline, study_markdown, study_table
from dsg_cli.report.tables import artifact_table
from dsg_cli.settings import GridValues
from dsg_cli.stages import apply, calibrate, evaluate, study
from dsg_cli.stages.stage import RunOptions
from dsg_cli.studies import AXES, OF_A_GUARDRAIL, STUDIES, load_study, points_of
from dsg_cli.studies import studies as cost
from dsg_cli.studies.studies import known_names, share_of
from dsg_cli.studies.sweep import MEASURES, csv_text, rate_row
from dsg_cli.workspace import store as verify
from dsg_cli.workspace.artifacts import Threshold
from dsg_cli.workspace.files import Signalled, install
from dsg_cli.workspace.results import EvalReport, StudyReport
from dsg_cli.workspace.store import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")

SETS = [
    *("corpora.limit=80", "corpora.retain=[lab-near, lab-far]", "calibrate.alpha=0.05", "select.probe_tokens=8000"),
    *("select.probe_candidates=60", "study.benches=[lab-near, lab-far]", "eval.limit=16", "study.repeats=5"),
]


SMALL = {
    "stability": "{n_features: [4, 8, 700], strength: [1r, 16r], ratio_percentile: [95], alpha: [0.05, 0.1]}",
    "data-efficiency": "{by: [documents, entities], share: [10, 100]}",
    "sequential": "{requests: [1, 2]}",
    "seeds": "{sae: [lab, lab-1], seed: [0, 1]}",
    "length": "{length: [8, 24, 500], alpha: [0.05, 0.2]}",
    "cost": "{length: [8, 4000], batch_size: [1, 3]}",
}


def recipe_for(name, *sets):
    grid = [f"study.grids={{{name}: {SMALL[name]}}}"] if name in SMALL else ["study.grids={}"]
    return load_recipe("lab", sets=[*SETS, "study.sequence=[lab-ciphers]", *grid, *sets])


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """One for all: features are selected once."""
    return Workspace(tmp_path_factory.mktemp("studied"))


@pytest.fixture(scope="module")
def stability(workspace):
    return study.run(recipe_for("stability"), workspace, "stability")


@pytest.fixture(scope="module")
def whole(stability):
    return stability.body_as(StudyReport)


@pytest.fixture
def alone(workspace, stability, tmp_path):
    """A workspace of its own with the features that every study begins with."""
    for path in workspace.folder.glob("features-001.*"):
        shutil.copy(path, tmp_path)
    return Workspace(tmp_path)


def measured(workspace, name, *sets):
    return study.run(recipe_for(name, *sets), workspace, name).body_as(StudyReport)


def rows_at(body, metric="acc", **values):
    return [row for row in body.rows if row["metric"] == metric and values.items() <= row.items()]


def row_at(body, metric="acc", **values):
    (row,) = rows_at(body, metric, **values)
    return row


def printed(body):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(study_table(body))
    text = console.export_text()
    assert all(len(line) <= 80 for line in text.splitlines())
    return text


def wilson_by_hand(k, n, z=1.959963984540054):
    centre, half = k / n + z * z / (2 * n), z * math.sqrt(k / n * (1 - k / n) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def test_one_pass_serves_every_point(stability, workspace, whole):
    assert whole.columns == list(OF_A_GUARDRAIL) and whole.split == "dev" and whole.study == "stability"
    assert whole.computed["n_points"] == 12 and whole.computed["n_failed"] == 4
    assert whole.computed["text_passes"] == 0 and whole.computed["gate_passes"] == 1
    # The base model answers all questions once; a guarded one only what its gate opens on.
    assert whole.computed["n_requests"] < whole.computed["asked"] < (1 + 8) * whole.computed["n_requests"] / 2
    assert [stored.id for stored in stability.header.inputs] == ["features-001"]
    assert stability.header.inputs[0].sha256 == workspace.read("features-001").json["sha256"]
    assert not {"threshold", "guardrail", "eval"} & {name.split("-")[0] for name in workspace.ids()}


def test_a_point_is_what_the_stages_find(whole, alone):
    """Strength, features and alpha of one point, through calibrate, apply and eval."""
    point = {"n_features": 8, "strength": "16r", "ratio_percentile": 95.0, "alpha": 0.1}
    values = {AXES[name].key: value for name, value in point.items()}
    values |= {"eval.split": "dev", "eval.benches": ["lab-hexes", "lab-near", "lab-far"]}
    recipe = with_values(recipe_for("stability"), values)
    threshold = calibrate.run(recipe, alone).body_as(Threshold)
    apply.run(recipe, alone)
    report = evaluate.run(recipe, alone).body_as(EvalReport)
    assert row_at(whole, "threshold", **point)["value"] == pytest.approx(threshold.threshold, rel=1e-5)
    row = row_at(whole, "false_positive_rate", **point)
    assert row["value"] == pytest.approx(threshold.false_positive_rate) and row["n"] == threshold.n_fresh
    for bench, sides in report.results.items():
        row = row_at(whole, bench=bench, **point)
        assert row["value"] == sides["unlearned"]["acc"] and row["gate_rate"] == report.gate[bench]["rate"]
        assert whole.base[bench]["acc"] == sides["base"]["acc"] and row["n"] == sides["base"]["n"]
    assert row_at(whole, bench="lab-hexes", **point)["value"] <= 0.4


def test_a_larger_alpha_never_raises_the_threshold_and_a_strength_leaves_the_gate_alone(whole):
    for n_features in (4, 8):
        low, high = (
            {row["value"] for row in rows_at(whole, "threshold", n_features=n_features, alpha=alpha)}
            for alpha in (0.05, 0.1)
        )
        assert len(low) == len(high) == 1 and min(high) <= min(low)
        for bench in ("lab-hexes", "lab-near"):
            rates = {row["gate_rate"] for row in rows_at(whole, bench=bench, n_features=n_features, alpha=0.05)}
            assert len(rates) == 1


def test_a_point_that_fails_keeps_its_row(whole):
    failed = [row for row in whole.rows if row["error"]]
    assert len(failed) == 4 and {row["n_features"] for row in failed} == {700}
    assert all("700 were asked for" in row["error"] and row["value"] is None for row in failed)
    assert failures(whole) == [f"n 700, strength 1r, ratio % 95, alpha 0.05 and 3 more: {failed[0]['error']}"]


def test_intervals(whole):
    for row in rows_at(whole):
        k = round(row["value"] * row["n"])
        assert (row["low"], row["high"]) == pytest.approx(wilson_by_hand(k, row["n"]))
        n_gated = round(row["gate_rate"] * row["n"])
        assert (row["gate_low"], row["gate_high"]) == pytest.approx(wilson_by_hand(n_gated, row["n"]))
    assert rate_row({}, "rate", 0, 0) | {"value": None} == rate_row({}, "rate", 0, 0)
    values = [float(i) for i in range(15, 0, -1)]
    # P(at most 3 of 15 lie below the median) = 576 / 2^15 = 0.0176; at most 4: 0.0592.
    assert median_interval(values) == (4.0, 12.0)
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)


def test_the_table_beside_it_holds_the_same_rows(stability, workspace, whole):
    path = workspace.folder / f"{stability.id}.csv"
    assert path.name in stability.header.files
    read = list(csv.DictReader(path.open()))
    assert list(read[0]) == [*whole.columns, *MEASURES] and len(read) == len(whole.rows)
    for text, row in zip(read, whole.rows, strict=True):
        for name, value in row.items():
            assert text[name] == ("" if value is None else str(value)), name
            if isinstance(value, float):
                assert float(text[name]) == value
    assert csv_text(["a"], [{"a": 'x,"y"'} | dict.fromkeys(MEASURES)]).splitlines()[1].startswith('"x,""y"""')


def test_gates_that_watch_the_clamped_features_see_the_text_together(workspace, alone):
    sets = ["calibrate.gate=mean", "calibrate.alpha=0.1", "study.benches=[lab-near]"]
    grid = "study.grids={stability: {n_features: [4, 8], strength: [16r], ratio_percentile: [90, 95], alpha: [0.1]}}"
    body = measured(workspace, "stability", *sets, grid)
    assert body.computed["n_points"] == 4 and body.computed["gate_passes"] == 1
    threshold = calibrate.run(recipe_for("stability", *sets, grid), alone).body_as(Threshold)
    assert row_at(body, "threshold", n_features=8, ratio_percentile=95.0)["value"] == pytest.approx(threshold.threshold)


def test_less_forget_text(workspace, whole):
    body = measured(workspace, "data-efficiency")
    assert not failures(body)
    # Two retain corpora once, and forget text of each share.
    assert body.computed["text_passes"] == 2 + 4
    n_documents = {
        (row["by"], row["share"]): (row["n_documents"], row["n_entities"]) for row in rows_at(body, bench="lab-hexes")
    }
    (few, _), (all_of_them, n_entities) = n_documents["documents", 10.0], n_documents["documents", 100.0]
    assert few == math.ceil(all_of_them / 10) and n_entities == 12
    assert n_documents["entities", 10.0][1] == 2 and n_documents["entities", 100.0][1] == 12
    assert 0 < n_documents["entities", 10.0][0] < n_documents["entities", 100.0][0] <= all_of_them
    # All of it is what stability has at the recipe's own settings, but for rounding of the probe.
    point = {"n_features": 8, "strength": "16r", "alpha": 0.05}
    for bench in ("lab-hexes", "lab-near"):
        all_text = row_at(body, bench=bench, by="documents", share=100.0)
        own = row_at(whole, bench=bench, **point)
        assert all_text["value"] == own["value"] and all_text["gate_rate"] == own["gate_rate"]
    assert "\N{HORIZONTAL ELLIPSIS}" not in (text := printed(body)) and "documents" in text and "gated" in text
    named, others = (rows_at(body, f"acc_{which}", share=10.0, by="entities") for which in ("named", "not_named"))
    n_both = row_at(body, share=10.0, by="entities", bench="lab-hexes")["n"]
    assert sum(row["n"] for row in (*named, *others)) == n_both
    assert all(row["n"] % 4 == 0 and row["bench"] == "lab-hexes" for row in named)


def test_a_larger_share_contains_a_smaller_one():
    corpora = load_corpora(["lab-hexes"], role="forget")
    names = known_names(["lab-hexes"])
    assert len(names) == 24 and known_names(["wikitext"]) == []
    for by in ("documents", "entities"):
        kept = [share_of(corpora, by, share, seed=1, names=names) for share in (1, 20, 60, 100)]
        texts = [set(one.corpora[0].part("select")) for one in kept]
        assert all(small <= large for small, large in itertools.pairwise(texts))
        assert len({one.corpora[0].sha256 for one in kept}) == len({frozenset(one) for one in texts})
    assert texts[-1] <= set(corpora[0].part("select"))
    for one in kept:
        others = set(names) - set(one.entities)
        for text in one.corpora[0].texts:
            words = set(text.replace(".", " ").replace(",", " ").split())
            assert words & set(one.entities) and not words & others
    other = share_of(corpora, "documents", 20, seed=2, names=names)
    assert other.n_documents == share_of(corpora, "documents", 20, seed=1, names=names).n_documents
    assert set(other.corpora[0].texts) != set(share_of(corpora, "documents", 20, seed=1, names=names).corpora[0].texts)
    with pytest.raises(DsgError, match="No document names an entity"):
        share_of(corpora, "entities", 50, seed=0, names=["Nobody"])


def test_requests_one_after_another(workspace, stability):
    sets = ["corpora.retain=[lab-near, lab-far, lab-ciphers]", "study.benches=[lab-near, lab-far, lab-ciphers]"]
    body = measured(workspace, "sequential", *sets)
    assert body.benches == {"forget": ["lab-hexes", "lab-ciphers"], "other": ["lab-near", "lab-far"]}
    assert body.computed["n_points"] == 4 and not failures(body)

    def found(way, requests):
        return {row["bench"]: row["value"] for row in rows_at(body, way=way, requests=requests)}

    # After one request the two ways are the same guardrail, which still retains ciphers.
    assert found("each", 1) == found("union", 1) and found("each", 1)["lab-ciphers"] >= 0.9
    for way in ("each", "union"):
        after = found(way, 2)
        assert after["lab-hexes"] <= 0.5 and after["lab-ciphers"] <= 0.5 and after["lab-near"] >= 0.8
    shown = study_markdown(body)
    assert "lab-ciphers" in shown and "rest" in shown


def test_every_layer_with_an_sae(workspace, tmp_path, folders):
    """The lab's SAE at another layer too, and one that does not fit, which does not end the study."""
    shutil.copytree(lab.SAE_DIRS["lab"], tmp_path / "higher")
    config = json.loads((tmp_path / "higher" / "cfg.json").read_text())
    hook = config["metadata"]["hook_name"]
    layer = int(hook.split(".")[1])
    config["metadata"]["hook_name"] = hook.replace(str(layer), str(layer + 1), 1)
    (tmp_path / "higher" / "cfg.json").write_text(json.dumps(config))
    saes = ["lab", str(tmp_path / "higher"), str(folders["sae"])]
    body = measured(workspace, "layers", f"study.grids={{layers: {{sae: {json.dumps(saes)}, strength: [4r, 16r]}}}}")
    assert body.columns == ["sae", "strength", "hook", "n_in_sae"]
    hooks = {row["sae"]: row["hook"] for row in rows_at(body, bench="lab-hexes")}
    assert hooks == {"lab": hook, saes[1]: config["metadata"]["hook_name"]}
    failed = [row for row in body.rows if row["error"]]
    assert len(failed) == 2 and all(row["sae"] == saes[2] and "width" in row["error"] for row in failed)
    assert all(row["value"] <= 0.4 for row in rows_at(body, bench="lab-hexes", sae="lab", strength="16r"))
    assert f"blocks.{layer + 1}" in "".join(row["hook"] or "" for row in body.rows)


def test_other_seeds(workspace, whole):
    body = measured(workspace, "seeds")
    assert body.computed["n_points"] == 4 and body.computed["n_failed"] == 0
    point = {"n_features": 8, "strength": "16r", "alpha": 0.05}
    for bench in ("lab-hexes", "lab-near"):
        own = row_at(whole, bench=bench, **point)
        same = row_at(body, bench=bench, sae="lab", seed=0)
        assert same["value"] == own["value"] and same["gate_rate"] == own["gate_rate"]
    thresholds = {(row["sae"], row["seed"]): row["value"] for row in rows_at(body, "threshold")}
    assert len(set(thresholds.values())) >= 3


def test_length(workspace):
    body = measured(workspace, "length")
    assert body.benches == {"forget": [], "other": []} and body.base == {}
    assert [row["length"] for row in body.rows if row["error"] and not row["metric"]] == [500, 500]
    for length in (8, 24):
        for alpha in (0.05, 0.2):
            own, false, gated = (
                row_at(body, metric, length=length, alpha=alpha)
                for metric in ("own_false_positive_rate", "false_positive_rate", "forget_gate_rate")
            )
            assert own["n"] == false["n"] > 20 and own["low"] <= own["value"] <= own["high"]
            assert own["value"] <= alpha + 0.15 and gated["value"] > false["value"]
    tight, loose = (row_at(body, "threshold", length=24, alpha=alpha)["value"] for alpha in (0.05, 0.2))
    assert loose <= tight
    # Three windows hold more chances of a high one than a window alone.
    short, long = (row_at(body, "threshold", length=length, alpha=0.05)["value"] for length in (8, 24))
    assert long >= short


def test_a_length_that_sets_no_threshold_keeps_its_other_rows(workspace):
    grid = "study.grids={length: {length: [24], alpha: [0.0001]}}"
    body = measured(workspace, "length", grid, "calibrate.quantile=conformal")
    assert len(body.rows) == 1 and "at least 9999 are needed" in body.rows[0]["error"]


def test_cost(workspace):
    body = measured(workspace, "cost")
    failed = [row for row in body.rows if row["error"]]
    assert len(failed) == 2 and all("4000" in row["error"] for row in failed)
    for batch_size in (1, 3):
        plain, guarded, overhead = (
            row_at(body, metric, length=8, batch_size=batch_size)
            for metric in ("plain_seconds", "guarded_seconds", "overhead")
        )
        assert plain["n"] == guarded["n"] == overhead["n"] == 5
        assert 0 < plain["low"] <= plain["value"] <= plain["high"] and overhead["value"] > -0.9
    assert study_table(body) and "overhead" in study_markdown(body)


def test_the_two_ways_take_turns(monkeypatch):
    """A model whose guarded passes take twice as long, on a clock of its own."""
    clock, called = [0.0], []

    def model(**options):
        called.append(is_guarded[0])
        clock[0] += 2.0 if is_guarded[0] else 1.0

    is_guarded = [False]

    class Guarded:
        def __init__(self, *_arguments, **_options):
            pass

        def __enter__(self):
            is_guarded[0] = True
            clock[0] += 100.0  # Putting hooks on is no part of a pass.

        def __exit__(self, *_error):
            is_guarded[0] = False

    monkeypatch.setattr(cost, "guarded", Guarded)
    monkeypatch.setattr(cost, "_now", lambda _on: clock[0])
    ids = torch.zeros(1, 3, dtype=torch.long)
    plain, under = cost.paired_seconds(model, None, ids, ids.bool(), repeats=4)
    assert plain == [1.0] * 4 and under == [2.0] * 4
    assert len(called) == 12 and [called[i] for i in range(0, 12, 2)] == [True, False] * 3


def test_an_interrupted_study_goes_on_with_the_points_it_has(whole, alone, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    install()

    def interrupt(what, done, _total):
        if what == "stability, points" and done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    recipe = recipe_for("stability")
    try:
        with pytest.raises(Signalled) as stopped:
            study.run(recipe, alone, "stability", options=RunOptions(report=interrupt))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.is_kept and not alone.ids("study")
    assert [finding.state for finding in verify.verify_all(alone)] == ["ok", "unfinished"]
    seen = []
    options = RunOptions(report=lambda what, done, _total: seen.append((what, done)), resume=True)
    stored = study.run(recipe, alone, "stability", options=options)
    numbers = [done for what, done in seen if what == "stability, points"]
    assert numbers == list(range(4, 13))
    assert stored.body_as(StudyReport).rows == whole.rows
    assert study.run(recipe, alone, "stability", options=RunOptions(reuse=True)).id == stored.id
    assert not list(tmp_path.glob(".study*"))


def test_a_table_that_was_altered_is_refused(stability, workspace, tmp_path):
    for path in workspace.folder.glob("study-001.*"):
        shutil.copy(path, tmp_path)
    assert Workspace(tmp_path).read("study-001")
    table = tmp_path / "study-001.csv"
    table.write_text(table.read_text().replace("lab-hexes", "lab-hexed", 1))
    with pytest.raises(DsgError, match="was altered"):
        Workspace(tmp_path).read("study-001")
    assert [one.state for one in verify.verify_all(Workspace(tmp_path))] == ["broken"]


def test_the_tables_fit(stability, whole):
    rows = [row for row in whole.rows if row["strength"] == "16r"]
    for report in (whole, whole.replace(grid=whole.grid | {"strength": ["16r"]}, rows=rows)):
        for shown in (printed(report), study_markdown(report)):
            assert "failed" in shown and "700 were asked for" in shown and "dev questions" in shown
    forget = row_at(whole, bench="lab-hexes", n_features=8, strength="16r", alpha=0.05)
    assert f" {forget['value']:.2f} / " in study_markdown(whole)
    assert "12 points, dev, best score" in study_headline(whole) and artifact_table(stability)


def test_every_study_has_its_module_and_its_axes():
    for name, one in STUDIES.items():
        assert callable(load_study(name))
        assert set(one.axes) <= set(AXES) and set(one.default) <= set(one.axes) and set(one.needs) <= set(one.axes)
    assert set(AXES) == set(GridValues.__annotations__)
    assert points_of({"a": [1, 2], "b": ["x"]}) == [{"a": 1, "b": "x"}, {"a": 2, "b": "x"}]


@pytest.mark.parametrize(
    ("name", "sets", "words"),
    [
        (
            "stability",
            ["study.grids={stability: {n_featurs: [4]}}"],
            "unknown key study.grids.stability.n_featurs. Did you mean n_features",
        ),
        ("stability", ["study.grids={stabilty: {n_features: [4]}}"], "no study stabilty. Did you mean stability"),
        ("stability", ["study.grids={stability: {}}"], "study.grids: stability: name a setting"),
        ("stability", ["study.grids={stability: {alpha: []}}"], "study.grids.stability.alpha is empty"),
        ("stability", ["study.grids={stability: {alpha: [0.1, 1.0]}}"], r"alpha.1 is 1\.0; it should be less than 1"),
        (
            "stability",
            ["study.grids={stability: {strength: [strong]}}"],
            "is 'strong'; give a positive number, or a multiple",
        ),
        ("stability", ["study.grids={stability: {n_features: [4, 4]}}"], "has a value twice"),
        (
            "stability",
            ["study.grids={stability: {n_features: [true]}}"],
            "n_features.0 is True; it should be a whole number",
        ),
        ("cost", ["study.repeats=1"], "study.repeats is 1"),
        ("layers", ["study.grids={}"], "needs values for sae"),
        ("layers", ["study.grids={layers: {sae: [labb]}}"], "There is no SAE labb"),
        ("sequential", ["study.sequence=[]"], "needs further requests"),
        ("sequential", ["study.sequence=[lab-cipher]"], "There is no corpus or file named lab-cipher"),
        ("sequential", ["study.sequence=[lab-hexes]"], "names a request twice"),
        ("sequential", ["study.grids={sequential: {requests: [3]}}"], "there are 2 requests"),
        ("stability", ["study.benches=[lab-nearr]"], "There is no bench named lab-nearr"),
        ("stability", ["study.forget=wmdp-bio-paper"], "cannot ask wmdp-bio-paper"),
        ("stability", ["corpora.forget=[]"], "has no features yet"),
        ("seeds", ["guardrail.strength=auto"], "chooses no strength by itself"),
        ("stabilty", [], "There is no study stabilty"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(name, sets, words, tmp_path):
    with pytest.raises(DsgError, match=words) as refused:
        study.run(recipe_for(name, *sets), Workspace(tmp_path), name)
    assert refused.value and not Workspace(tmp_path).ids()


def test_text_and_questions_of_ones_own(folders, tmp_path):
    """By entities only with their names; a bench without questions is refused; choosing on it is warned of."""
    write_task(tmp_path / "tasks", [{"q": f"w{i} w{i + 1}", "c": [" w40", " w41"], "a": i % 2} for i in range(12)])
    sets = [f"model.source={folders['model']}", f"sae.source={folders['sae']}", "study.forget=mine"]
    sets += [f"corpora.{role}=[{folders[f'{role}.jsonl']}]" for role in ("forget", "retain")]
    sets += [f"eval.include_path={tmp_path / 'tasks'}", "select.n_features=3", "select.ratio_percentile=50"]
    sets += ["calibrate.gate=window", "calibrate.detector_percentile=50", "calibrate.n_detectors=3"]
    sets += ["calibrate.alpha=0.2", "calibrate.lengths=[4, 16]", "select.probe_features=0"]
    grid = "study.grids={data-efficiency: {by: [entities], share: [50, 100]}}"
    with pytest.raises(DsgError, match="nothing says which entities"):
        study.run(load_recipe(sets=[*sets, grid]), Workspace(tmp_path / "a"), "data-efficiency")
    (tmp_path / "names.txt").write_text("w1\nw2\nw3\nw4\n")
    named = load_recipe(sets=[*sets, grid, f"study.entities_file={tmp_path / 'names.txt'}"])
    stored = study.run(named, Workspace(tmp_path / "a"), "data-efficiency")
    body = stored.body_as(StudyReport)
    assert "no dev questions are set apart" in stored.header.notes[-1]
    assert {row["n_entities"] for row in body.rows if not row["error"]} <= {2, 4} and body.chance == 0.5
    assert body.computed["n_points"] == 2
    write_task(tmp_path / "tasks", [])
    with pytest.raises(DsgError, match="The bench mine cannot be loaded"):
        study.run(load_recipe(sets=[*sets, "study.grids={}"]), Workspace(tmp_path / "b"), "stability")


def test_going_on_from_features(stability, workspace, whole):
    """Their corpora, SAE and selection, whatever the recipe says."""
    recipe = load_recipe(
        sets=["study.grids={stability: {n_features: [8], strength: [16r], alpha: [0.05]}}", *SETS[5:7]]
    )
    recipe = with_values(recipe, {"study.grids.stability.ratio_percentile": [95.0], "corpora.limit": 9})
    body = study.run(recipe, workspace, "stability", source="features-001").body_as(StudyReport)
    for bench in ("lab-hexes", "lab-near"):
        expected = row_at(whole, bench=bench, n_features=8, strength="16r", alpha=0.05)
        assert row_at(body, bench=bench)["value"] == expected["value"]
    with pytest.raises(DsgError, match="not of the kind features"):
        study.run(recipe, workspace, "stability", source=stability.id)


def test_the_command_line(dsg, alone, tmp_path):
    sets = [argument for item in SETS for argument in ("--set", item)]
    grid = ("n_features=4,8", "strength=16r", "alpha=0.05", "ratio_percentile=95")
    grids = [argument for item in grid for argument in ("--grid", item)]
    common = ["study", "stability", "--from", "features-001", *sets, *grids, "-w", alone.folder]
    code, out, err = dsg(*common, "--split", "test", "--summary", "summary.md")
    assert code == 0 and "test questions" in out and f"study-001 in {alone.folder}: 2 points in" in out, err
    assert "## dsg: study-001" in Path("summary.md").read_text()
    code, out, _ = dsg(*common, "--split", "test", "--json", "--reuse")
    assert code == 0 and json.loads(out)["id"] == "study-001" and json.loads(out)["split"] == "test"
    code, out, _ = dsg(*common, "--split", "test", "--markdown", "--reuse")
    assert code == 0 and out.startswith("| n | forget |")
    for arguments, words in ((("show", "study-001"), "lab-hexes"), (("ls",), "study-001"), (("ls", "studies"), "cost")):
        code, out, _ = dsg(*arguments, *(["-w", alone.folder] if arguments != ("ls", "studies") else []))
        assert code == 0 and words in out
    assert dsg("verify", "-w", alone.folder)[0] == 0
    code, out, err = dsg("study", "stabilty", "-w", "ws")
    assert code == 1 and "Did you mean stability" in err and not out
    code, _, err = dsg("study", "stability", "--recipe", "lab", "--grid", "n_featurs=4", "-w", "ws")
    assert code == 1 and "Did you mean n_features" in err
    code, _, err = dsg("study", "stability", "--recipe", "lab", "--grid", "n_features", "-w", "ws")
    assert code == 1 and "SETTING=VALUE" in err
