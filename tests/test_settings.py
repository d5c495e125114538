"""Recipes: precedence, and all mistakes in one message."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import shutil
import typing
from pathlib import Path

import pytest
import yaml
from anything import ODD_TEXT, PLAIN, TEXT, VALUES, changed, mutated, places, refused, tries
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console
from test_hub import run

from dsg_cli.cli.app import COMMANDS as PANELS
from dsg_cli.cli.app import main
from dsg_cli.errors import DsgError
from dsg_cli.guardrail.loading import load_guardrail
from dsg_cli.recipe import RECIPES, find_recipe, load_recipe, recipe_names
from dsg_cli.report.evaluations import beside, published_table
from dsg_cli.report.rendering import console
from dsg_cli.report.tables import artifact_table, list_table, provenance_tree
from dsg_cli.settings import PublishedSection, Recipe, values_at
from dsg_cli.workspace.artifacts import KINDS, artifact_digest, artifact_text
from dsg_cli.workspace.store import Workspace


def write(folder, content):
    path = folder / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return str(path)


def test_precedence_is_flag_then_set_then_recipe_then_default(tmp_path):
    path = write(tmp_path, "select: {n_features: 3, ratio_percentile: 80}\nseed: 4\n")
    assert load_recipe().select.n_features == 20
    assert load_recipe(path).select.n_features == 3
    assert load_recipe(path, sets=["select.n_features=5"]).select.n_features == 5
    chosen = load_recipe(path, sets=["select.n_features=5"], flags={"select.n_features": 7, "seed": None})
    assert (chosen.select.n_features, chosen.select.ratio_percentile, chosen.seed) == (7, 80.0, 4)


def test_all_mistakes_come_in_one_message_with_the_nearest_key(tmp_path):
    text = "select: {n_feature: 3, ratio_percentile: high}\ncalibrate: {alpha: true}\nmodle: {}\nguardrail: 5\n"
    with pytest.raises(DsgError) as error:
        load_recipe(write(tmp_path, text + "eval: {split: train, batch_size: 1.5}\n"))
    assert set(str(error.value).split("\n  ")[1:]) == {
        "unknown key select.n_feature. Did you mean n_features or features or probe_features?",
        "select.ratio_percentile is 'high'; it should be a number.",
        "calibrate.alpha is True; it should be a number.",
        "unknown key modle. Did you mean model?",
        "guardrail must be a section (key: value), not 5.",
        "eval.split is 'train'; it should be 'dev' or 'test'.",
        "eval.batch_size is 1.5; it should be a whole number.",
    }


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
    values = {
        "attack.relearn_learning_rates=1e-5": [1e-5],
        "guardrail.strength=500": "500",
        "eval.benches=lab-hexes": ["lab-hexes"],
        "calibrate.lengths=[8, 64]": [8, 64],
        "calibrate.threshold=1": 1.0,
        "eval.limit=null": None,
    }
    recipe = load_recipe(sets=list(values))
    for item, value in values.items():
        found = values_at(recipe, [key := item.partition("=")[0]])[key]
        assert found == value and type(found) is type(value), item


def test_files_that_are_no_recipes(tmp_path):
    for text, words in (("a: [1", "not valid YAML"), ("- 1\n", "must hold sections")):
        with pytest.raises(DsgError, match=words):
            load_recipe(write(tmp_path, text))
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


OUT_OF_RANGE = """
select.n_features=0 select.ratio_percentile=100 select.seq_len=1 calibrate.alpha=1 calibrate.lengths=[9]
calibrate.lengths=[9,8] eval.batch_size=0 eval.limit=0 attack.known_questions=0
attack.relearn_learning_rates=.nan attack.relearn_learning_rates=[1e-3,1e-4] attack.relearn_learning_rates=[]
attack.relearn_rank=0 attack.relearn_parameters=[] attack.relearn_guard=[loop,loop] attack.quantize_bits=[8,1]
attack.soft_prompt_tokens=0 attack.suffix_candidates=0 attack.suffix_places=[] attack.probe_ridge=0
attack.suffix_gate_weight=-1 attack.soft_prompt_steps=[5] attack.soft_prompt_learning_rate=0
attack.soft_prompt_objectives=[] attack.prune_shares=[0.5,1.0] attack.dilution_lengths=[4,8]
attack.relearn_steps=[0,2,2]
"""


@pytest.mark.parametrize("item", OUT_OF_RANGE.split())
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
    for mmlu, words in (
        ("high", "published.results.mmlu is 'high'; it should be a dictionary"),
        ("{guarded: 0.5}", "mmlu.guarded is 'guarded'; it should be 'base' or 'unlearned'"),
        ("{base: {acc: {x: 1}}}", "base.acc: it should be a number"),
    ):
        with pytest.raises(DsgError, match=words):
            load_recipe(write(tmp_path, f"published: {{results: {{mmlu: {mmlu}}}}}"))
    recipe = load_recipe("wmdp-bio")
    assert recipe.published.results["wmdp-bio-paper"]["unlearned"] == 0.2964
    assert set(recipe.published.results) == set(recipe.eval.benches)


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
    accuracies = {"base": {"acc": 0.75}, "unlearned": {"acc": 0.5}}
    rows = beside(section, {"a": accuracies, "m": {"base": {"x": 1}, "unlearned": {"x": 7.5}}})
    keys = ("bench", "side", "metric", "measured", "difference")
    assert [tuple(row[key] for key in keys) for row in rows] == [
        ("a", "base", "acc", 0.75, -0.25),
        ("a", "unlearned", "acc", 0.5, 0.25),
        ("m", "unlearned", "x", 7.5, -2.5),
        ("m", "unlearned", "y", None, None),
    ]
    console = Console(width=80)
    with console.capture() as captured:
        console.print(published_table(rows))
    lines = [line.split() for line in captured.get().splitlines()]
    assert lines[0] == ["side", "metric", "published", "measured", "difference"]
    assert lines[2] == ["a", "guarded", "acc", "0.2500", "0.5000", "+0.2500"]
    assert lines[3:] == [["m", "guarded", "x", "10.00", "7.50", "-2.50"], ["m", "guarded", "y", "-2.00", "-", "-"]]


DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("properties")


YAML_TEXT = st.text(alphabet="&*a:- \n\t[]{}!|>'\"#%019.,?~<=x_nby", max_size=60)
YAML_VALUES = st.recursive(
    PLAIN | st.dates() | st.datetimes() | st.binary(max_size=9) | st.just(float("nan")) | st.just(float("-inf")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PLAIN | st.dates(), inner, max_size=3),
    max_leaves=8,
)


HOSTILE = (
    *("corpora: {forget: &a [*a]}", "corpora: &a {forget: *a}", "&a [*a]", "&a {*a : 1}", "model: &a\n  <<: *a"),
    *("[" * 1000, "{a: " * 1000),
    "seed: " + "9" * 5000,
    "seed: 0x" + "f" * 5000,
    "? 0x" + "f" * 5000 + "\n: 1",
    "select: {ratio_percentile: " + "9" * 400 + "}",
    "? 2024-01-01\n: 1",
    *(f"seed: {value}" for value in ("99999999999999999999999", "2024-13-45", "0b_", "0x_", "1:99:99", ".nan")),
    *(f"seed: !!{tag} x" for tag in ("float", "bool", "timestamp", "binary", "python/object:os.system")),
    *(f"seed: !!{value}" for value in ("int ''", "int 0b", "set {1, 2}")),
    "calibrate: {alpha: .nan}",
    "published: {results: {a: {base: .nan}}}",
    *("seed: 1\nseed: 2", "\tseed: 1"),
    "1: 2\nnull: 3\ntrue: 4\n[1]: 5",
    "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in itertools.pairwise("abcdefghijk")),
    "model: {source: &a [x,x,x,x,x,x,x,x,x]}\nsae: &b {source: [*a,*a,*a,*a]}\neval: *b",
    *("\x00", "\ufeffseed: 1", "--- 1\n--- 2", "%YAML 9.9\n---\nseed: 1", 'model: {source: "\\ud800\\0"}'),
)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_recipe_is_read_or_refused(root, text):
    refused(load_recipe, write(root, text))
    refused(load_recipe, sets=[f"model.source={text}", f"{text}=1"])


@tries(80)
@given(st.binary(max_size=60) | YAML_TEXT)
def test_any_bytes_as_a_recipe(root, content):
    refused(load_recipe, write(root, content))


SECTIONS = yaml.safe_load((RECIPES / "lab.yaml").read_text())


@tries(80)
@given(st.data())
def test_any_values_in_a_recipe(root, data):
    if data.draw(st.booleans()):
        held = data.draw(YAML_VALUES)
    else:
        held = changed(SECTIONS, data.draw(st.sampled_from(list(places(SECTIONS)))), data.draw(PLAIN | VALUES))
    refused(load_recipe, write(root, yaml.dump(held, allow_unicode=True)))


@tries(60)
@given(st.data())
def test_mutations_of_shipped_recipes(root, data):
    content = (RECIPES / f"{data.draw(st.sampled_from(recipe_names()))}.yaml").read_bytes()
    refused(load_recipe, write(root, data.draw(mutated(content))))


@tries(100)
@given(st.lists(TEXT | YAML_TEXT | st.builds("{}={}".format, TEXT | st.just("select.score"), TEXT | YAML_TEXT)))
def test_any_set(sets):
    refused(load_recipe, sets=sets)


@tries(40)
@given(TEXT)
def test_any_name_of_a_recipe(name):
    refused(load_recipe, name)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_that_is_written_out_reads_as_itself(root, name):
    recipe = load_recipe(name)
    assert load_recipe(write(root, yaml.safe_dump(dataclasses.asdict(recipe)))) == recipe


def shown(stored):
    """As `dsg show` and `dsg ls` print it."""
    out = console(io.StringIO())
    for part in (artifact_table(stored), provenance_tree(stored), list_table(Workspace(stored.path.parent))):
        out.print(part)


ARTIFACTS = {
    f"{path.parent.name}/{path.stem}": json.loads(path.read_text()) for path in sorted(DATA.glob("schema-*/*-001.json"))
}
"""One of each kind and schema."""


@pytest.fixture(scope="module")
def workspaces(root):
    """A workspace for each, alone: those of one schema are not all of one chain."""
    found = {}
    for name in ARTIFACTS:
        schema, _, artifact_id = name.partition("/")
        found[name] = Workspace(root / name.replace("/", "-"))
        found[name].folder.mkdir()
        for path in (DATA / schema).glob(f"{artifact_id}*"):
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            copy(path, found[name].folder / path.name)
    return found


def read_changed(workspace, data, artifact_id):
    """Write an artifact's JSON with the digest that it should have, and read it, with what shows it."""
    if isinstance(data, dict):
        data = data | {"sha256": artifact_digest(data)}
    folder = workspace.folder.parent / f"{workspace.folder.name}-changed"
    folder.mkdir(exist_ok=True)
    (folder / f"{artifact_id}.json").write_text(artifact_text(data), encoding="utf-8", errors="surrogatepass")
    for name in data.get("files") or () if isinstance(data, dict) else ():
        if isinstance(name, str) and name.startswith(artifact_id) and (workspace.folder / name[:200]).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(workspace.folder / name, folder / name)
    stored = refused(Workspace(folder).read, artifact_id)
    if stored is not None:
        shown(stored)
    return stored


@pytest.mark.parametrize("name", ARTIFACTS)
def test_what_every_version_wrote_is_shown(workspaces, name):
    shown(workspaces[name].read(name.partition("/")[2]))


@pytest.mark.parametrize("name", ARTIFACTS)
def test_an_artifact_without_one_of_its_fields(workspaces, name):
    data = {key: value for key, value in ARTIFACTS[name].items() if key != "sha256"}
    for path in places(data):
        if not isinstance(path[-1], int) or path[-1] == 0:
            read_changed(workspaces[name], changed(data, path), name.partition("/")[2])


@tries(250)
@given(st.data())
def test_an_artifact_with_another_value_in_a_field(workspaces, data):
    name = data.draw(st.sampled_from(list(ARTIFACTS)))
    path = data.draw(st.sampled_from([path for path in places(ARTIFACTS[name]) if path != ("sha256",)]))
    read_changed(workspaces[name], changed(ARTIFACTS[name], path, data.draw(VALUES)), name.partition("/")[2])


@tries(80)
@given(st.data(), ODD_TEXT | st.builds("{}-{}".format, st.sampled_from(["eval-001", "features-001"]), TEXT))
def test_any_names_of_files_and_inputs(workspaces, data, odd):
    name = data.draw(st.sampled_from(list(ARTIFACTS)))
    artifact_id = name.partition("/")[2]
    odd = data.draw(st.sampled_from([odd, f"{artifact_id}/{odd}", f"{artifact_id}{odd}"]))
    files = ARTIFACTS[name]["files"] | {odd: "0" * 64}
    read_changed(workspaces[name], ARTIFACTS[name] | {"files": files}, artifact_id)
    inputs = [{"id": odd, "sha256": "0" * 64, "is_elsewhere": data.draw(st.booleans())}]
    read_changed(workspaces[name], ARTIFACTS[name] | {"inputs": inputs}, artifact_id)


@tries(60)
@given(st.binary(max_size=60) | st.builds(json.dumps, VALUES).map(str.encode))
@example(b"[" * 100_000)
@example(b'{"schema": 1e999, "kind": "eval"}')
@example(b'{"schema": ' + b"9" * 5000 + b', "kind": "eval"}')
def test_any_bytes_as_an_artifact(root, content):
    folder = root / "any"
    folder.mkdir(exist_ok=True)
    (folder / "eval-001.json").write_bytes(content)
    assert refused(Workspace(folder).read, "eval-001") is None


@tries(40)
@given(TEXT)
def test_any_id(workspaces, name):
    assert refused(next(iter(workspaces.values())).read, name) is None


@pytest.mark.parametrize("content", [None, b"", b"x" * 99])
def test_a_guardrail_whose_tensors_are_none(root, workspaces, content):
    data = ARTIFACTS["schema-2/guardrail-001"] | {"files": {}}
    folder = root / f"no-tensors-{content is None}"
    folder.mkdir(exist_ok=True)
    if content is not None:
        (folder / "guardrail-001.safetensors").write_bytes(content)
    (folder / "guardrail-001.json").write_text(artifact_text(data | {"sha256": artifact_digest(data)}))
    assert refused(load_guardrail, folder / "guardrail-001.json") is None


@tries(40)
@given(TEXT | st.builds("{}.{}".format, TEXT, st.sampled_from(["json", "safetensors"])))
def test_any_name_of_a_guardrail(name):
    if not name.startswith("hf://"):
        assert refused(load_guardrail, name) is None


def test_an_artifact_nested_too_deeply(workspaces):
    data = ARTIFACTS["schema-1/eval-001"]
    for depth in (50, 300, 600):
        deep = data
        for _ in range(depth):
            deep = {"x": deep}
        try:
            read_changed(workspaces["schema-1/eval-001"], data | {"settings": deep}, "eval-001")
        except RecursionError:
            pytest.fail("nested")


@pytest.mark.parametrize("kind", ["features", "threshold", "guardrail", "eval", "attack", "inspect"])
def test_what_is_written_reads_as_itself(root, workspaces, kind):
    name = f"schema-{1 if kind in ('features', 'attack', 'inspect') else 2}/{kind}-001"
    old = workspaces[name].read(f"{kind}-001")
    words = st.text(max_size=8)
    numbers = st.floats(allow_nan=False, allow_infinity=False)
    made = {"Finite": numbers, "Whole": st.integers(-(2**63), 2**63 - 1), "str": words}
    made |= {f"list[{name}]": st.lists(one, max_size=3) for name, one in made.items()}
    free = {name: made[type] for name, type in KINDS[kind].__annotations__.items() if type in made}
    workspace = Workspace(root / f"round-{kind}")

    @tries(12)
    @given(st.fixed_dictionaries(free), words, st.lists(words, max_size=3), st.dictionaries(words, words, max_size=3))
    def check(values, device, notes, packages):
        header = old.header.replace(schema_number=KINDS[kind].schema_number, id="", files={}, inputs=[], device=device)
        body = old.body.replace(**values)
        written = workspace.write(header.replace(notes=notes, packages=packages), body)
        read = workspace.read(written.id)
        assert read == written and read.body == body

    check()


FUNCTIONS = {name: function for commands in PANELS.values() for name, function in commands.items()}
COMMANDS = [name for name in FUNCTIONS if name not in ("demo", "compare", "study", "report", "describe")]
FOREVER = "--serve"
"""An option of a command that then waits for a signal."""
WORDS = st.sampled_from(["1", "-1", "lab", "lab-hexes", "lab-near", "--", "mean", "eval-001", "saes/gpt2-small-res-jb"])


def options_of(command):
    """The options of a command, as they are spelled."""
    hints = typing.get_type_hints(FUNCTIONS[command], include_extras=True).values()
    parts = [part for hint in hints for part in typing.get_args(hint)[1:]]
    parts += [part for hint in hints for argument in typing.get_args(hint) for part in typing.get_args(argument)[1:]]
    names = {name for part in parts for name in getattr(part, "param_decls", None) or () if name.startswith("-")}
    return sorted(names - {FOREVER})


def is_argument(text):
    """Whether the system can pass it on."""
    return not any(character == "\x00" or "\ud800" <= character <= "\udfff" for character in text)


OPTIONS = {command: options_of(command) for command in COMMANDS}


def run_dsg(arguments):
    """Exit code and stderr of `dsg ...`; streams are as a terminal's are."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=how) for how in ("strict", "backslashreplace")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.StringIO("a prompt\n"))
        patch.setattr("sys.stdout", streams[0])
        patch.setattr("sys.stderr", streams[1])
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        for stream in streams:
            stream.flush()
    return int(stop.value.code or 0), streams[1].buffer.getvalue().decode()


@pytest.fixture
def no_work(tmp_path, monkeypatch):
    """A folder with artifacts, no network, and nothing that takes long: models are not loaded."""
    import huggingface_hub.constants

    from dsg_cli.evals import benches as tasks
    from dsg_cli.stages import composition, inputs, select

    index = tasks.task_index

    def stop(*_, **__):
        raise DsgError("It would be loaded now.")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(tasks, "task_index", lambda folders, _: index(folders, False))  # Thousands take seconds.
    monkeypatch.setattr(select, "load_model", stop)
    monkeypatch.setattr(inputs, "load_model", stop)
    monkeypatch.setattr(composition, "load_model", stop)
    shutil.copytree(DATA / "schema-1", tmp_path / "dsg-workspace")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", COMMANDS)
def test_any_arguments(no_work, command):
    texts = (
        st.just("\udcff") | TEXT.filter(is_argument) | WORDS | st.floats(width=16).map(str) | st.integers().map(str)
    ).filter(lambda text: not text.startswith(("/", "..")))
    given_option = st.tuples(st.sampled_from(OPTIONS[command]), texts)
    flags = st.sampled_from(OPTIONS[command]).map(lambda option: (option,))
    listed = st.lists(st.tuples(texts) | given_option | flags, max_size=4)
    last = {"run": ["lab", "--dry-run"], "show": ["eval-001"]}.get(command, [])

    @tries(14)
    @given(listed)
    def check(parts):
        code, err = run_dsg([command, *last, *(word for part in parts for word in part)])
        assert code in (0, 1, 2, 3) and "Traceback" not in err

    check()
