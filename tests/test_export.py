"""Light files, and model folders that stock transformers loads without this package."""

from __future__ import annotations

import copy
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_guardrail, make_sae, python
from handmade import attack, judged_header, report
from huggingface_hub import ModelCard
from loopback import LoopbackHub
from markdown_it import MarkdownIt
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_serving import FAMILIES, PROMPTS, SITE, build
from transformers import AutoModelForCausalLM

from dsg_cli.errors import DsgError
from dsg_cli.export.card import BaseCard, front_matter, model_card, read_base_card
from dsg_cli.export.folder import GUARD_SHARD, export_folder
from dsg_cli.guardrail.guarded import guarded
from dsg_cli.guardrail.loading import light_file, load_guardrail, read_light
from dsg_cli.guardrail.runtime.spec import NEVER, tensors_digest
from dsg_cli.lab import data as lab
from dsg_cli.models.language_model import load_model
from dsg_cli.models.sae import read_sae
from dsg_cli.recipe import load_recipe
from dsg_cli.report.rendering import code, escaped
from dsg_cli.stages import export
from dsg_cli.stages.export import card_facts
from dsg_cli.stages.inputs import find_composition, guardrail_modules
from dsg_cli.workspace.artifacts import Guardrail, artifact_digest
from dsg_cli.workspace.store import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = Path(__file__).parent / "data" / "schema-2"


REMOTE = {"trust_remote_code": True, "dtype": torch.float32}


QUESTION = "Question: What is the counter of the grim hex"


@pytest.fixture
def light(tmp_path):
    workspace = Workspace(DATA)
    stored = workspace.read("guardrail-001")
    model = stored.header.model.replace(source="/home/someone/secret/model")
    body = stored.body_as(Guardrail).replace(forget=["/home/someone/secret/hazard.jsonl", "lab-hexes"])
    path = tmp_path / "guardrail.safetensors"
    path.write_bytes(light_file(stored.header.replace(model=model), body, workspace.tensors(stored)))
    return path


def rewrite(path, change):
    """The light file with its document and tensors changed."""
    with safe_open(path, framework="pt") as file:
        data, tensors = json.loads(file.metadata()["dsg"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(data, tensors)
    save_file(tensors, path, metadata={"dsg": json.dumps(data)})


class TestLightFile:
    def test_is_the_guardrail_without_paths(self, light):
        found, wanted = load_guardrail(light), load_guardrail(DATA / "guardrail-001.json")
        assert found.spec == wanted.spec and found.key == wanted.key
        held = read_light(light)
        assert held.body.forget == ["hazard.jsonl", "lab-hexes"] and held.header.model.source == "model"
        assert b"someone" not in light.read_bytes()

    def test_truncated(self, light):
        light.write_bytes(light.read_bytes()[:-100])
        with pytest.raises(DsgError, match="truncated"):
            load_guardrail(light)

    def test_altered_document(self, light):
        rewrite(light, lambda data, _: data.update(threshold=1e9))
        with pytest.raises(DsgError, match="was altered"):
            load_guardrail(light)

    def test_altered_tensor(self, light):
        rewrite(light, lambda _, tensors: tensors["W_dec"].mul_(0.5))
        with pytest.raises(DsgError, match="do not match their digest"):
            load_guardrail(light)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_values_that_are_not_finite(self, light, value):
        def broken(data, tensors):
            tensors["W_enc"][0, 0].fill_(value)
            data["tensors_sha256"] = tensors_digest(tensors)
            data["sha256"] = artifact_digest(data)

        rewrite(light, broken)
        with pytest.raises(DsgError, match="not finite"):
            load_guardrail(light)

    def test_something_else(self, light, tmp_path):
        with pytest.raises(DsgError, match="no light file"):
            load_guardrail(DATA / "guardrail-001.safetensors")
        with pytest.raises(DsgError, match="There is no file"):
            load_guardrail(tmp_path / "missing.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_model_answers_as_the_guarded_one(family, tmp_path):
    """Several shards, another dtype at rest, two guardrails of which one is topk; and saved and loaded again."""
    model = build(family)
    model.save_pretrained(tmp_path / "base", max_shard_size="10KB")
    guards = []
    for name, architecture, options in (("one", "jumprelu", {}), ("two", "topk", {"k": 6})):
        make_sae(tmp_path / name, architecture, bias=1.0 if family == "GPT2" else 6.0, **options)
        source = replace(read_sae(str(tmp_path / name)), site=SITE, write=SITE)
        gate = {"gate": "window", "threshold": 0.5, "window": 3, "strength": 20.0}
        guards.append(make_guardrail(source, [3, 11, 30], **gate))
    folder = tmp_path / "exported"
    export_folder(
        folder,
        base=tmp_path / "base",
        architecture=type(model).__name__,
        tokenizer_class="X",
        guardrails=guards,
        light_files=[],
        card="",
    )
    linked = (tmp_path / "base").glob("*.safetensors")
    assert all(path.stat().st_nlink == 2 for path in linked)
    exported = AutoModelForCausalLM.from_pretrained(folder, **REMOTE)
    exported.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", **REMOTE)
    with torch.no_grad():
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            with guarded(model, guards, allow_mismatch=True):
                expected = model(ids, use_cache=False).logits
                written = model.generate(ids, max_new_tokens=8, do_sample=False)
            for other in (exported, again, copy.deepcopy(exported)):
                torch.testing.assert_close(other(ids, use_cache=False).logits, expected)
                assert torch.equal(other.generate(ids, max_new_tokens=8, do_sample=False), written)
    assert sum(guard.counters()["n_gated"] for guard in guards) > 0


@pytest.fixture(scope="module")
def exported_lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab") / "exported"
    guardrail = load_guardrail(DATA / "guardrail-001.json")
    export_folder(
        folder,
        base=lab.MODEL_DIR,
        architecture="Gemma2ForCausalLM",
        tokenizer_class="PreTrainedTokenizerFast",
        guardrails=[guardrail],
        light_files=[b"light"],
        card="# A card\n",
    )
    return folder


STRANGER = """
import sys
sys.modules["dsg_cli"] = None  # As if it were not installed.
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
folder, question = sys.argv[1:]
remote = {"trust_remote_code": True}
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **remote)
assert model.dtype == torch.bfloat16 and model.dsg_guardrails[0].slice.W_enc.dtype == torch.float32
ids = AutoTokenizer.from_pretrained(folder, **remote)(question, return_tensors="pt")
model.generate(**ids, max_new_tokens=3)
assert model.dsg_guardrails[0].counters()["n_gated"] == 1, model.dsg_guardrails[0].counters()
text = pipeline("text-generation", model=folder, **remote)(question, max_new_tokens=3)[0]["generated_text"]
assert text.startswith(question)
def refused(load):
    try:
        load()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise SystemExit("loaded")
print(refused(lambda: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)))
print(refused(lambda: AutoModel.from_pretrained(folder, **remote)))
random = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, **remote), **remote)
print(refused(lambda: random(torch.tensor([[2, 5]]))))
"""


def test_a_stranger_loads_it_and_it_fails_closed(exported_lab, tmp_path):
    done = python("-c", STRANGER, str(exported_lab), QUESTION, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ValueError: The repository") and "trust_remote_code=True" in done.stdout
    assert "for this kind of AutoModel" in done.stdout
    assert "guardrails of this model are not loaded" in done.stdout


def test_what_the_folder_holds(exported_lab):
    names = {path.name for path in exported_lab.iterdir()}
    assert {"tokenizer.json", "generation_config.json", "guardrail.safetensors", "README.md"} <= names
    assert (exported_lab / "README.md").read_text() == "# A card\n"
    for path in exported_lab.glob("*.py"):
        assert "dsg_cli" not in path.read_text(), path.name


@pytest.mark.parametrize("what", ["missing", "altered", "not finite"])
def test_a_broken_guard_shard_is_refused(exported_lab, tmp_path, what):
    folder = tmp_path / f"broken-{what.replace(' ', '-')}"
    shutil.copytree(exported_lab, folder)
    tensors = load_file(folder / GUARD_SHARD)
    if what == "missing":
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != GUARD_SHARD}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        tensors["dsg_guardrails.0.slice.W_dec"][0, 0] = torch.nan if what == "not finite" else 0.0
        save_file(tensors, folder / GUARD_SHARD, metadata={"format": "pt"})
    with pytest.raises(
        Exception,
        match="not finite" if what == "not finite" else "lack 5 tensors" if what == "missing" else "were altered",
    ):
        AutoModelForCausalLM.from_pretrained(folder, **REMOTE)


class TestRefusals:
    def export(self, folder, guardrail, base=lab.MODEL_DIR, architecture="Gemma2ForCausalLM"):
        export_folder(
            folder,
            base=base,
            architecture=architecture,
            tokenizer_class="X",
            guardrails=[guardrail],
            light_files=[],
            card="",
        )

    def test_a_gate_that_needs_whole_sequences(self, tmp_path):
        guardrail = load_guardrail(DATA.with_name("schema-1") / "guardrail-001.json")
        with pytest.raises(DsgError, match="needs whole sequences"):
            self.export(tmp_path / "to", guardrail)

    def test_a_folder_that_is_not_empty(self, tmp_path):
        (tmp_path / "mine.txt").write_text("mine")
        with pytest.raises(DsgError, match="is not empty"):
            self.export(tmp_path, load_guardrail(DATA / "guardrail-001.json"))
        assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]

    def test_a_base_without_safetensors(self, tmp_path):
        shutil.copytree(lab.MODEL_DIR, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
        (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(DsgError, match=r"no model\.safetensors"):
            self.export(tmp_path / "to", load_guardrail(DATA / "guardrail-001.json"), base=tmp_path / "base")
        assert not (tmp_path / "to").exists()

    def test_a_class_of_the_users_own(self, tmp_path):
        with pytest.raises(DsgError, match="no class of transformers"):
            self.export(tmp_path / "to", load_guardrail(DATA / "guardrail-001.json"), architecture="MineForCausalLM")


@pytest.fixture
def workspace(tmp_path):
    shutil.copytree(DATA, tmp_path / "w", ignore=shutil.ignore_patterns("features-*"))  # Of another chain.
    return tmp_path / "w"


@pytest.mark.parametrize("schema", ["schema-4", "schema-5"])
def test_all_that_a_guardrail_says_survives_both_forms(schema, tmp_path):
    """A probe with its bias and weights; a refusal clamp, in which one feature is set to another value than others."""
    stored = Workspace(DATA.with_name(schema)).read("guardrail-001")
    path = tmp_path / "g.safetensors"
    path.write_bytes(
        light_file(stored.header, stored.body_as(Guardrail), load_file(stored.path.with_suffix(".safetensors")))
    )
    guard = load_guardrail(path)
    assert guard.key == load_guardrail(stored.path).key
    if schema == "schema-4":
        assert guard.gate.form == "probe" and guard.gate.bias and guard.gate.clip and guard.detect.unique().numel() > 2
    else:
        assert guard.gate.form == "token" and guard.spec.coefficients == [300.0] + [-300.0] * 5
        assert guard.spec.above == [NEVER] + [0.05] * 5
    folder = tmp_path / "model"
    options = {"architecture": "Gemma2ForCausalLM", "tokenizer_class": "PreTrainedTokenizerFast"}
    export_folder(folder, base=lab.MODEL_DIR, guardrails=[guard], light_files=[], card="", **options)
    exported = AutoModelForCausalLM.from_pretrained(folder, **REMOTE)
    loaded = load_model("lab")
    ids = loaded.tokenizer(f"{QUESTION} Rahurk? Answer:", return_tensors="pt")["input_ids"]
    with torch.no_grad(), guarded(loaded.model, guard):
        wanted = loaded.model(ids, use_cache=False).logits
    with torch.no_grad():
        assert torch.equal(exported(ids, use_cache=False).logits, wanted)
        assert not torch.equal(loaded.model(ids, use_cache=False).logits, wanted)  # The gate opened.


KEYS = {"schema-1": "e4e98649fe35", "schema-2": "fd9a6ba0eafb", "schema-4": "e76d8ca88718"}


@pytest.mark.parametrize("schema", KEYS)
def test_a_guardrail_keeps_the_digest_that_its_version_gave_it(schema):
    """What was exported then, and what caches hold of it, is known by that."""
    assert load_guardrail(DATA.with_name(schema) / "guardrail-001.json").key.startswith(KEYS[schema])


class TestCommand:
    def test_light_and_folder(self, dsg, workspace, tmp_path):
        code, out, err = dsg("export", "mine/g.safetensors", "-w", workspace)
        assert (code, out.strip()) == (0, "mine/g.safetensors"), err
        assert load_guardrail("mine/g.safetensors").gate.form == "window"
        code, out, err = dsg("export", "model", "-w", workspace, "--json")
        assert code == 0, err
        written = json.loads(out)
        assert written["form"] == "model" and written["guardrails"] == ["guardrail-001"]
        assert {file["name"] for file in written["files"]} == {path.name for path in Path("model").iterdir()}
        assert load_guardrail("model").key == load_guardrail("mine/g.safetensors").key
        assert AutoModelForCausalLM.from_pretrained("model", **REMOTE).dsg_guardrails[0].gate.form == "window"

    def test_a_light_file_where_a_guardrail_is_named(self, dsg, workspace):
        code, _, err = dsg("export", "g.safetensors", "-w", workspace)
        assert code == 0, err
        shutil.copytree(lab.MODEL_DIR, "model")
        asked = ("generate", QUESTION, "--from", "g.safetensors", "-w", "elsewhere", "--max-new-tokens", 3, "--json")
        code, out, err = dsg(*asked, "--model", "model")
        assert code == 0, err
        assert json.loads(out)[0]["guarded"]["gates"][0]["latched_at"] is not None
        code, out, _ = dsg("export", "again", "--from", "g.safetensors", "--model", "model", "-w", "elsewhere")
        assert (code, out.strip()) == (0, "again")
        (Path("model") / "tokenizer.json").unlink()
        code, _, err = dsg(*asked, "--model", "model")
        assert code == 1 and "has no tokenizer" in err

    def test_a_guardrail_that_cannot_be_exported_is_not_made(self, dsg, tmp_path):
        shutil.copytree(DATA.with_name("schema-1"), tmp_path / "w1")
        before = sorted(path.name for path in (tmp_path / "w1").iterdir())
        code, _, err = dsg("apply", "--export", "model", "-w", tmp_path / "w1")
        assert code == 1 and "needs whole sequences" in err
        assert sorted(path.name for path in (tmp_path / "w1").iterdir()) == before

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("export", "w"), "is not empty"),
            (("export", "w/guardrail-001.safetensors"), "exists"),
            (("export", "x.safetensors", "--form", "model"), "one file"),
            (("export", "hf://no-name"), "no address on the hub"),
            (("export", "x", "--form", "heavy"), "neither light nor model"),
            (("apply", "--export", "w"), "is not empty"),
        ],
    )
    def test_refusals(self, dsg, workspace, arguments, words):
        before = sorted(path.name for path in workspace.iterdir())
        code, out, err = dsg(*arguments, "-w", workspace)
        assert code == 1 and words in err and not out
        assert sorted(path.name for path in workspace.iterdir()) == before


HUB_ROUND_TRIP = """
import sys
import torch
from dsg_cli import load_guardrail
from dsg_cli.cli.app import main
from dsg_cli.errors import DsgError
workspace, address = sys.argv[1:]

def dsg(*arguments):
    try:
        main(list(arguments))
    except SystemExit as stop:
        return stop.code

assert dsg("export", address, "-w", workspace) == 0
from huggingface_hub import ModelCard
card = ModelCard.load("org/guarded")
assert card.data.library_name == "dsg-cli" and card.data.license == "apache-2.0"
assert f'load_guardrail("{address}/guardrail.safetensors")' in card.text
from dsg_cli.export.card import BaseCard, read_base_card
from dsg_cli.model import model_folder
commit = model_folder("org/base", weights=False).name
assert read_base_card(f"org/base@{commit}") == BaseCard(("mit",), languages=("de",))
assert read_base_card("org/unread") == BaseCard()
light = load_guardrail(address)
assert light.key == load_guardrail(workspace + "/guardrail-001.json").key
assert dsg("export", address, "-w", workspace, "--form", "model") == 0  # A further commit to what is ours.
assert load_guardrail(address).key == light.key
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(address.removeprefix("hf://"), trust_remote_code=True)
assert model.dsg_guardrails[0].key == light.key
assert dsg("export", "hf://org/taken", "-w", workspace) == 1
for wrong in (address + "@nowhere", "hf://org/nothing", "hf://org/taken", "hf://org/closed"):
    try:
        load_guardrail(wrong)
    except DsgError as error:
        print(wrong, error)
"""


def test_push_to_and_load_from_a_hub(workspace, tmp_path):
    with LoopbackHub(tmp_path / "hub") as hub:
        hub.add("models", "org/taken", {"config.json": b"{}"})
        hub.add("models", "org/closed", {"guardrail.safetensors": b""})
        said = b"---\nlicense: mit\nlanguage: de\n---\n"
        hub.add("models", "org/base", {"config.json": b"{}", "README.md": said})
        hub.gated.add("org/closed")
        environment = hub.environment(tmp_path / "cache")
        done = python("-c", HUB_ROUND_TRIP, str(workspace), "hf://org/guarded", env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("hf://org/guarded@") == 3  # Two commits, and the wrong revision.
        assert "The repository org/taken holds other files, among them config.json." in done.stderr
        for words in ("no such revision", "no repository org/nothing", "lacks the file", "is gated"):
            assert words in done.stdout, words
        assert {path.name for path in (tmp_path / "hub/models/org/taken").iterdir()} == {"config.json"}
        assert "org/guarded" in hub.private
    environment["HF_HUB_OFFLINE"] = "1"
    offline = python("-c", "from dsg_cli import load_guardrail; load_guardrail('hf://org/x')", env=environment)
    assert "The hub cannot be reached" in offline.stderr
    assert not [path for path in workspace.iterdir() if path.name.startswith(".export")]


STRANGERS_EVALUATION = """
import sys
sys.modules["dsg_cli"] = None  # As if it were not installed.
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


BENCHES = ("lab-hexes", "lab-hexes-terse", "lab-near", "lab-ciphers")


@pytest.mark.slow
def test_lm_eval_without_this_package_agrees_question_for_question(dsg, workspace, tmp_path):
    """The README's way to check an exported model: stock lm-eval on the folder, with the lab's own tasks."""
    code, _, err = dsg("lab", "export", "lab")
    assert code == 0, err
    code, _, err = dsg("apply", "--export", "model", "-w", workspace)
    assert code == 0, err
    code, out, err = dsg("eval", "-w", workspace, *(word for bench in BENCHES for word in ("--bench", bench)), "--json")
    assert code == 0, err
    report = json.loads(out)
    results = report["results"]
    arguments = ["--model", "hf", "--model_args", "pretrained=model,trust_remote_code=True,dtype=float32"]
    arguments += ["--include_path", "lab/tasks", "--tasks", ",".join(BENCHES), "--batch_size", "7", "--device", "cpu"]
    arguments += ["--log_samples", "--output_path", "found"]
    done = python("-c", STRANGERS_EVALUATION, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (workspace / f"{report['id']}.jsonl").read_text().splitlines()]
    ours = {row["id"]: row["unlearned"] for row in rows}
    theirs = {}
    for path in (tmp_path / "found").rglob("samples_*.jsonl"):
        for sample in map(json.loads, path.read_text().splitlines()):
            theirs[sample["doc"]["id"]] = [float(response[0]) for response in sample["filtered_resps"]]
    assert ours.keys() == theirs.keys() and len(ours) >= 200
    for name, found in theirs.items():
        assert found == pytest.approx(ours[name], abs=1e-3), name
        assert max(range(4), key=found.__getitem__) == max(range(4), key=ours[name].__getitem__), name
    (summary,) = (tmp_path / "found").rglob("results_*.json")
    for bench, metrics in json.loads(summary.read_text())["results"].items():
        assert metrics["acc,none"] == results[bench]["unlearned"]["acc"], bench
    assert results["lab-hexes"]["unlearned"]["acc"] <= 0.30 and results["lab-near"]["unlearned"]["acc"] >= 0.95


DATA_CARD = Path(__file__).parent / "data"


EVAL, ATTACK = "eval", "attack"


def judge(workspace_card, guardrail, kind=EVAL, body=None, **changed):
    """An evaluation or an attack made by hand, of a guardrail in a workspace."""
    header = judged_header(kind, inputs=[guardrail.as_input()], **changed)
    return workspace_card.write(header, body or (report() if kind == EVAL else attack()))


@pytest.fixture
def workspace_card(tmp_path):
    """A guardrail that can write, its threshold, an evaluation and an attack."""
    for path in (DATA_CARD / "schema-2").glob("[gt]*-001.*"):
        (tmp_path / "w").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "w")
    made = Workspace(tmp_path / "w")
    judge(made, made.read("guardrail-001"))
    judge(made, made.read("guardrail-001"), ATTACK)
    return made


def facts_of(workspace_card, **changed):
    composition = find_composition(workspace_card, ["guardrail-001"])
    said = {"name": "mine", "address": "mine", "is_on_hub": False, "is_whole_model": True, "instead": None}
    return card_facts(
        workspace_card,
        composition,
        guardrail_modules(workspace_card, composition),
        **{**said, "is_mismatched": False, **changed},
    )


def loaded(text, tmp_path):
    """A card as the hub's own client reads it from a file."""
    path = tmp_path / "README.md"
    path.write_text(text, encoding="utf-8")
    return ModelCard.load(path)


def code_of(text):
    [block] = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    return block


class TestWhatIsWritten:
    def test_a_model_folder(self, dsg, workspace_card, tmp_path, capsys):
        code_, _, err = dsg("export", "my guarded `model`", "-w", workspace_card.folder)
        assert code_ == 0, err
        card = ModelCard.load("my guarded `model`/README.md")
        said = card.data
        assert (said.license, said.language, said.library_name) == ("apache-2.0", ["en"], "transformers")
        assert said.pipeline_tag == "text-generation" and {"unlearning", "guardrail"} <= set(said.tags)
        assert "base_model" not in yaml.safe_load(card.content.split("---")[1])  # The lab is no repository of the hub.
        found = {(one.dataset_name, one.metric_type): one for one in said.eval_results}
        assert found["lab-hexes", "accuracy"].metric_value == 0.7 and found["gsm", "exact_match"].metric_value == 0.5
        assert set(found) == {("lab-hexes", "accuracy"), ("a|b", "accuracy"), ("gsm", "exact_match")}
        assert "eval-001" in found["a|b", "accuracy"].metric_name and found["a|b", "accuracy"].dataset_split == "test"
        threshold = workspace_card.read("threshold-001")
        lengths = threshold.header.settings["lengths"]
        for words in (
            "| `lab-hexes` | `test` | 0.800 | 0.700 [0.560, 0.810] | 0.980 | 50 | `eval-001` |",
            r"| `a\|b` | `test` | 1.000 | 0.500 | 0.250 | 1000 | `eval-001` |",
            r"| `dilution` | `a\|b` | `test` | 0.000 | 0.480 | `48 benign tokens` | 0.900 | - | `attack-001` |",
            "To forget: `lab-hexes`.",
            "The knowledge is still in the weights, which lie in this folder.",
            "Not tried: `split`, ",
            f"{threshold.body.alpha:g} of further texts of {lengths[0]} to {lengths[1]} tokens like those of",
            f"| all retain text | to keep | {threshold.body.false_positive_rate:.3f} [",
        ):
            assert words in card.text, words
        for artifact_id in ("threshold-001", "guardrail-001", "eval-001", "attack-001"):
            assert workspace_card.read(artifact_id).json["sha256"] in card.text
        exec(code_of(card.text), {})  # Where it was written, as it stands.
        assert "'n_sequences': 1" in capsys.readouterr().out

    @pytest.mark.parametrize("schema", ["schema-1", "schema-2"])
    def test_light_files(self, dsg, tmp_path, capsys, schema):
        """Of a gate that can write, and of one that needs whole sequences."""
        shutil.copytree(DATA_CARD / schema, tmp_path / "w", ignore=shutil.ignore_patterns("features-*", "eval-*"))
        assert dsg("export", "light", "--form", "light", "-w", tmp_path / "w")[0] == 0
        assert sorted(path.name for path in Path("light").iterdir()) == ["README.md", "guardrail.safetensors"]
        card = ModelCard.load("light/README.md")
        assert card.data.library_name == "dsg-cli" and card.data.eval_results is None
        assert ("a mean over the sequence" in card.text) == (schema == "schema-1")
        assert dsg("lab", "export", "lab")[0] == 0
        capsys.readouterr()
        exec(code_of(card.text), {})
        assert "'n_sequences': 1" in capsys.readouterr().out

    def test_without_evaluations_it_says_how_to_make_them(self, dsg, tmp_path):
        shutil.copytree(DATA_CARD / "schema-4", tmp_path / "w", ignore=shutil.ignore_patterns("eval-*"))
        assert dsg("export", "light", "--form", "light", "-w", tmp_path / "w")[0] == 0
        card = ModelCard.load("light/README.md")
        assert "model-index" not in card.content
        commands = re.findall(r"```bash\n(.*?)\n```", card.text)
        assert commands == [
            "dsg eval --from guardrail-001 --bench BENCH",
            "dsg attack --from guardrail-001 --kind all",
        ]
        for command in commands:
            assert dsg(*command.split()[1:], "--help")[0] == 0
        assert "the threshold that it was made from was not at hand" in card.text

    def test_what_apply_exports_has_one(self, dsg, tmp_path):
        for path in (DATA_CARD / "schema-2").glob("threshold-001.*"):
            (tmp_path / "w").mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / "w")
        code_, out, err = dsg("apply", "--strength", "4r", "--export", "model", "-w", tmp_path / "w")
        assert code_ == 0, err
        card = ModelCard.load("model/README.md")
        assert f"`{out.strip()}`" in card.text and "No evaluation of it was at hand" in card.text


class TestWhatCounts:
    def test_the_newest_of_each_bench_and_split(self, workspace_card):
        guardrail = workspace_card.read("guardrail-001")
        results = {"lab-hexes": {"base": {"acc": 0.8, "n": 9}, "unlearned": {"acc": 0.2, "n": 9}}}
        judge(
            workspace_card,
            guardrail,
            body=report().replace(results=results),
            settings={"benches": ["lab-hexes"]},
        )
        judge(workspace_card, guardrail, body=report().replace(results=results, split="dev"))
        text = model_card(facts_of(workspace_card))
        rows = [line for line in text.splitlines() if line.startswith("| `lab-hexes` | `")]
        assert [row.split(" | ")[-1] for row in rows] == ["`eval-002` |", "`eval-003` |"]
        assert "dev questions, on which settings may have been chosen" in text
        index = yaml.safe_load(text.split("---\n")[1])["model-index"][0]["results"]
        assert sorted(one["dataset"]["split"] for one in index) == ["dev", "test", "test", "test"]

    def test_of_this_guardrail_on_its_own_weights_and_whole(self, workspace_card):
        other = workspace_card.write(
            workspace_card.read("guardrail-001").header.replace(seed=9, inputs=[]),
            workspace_card.read("guardrail-001").body,
            tensors=load_file(workspace_card.folder / "guardrail-001.safetensors"),
        )
        judge(workspace_card, other)
        judge(workspace_card, workspace_card.read("guardrail-001"), settings={"benches": [], "allow_mismatch": True})
        damaged = judge(workspace_card, workspace_card.read("guardrail-001"))
        damaged.path.write_text(damaged.path.read_text().replace("0.7", "0.1"))
        assert [stored.id for stored in facts_of(workspace_card).evaluations] == ["eval-001"]

    def test_on_other_weights_nothing_was_measured(self, workspace_card, tmp_path):
        text = model_card(facts_of(workspace_card, instead="lab-retrain", is_mismatched=True))
        assert "Nothing was measured on these" in text and "model-index" not in text and "| base |" not in text
        assert "`lab-retrain`" in text

    def test_a_base_of_the_hub(self, workspace_card, tmp_path):
        facts = replace(facts_of(workspace_card), model="org/mo-del@abc", base="org/mo-del@abc", is_whole_model=False)
        facts = replace(facts, base_card=BaseCard(("gemma",), "", "https://example.org/terms", ("no", "en")))
        said = loaded(front_matter(facts), tmp_path).data
        assert (said.base_model, said.base_model_relation) == ("org/mo-del", "adapter")
        assert said.license == "gemma" and said.license_link.endswith("/terms") and said.language == ["no", "en"]
        text = model_card(facts)
        assert 'from_pretrained("org/mo-del", revision="abc")' in text and "`https://example.org/terms`" in text

    def test_features_that_were_picked_by_description(self, workspace_card):
        facts = facts_of(workspace_card)
        features = Workspace(DATA_CARD / "schema-3").read("features-001")
        features = replace(features, body=features.body.replace(described={"query": "hex <b> | curse"}))
        stored = replace(facts.guards[0].stored, body=facts.guards[0].body.replace(forget=[]))
        facts = replace(facts, guards=[replace(facts.guards[0], stored=stored, features=features)])
        text = model_card(facts)
        assert "from answering about `hex <b> | curse`." in text and "To forget: no corpus." in text
        assert "picked by their descriptions, for the words `hex <b> | curse`" in text and features.id in text
        assert "what its features stand for" in model_card(
            replace(facts, guards=[replace(facts.guards[0], features=None)])
        )

    def test_a_licence_that_is_not_known_is_not_invented(self, workspace_card, tmp_path):
        text = model_card(replace(facts_of(workspace_card), base_card=BaseCard(), base="/home/someone/secret/base"))
        assert loaded(text, tmp_path).data.license is None and "which is not known here" in text
        assert "someone" not in text and "`base`" in text


HOSTILE = [
    "<script>alert(1)</script>",
    "a|b",
    "two\n---\nlines",
    "`tick` *b*",
    "[x](javascript:1)",
    "rtl\u202etxt",
    "a\\",
]


class TestNamesStayNames:
    @pytest.fixture
    def hostile(self, tmp_path):
        stored = Workspace(DATA_CARD / "schema-2").read("guardrail-001")
        workspace_card = Workspace(tmp_path / "w")
        forget = [*HOSTILE, "/home/someone/secret/hazard.jsonl"]
        note = "Read <b>/home/someone/secret/notes.txt</b> | and www.example.org, https://example.org"
        guardrail = workspace_card.write(
            stored.header.replace(notes=[note], inputs=[]),
            stored.body_as(Guardrail).replace(forget=forget),
            tensors=load_file(stored.path.with_suffix(".safetensors")),
        )
        sides = {"base": {"acc": 1.0, "n": 8}, "unlearned": {"acc": 0.25, "n": 8}}
        body = report().replace(results=dict.fromkeys(HOSTILE, sides), gate={})
        judge(workspace_card, guardrail, body=body, settings={"benches": HOSTILE})
        for name in HOSTILE:
            judge(workspace_card, guardrail, ATTACK, attack().replace(bench=name, threat_model=name))
        return workspace_card

    def test_front_matter(self, hostile, tmp_path):
        facts = facts_of(hostile, name=HOSTILE[2] + HOSTILE[0])
        card = loaded(model_card(facts), tmp_path)
        assert len(card.data.eval_results) == len(HOSTILE) and card.data.model_name == "two --- lines" + HOSTILE[0]
        assert {one.metric_value for one in card.data.eval_results} == {0.25}
        assert {"a|b", "two --- lines", HOSTILE[0]} <= {one.dataset_name for one in card.data.eval_results}

    def test_text(self, hostile):
        text = model_card(facts_of(hostile, name=HOSTILE[0], address='x"\n```\n<script>'))
        assert "someone" not in text and "\u202e" not in text
        body = text.split("---\n", 2)[2]
        tokens = MarkdownIt("commonmark", {"linkify": False}).enable("table").parse(body)
        inline = [child for token in tokens if token.children for child in token.children]
        assert not [one for one in [*tokens, *inline] if one.type.startswith("html")]
        assert {one.attrs["href"] for one in inline if one.type == "link_open"} == {"https://arxiv.org/abs/2504.08192"}
        assert [token.tag for token in tokens if token.type == "heading_open"].count("h1") == 1
        assert len([token for token in tokens if token.type == "fence"]) == 1
        tables = body.split("\n\n")
        for table in (MarkdownIt().enable("table").render(part) for part in tables if part.startswith("|")):
            cells = {row.count("<td>") for row in table.split("<tr>")[2:]}
            assert len(cells) == 1, table
        for name in (HOSTILE[0], "two --- lines", "[x](javascript:1)"):
            assert code(name) in body

    def test_running_text_and_code(self):
        assert escaped("a <b> & *c* www.x.org") == r"a &lt;b&gt; &amp; \*c\* www\.x.org"
        assert code("a`b\n|c", in_table=True) == r"`a'b \|c`" and code("x\u202ey") == "`x?y`"


@pytest.mark.parametrize(
    ("text", "known"),
    [
        (
            "---\nlicense: gemma\nlanguage: [en, no]\n---\n# x",
            BaseCard(("gemma",), languages=("en",)),
        ),  # `no` is False.
        (
            "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n",
            BaseCard(("other",), "mine", "LICENSE"),
        ),
        ("---\nlicense: [mit, apache-2.0]\n---", BaseCard(("mit", "apache-2.0"))),
        ("---\r\nlicense: mit\r\n---\r\n", BaseCard(("mit",))),
        ("---\nlicense: '<script>'\nlicense_name: [x]\nlanguage: {a: b}\n---\n", BaseCard()),
        ("---\nlicense: !!python/object:os.system x\n---\n", BaseCard()),
        ("---\nlicense: [[[\n---\n", BaseCard()),
        ("---\nlicense: 2020-99-99\n---\n", BaseCard()),
        ("---\n- license\n---\n", BaseCard()),
        ("---\n" + "[" * 5000 + "\n---\n", BaseCard()),
        ("# license: mit", BaseCard()),
        ("", BaseCard()),
        (None, BaseCard()),
    ],
)
def test_what_the_base_s_card_says(tmp_path, text, known):
    if text is not None:
        (tmp_path / "README.md").write_bytes(text.encode())
    assert read_base_card(str(tmp_path)) == known


def test_a_card_that_is_no_text(tmp_path):
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert read_base_card(str(tmp_path)) == BaseCard()


def test_a_folder_of_the_users_own(tmp_path, workspace_card, monkeypatch):
    """Its own card says the licence; its path is told to nobody."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "secret" / "base"
    shutil.copytree(lab.MODEL_DIR, folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    stored = workspace_card.read("guardrail-001")
    other = Workspace(tmp_path / "other")
    other.write(
        stored.header.replace(model=stored.header.model.replace(source=str(folder)), inputs=[]),
        stored.body,
        tensors=load_file(stored.path.with_suffix(".safetensors")),
    )
    export.run(load_recipe(None, sets=[], flags={}), other, "out")
    card = ModelCard.load("out/README.md")
    assert card.data.license == "mit" and "secret" not in card.content and "`base`" in card.text
    assert json.loads(Path("out/config.json").read_text())["model_type"].startswith("dsg_")
