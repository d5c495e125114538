"""Recipes: precedence, and all mistakes in one message."""

import json
import os

import pytest
from dsg_cli.report.published import beside, published_table
from rich.console import Console
from test_hub import run

from dsg_cli.errors import DsgError
from dsg_cli.recipe import Recipe, find_recipe, load_recipe, recipe_names
from dsg_cli.settings import PublishedSection


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_precedence_is_flag_then_set_then_recipe_then_default(tmp_path):
    path = write(tmp_path, "select: {n_features: 3, ratio_percentile: 80}\nseed: 4\n")
    assert load_recipe().select.n_features == 20
    assert load_recipe(path).select.n_features == 3
    assert load_recipe(path, sets=["select.n_features=5"]).select.n_features == 5
    chosen = load_recipe(path, sets=["select.n_features=5"], flags={"select.n_features": 7, "seed": None})
    assert (chosen.select.n_features, chosen.select.ratio_percentile, chosen.seed) == (7, 80.0, 4)


def test_all_mistakes_come_in_one_message_with_the_nearest_key(tmp_path):
    path = write(
        tmp_path,
        "select: {n_feature: 3, ratio_percentile: high}\ncalibrate: {alpha: true}\nmodle: {}\nguardrail: 5\n"
        "eval: {split: train, batch_size: 1.5}\n",
    )
    with pytest.raises(DsgError) as error:
        load_recipe(path)
    for words in (
        "unknown key select.n_feature. Did you mean n_features",
        "select.ratio_percentile must be a number, not 'high'",
        "calibrate.alpha must be a number, not True",
        "unknown key modle. Did you mean model?",
        "guardrail must be a section",
        "eval.split must be one of dev, test, not 'train'",
        "eval.batch_size must be a whole number, not 1.5",
    ):
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("n=3", "unknown key n"),
        ("select.n_features", "expected section.key=value"),
        ("select.n_features.x=1", "n_features"),
        ("select.n_features=[", "not valid YAML"),
    ],
)
def test_bad_sets(item, words):
    with pytest.raises(DsgError, match=words):
        load_recipe(sets=[item] if item != "select.n_features.x=1" else ["select.n_features=1", item])


def test_values_take_the_type_of_their_field(tmp_path):
    recipe = load_recipe(
        sets=[
            "attack.relearn_learning_rates=1e-5",
            "guardrail.strength=500",
            "eval.benches=lab-hexes",
            "calibrate.lengths=[8, 64]",
            "eval.limit=null",
        ]
    )
    assert recipe.attack.relearn_learning_rates == [1e-5]
    assert recipe.guardrail.strength == "500"
    assert recipe.eval.benches == ["lab-hexes"]
    assert recipe.calibrate.lengths == [8, 64]
    assert recipe.eval.limit is None


def test_files_that_are_no_recipes(tmp_path):
    with pytest.raises(DsgError, match="not valid YAML"):
        load_recipe(write(tmp_path, "a: [1"))
    with pytest.raises(DsgError, match="must hold sections"):
        load_recipe(write(tmp_path, "- 1\n"))
    with pytest.raises(DsgError, match="no recipe labb"):
        load_recipe("labb")
    assert load_recipe(write(tmp_path, "")) == Recipe()


def test_recipes_are_found_by_name_and_by_path(tmp_path, monkeypatch):
    assert "lab" in recipe_names()
    assert find_recipe("lab").read_text() == find_recipe("lab.yaml").read_text()
    mine = write(tmp_path, "seed: 3\n")
    assert load_recipe(mine).seed == 3
    monkeypatch.chdir(tmp_path)
    assert find_recipe("recipes/lab.yaml") == find_recipe("lab")
    assert find_recipe("paper/muse-news") == find_recipe("recipes/paper/muse-news.yaml")
    assert {"paper/muse-news", "paper/wmdp-bio", "muse-news-target", "tofu-target"} <= set(recipe_names())
    for name in ("muse-news", "paper/lab", "../recipes/lab", "paper"):
        with pytest.raises(DsgError, match="There is no recipe"):
            find_recipe(name)


@pytest.mark.parametrize(
    "item",
    [
        "select.n_features=0",
        "select.ratio_percentile=100",
        "select.seq_len=1",
        "calibrate.alpha=1",
        "calibrate.lengths=[9]",
        "calibrate.lengths=[9, 8]",
        "eval.batch_size=0",
        "eval.limit=0",
        "attack.known_questions=0",
        "attack.relearn_learning_rates=.nan",
        "attack.relearn_learning_rates=[1e-3, 1e-4]",
        "attack.relearn_learning_rates=[]",
        "attack.relearn_rank=0",
        "attack.relearn_parameters=[]",
        "attack.relearn_guard=[loop, loop]",
        "attack.quantize_bits=[8, 1]",
        "attack.soft_prompt_tokens=0",
        "attack.suffix_candidates=0",
        "attack.suffix_places=[]",
        "attack.probe_ridge=0",
        "attack.suffix_gate_weight=-1",
        "attack.soft_prompt_steps=[5]",
        "attack.soft_prompt_learning_rate=0",
        "attack.soft_prompt_objectives=[]",
        "attack.prune_shares=[0.5, 1.0]",
        "attack.dilution_lengths=[4, 8]",
        "attack.relearn_steps=[0, 2, 2]",
    ],
)
def test_values_out_of_range_are_refused_before_anything_runs(item):
    with pytest.raises(DsgError, match=item.split("=")[0].replace(".", r"\.")):
        load_recipe(sets=[item])


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads_and_says_how_to_run_it(name):
    recipe = load_recipe(name)
    assert recipe.corpora.forget or recipe.select.describe
    assert recipe.corpora.retain and recipe.eval.benches
    head = find_recipe(name).read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    commands = ("dsg run", "dsg compare --recipe", "dsg apply --method finetune --recipe")
    assert any(f"{command} {name}" in head for command in commands)
    assert "Hardware" in head and "Time" in head


def test_every_shipped_recipe_is_planned_without_a_download(tmp_path):
    """What would be read, computed and written, in one process that reaches no hub; names are checked all the same."""
    environment = dict(os.environ, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    names = recipe_names()
    assert {"lab", "gpt2", "pythia-70m", "wmdp-bio", "wmdp-cyber"} <= set(names) and len(names) >= 9
    found = run(environment, tmp_path, *(("run", name, "--dry-run", "--json") for name in names))
    for name, (code, out, err) in zip(names, found, strict=True):
        assert code == 0, f"{name}: {err}"
        steps = json.loads(out)
        assert {step["verb"] for step in steps} == {"read", "compute", "write"} and all(step["size"] for step in steps)
        recipe = load_recipe(name)
        said = "\n".join(step["what"] for step in steps)
        assert all(word in said for word in (*recipe.corpora.forget, *recipe.eval.benches, recipe.sae.source)), said
    assert not list(tmp_path.rglob("*.safetensors"))


WRONG = {
    "sae.source=gemma-scope-2b-pt-res/layer_3/": "Did you mean layer_3/width_16k",
    "corpora.forget=wmdp-boi": "Did you mean wmdp-bio",
    "eval.benches=wmdp-boi": "Did you mean wmdp-bio",
    "guardrail.strength=strong": "strong",
    "attack.kinds=relern": "Did you mean relearn",
}


def test_a_plan_finds_what_is_wrong(tmp_path):
    environment = dict(os.environ, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    found = run(environment, tmp_path, *(("run", "gpt2", "--dry-run", "--set", item) for item in WRONG))
    for (code, out, err), words in zip(found, WRONG.values(), strict=True):
        assert code == 1 and words in err and not out, err


def test_published_numbers_are_checked_for_their_type(tmp_path):
    with pytest.raises(DsgError, match="published.results must be a mapping of names to a mapping"):
        load_recipe(write(tmp_path, "published: {results: {mmlu: high}}"))
    recipe = load_recipe("wmdp-bio")
    assert recipe.published.results["wmdp-bio-paper"]["unlearned"] == 0.2964
    assert set(recipe.published.results) == set(recipe.eval.benches)
    with pytest.raises(DsgError, match="has the side guarded; there are base and unlearned"):
        load_recipe(write(tmp_path, "published: {results: {mmlu: {guarded: 0.5}}}"))
    with pytest.raises(DsgError, match="a number or a mapping of names to a number"):
        load_recipe(write(tmp_path, "published: {results: {mmlu: {base: {acc: {x: 1}}}}}"))


MUSE = {
    "news": {"base": (21.15, 29.51, -88.16, 26.78), "unlearned": (11.80, 0.44, 12.08, 25.65)},
    "books": {"base": (15.80, 33.90, -98.80, 35.28), "unlearned": (8.73, 1.79, -23.18, 37.10)},
}


@pytest.mark.parametrize("which", MUSE)
def test_the_papers_figures_on_muse(which):
    recipe = load_recipe(f"paper/muse-{which}")
    names = ("verbmem_forget", "knowmem_forget", "privleak", "knowmem_retain")
    wanted = {side: dict(zip(names, values, strict=True)) for side, values in MUSE[which].items()}
    assert recipe.published.results == {f"muse-{which}": wanted} and recipe.eval.benches == [f"muse-{which}"]


def test_published_stands_beside_measured_for_every_metric():
    section = PublishedSection("theirs", {"a": {"base": 1, "unlearned": 0.25}, "m": {"unlearned": {"x": 10, "y": -2}}})
    results = {
        "a": {"base": {"acc": 0.75}, "unlearned": {"acc": 0.5}},
        "m": {"base": {"x": 1}, "unlearned": {"x": 7.5}},
    }
    rows = beside(section, results)
    assert [(row["bench"], row["side"], row["metric"]) for row in rows] == [
        ("a", "base", "acc"),
        ("a", "unlearned", "acc"),
        ("m", "unlearned", "x"),
        ("m", "unlearned", "y"),
    ]
    assert [row["measured"] for row in rows] == [0.75, 0.5, 7.5, None]
    assert [row["difference"] for row in rows] == [-0.25, 0.25, -2.5, None]
    console = Console(width=80)
    with console.capture() as captured:
        console.print(published_table(rows))
    lines = [line.split() for line in captured.get().splitlines()]
    assert lines[0] == ["side", "metric", "published", "measured", "difference"]
    assert lines[2] == ["a", "guarded", "acc", "0.2500", "0.5000", "+0.2500"]
    assert lines[3:] == [["m", "guarded", "x", "10.00", "7.50", "-2.50"], ["m", "guarded", "y", "-2.00", "-", "-"]]
