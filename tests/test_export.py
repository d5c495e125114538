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
from dsg_cli.stages.composition import find_composition, guardrail_modules
from dsg_cli.stages.export import card_facts
from dsg_cli.workspace.artifacts import Guardrail, artifact_digest
from dsg_cli.workspace.store import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = Path(__file__).parent / "data"

SCHEMA_2 = DATA / "schema-2"
REMOTE = {"trust_remote_code": True, "dtype": torch.float32}
QUESTION = "Question: What is the counter of the grim hex"


def guardrail_of(schema):
    """What a version wrote: artifact and tensors."""
    stored = Workspace(DATA / schema).read("guardrail-001")
    return stored, load_file(stored.path.with_suffix(".safetensors"))


@pytest.fixture
def light(tmp_path):
    stored, tensors = guardrail_of("schema-2")
    model = stored.header.model.replace(source="/home/someone/secret/model")
    body = stored.body_as(Guardrail).replace(forget=["/home/someone/secret/hazard.jsonl", "lab-hexes"])
    path = tmp_path / "guardrail.safetensors"
    path.write_bytes(light_file(stored.header.replace(model=model), body, tensors))
    return path


@pytest.fixture
def succeed(dsg):
    """A command that has to succeed -> its stdout, without white space around it."""

    def run(*arguments):
        code, out, err = dsg(*arguments)
        assert code == 0, err
        return out.strip()

    return run


def write_folder(folder, *guardrails, base=lab.MODEL_DIR, architecture="Gemma2ForCausalLM", light_files=(), card=""):
    names = {"architecture": architecture, "tokenizer_class": "PreTrainedTokenizerFast"}
    export_folder(folder, base=base, guardrails=guardrails, light_files=light_files, card=card, **names)
    return folder


def rewrite(path, change):
    """The light file with its document and tensors changed."""
    with safe_open(path, framework="pt") as file:
        data, tensors = json.loads(file.metadata()["dsg"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(data, tensors)
    save_file(tensors, path, metadata={"dsg": json.dumps(data)})


class TestLightFile:
    def test_is_the_guardrail_without_paths(self, light):
        light_guard, guard = load_guardrail(light), load_guardrail(SCHEMA_2 / "guardrail-001.json")
        assert light_guard.spec == guard.spec and light_guard.key == guard.key
        held = read_light(light)
        assert held.body.forget == ["hazard.jsonl", "lab-hexes"] and held.header.model.source == "model"
        assert b"someone" not in light.read_bytes()

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda data, _: data.update(threshold=1e9), "was altered"),
            (lambda _, tensors: tensors["W_dec"].mul_(0.5), "do not match their digest"),
            (lambda data, tensors: not_finite(data, tensors, float("nan")), "not finite"),
            (lambda data, tensors: not_finite(data, tensors, float("inf")), "not finite"),
        ],
    )
    def test_altered(self, light, change, words):
        rewrite(light, change)
        with pytest.raises(DsgError, match=words):
            load_guardrail(light)

    def test_truncated_or_something_else(self, light, tmp_path):
        light.write_bytes(light.read_bytes()[:-100])
        others = (light, "truncated"), (SCHEMA_2 / "guardrail-001.safetensors", "no light file")
        for path, words in (*others, (tmp_path / "missing.safetensors", "There is no file")):
            with pytest.raises(DsgError, match=words):
                load_guardrail(path)


def not_finite(data, tensors, value):
    """A value that is no number, with digests that say nothing of it."""
    tensors["W_enc"][0, 0].fill_(value)
    data["tensors_sha256"] = tensors_digest(tensors)
    data["sha256"] = artifact_digest(data)


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
    folder = write_folder(tmp_path / "to", *guards, base=tmp_path / "base", architecture=type(model).__name__)
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
    guardrail = load_guardrail(SCHEMA_2 / "guardrail-001.json")
    return write_folder(tmp_path_factory.mktemp("lab") / "to", guardrail, light_files=[b"light"], card="# A card\n")


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


@pytest.mark.parametrize(
    ("what", "words"), [("missing", "lack 5 tensors"), ("altered", "were altered"), ("not-finite", "not finite")]
)
def test_a_broken_guard_shard_is_refused(exported_lab, tmp_path, what, words):
    folder = tmp_path / f"broken-{what}"
    shutil.copytree(exported_lab, folder)
    tensors = load_file(folder / GUARD_SHARD)
    if what == "missing":
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != GUARD_SHARD}
        path.write_text(json.dumps(index))
    else:
        tensors["dsg_guardrails.0.slice.W_dec"][0, 0] = torch.nan if what == "not-finite" else 0.0
        save_file(tensors, folder / GUARD_SHARD, metadata={"format": "pt"})
    with pytest.raises(Exception, match=words):
        AutoModelForCausalLM.from_pretrained(folder, **REMOTE)


@pytest.mark.parametrize("case", ["mean gate", "not empty", "no safetensors", "own class"])
def test_what_cannot_be_exported(tmp_path, case):
    folder, base, schema, architecture = tmp_path / "to", lab.MODEL_DIR, SCHEMA_2, "Gemma2ForCausalLM"
    if case == "mean gate":
        schema, words = DATA / "schema-1", "needs whole sequences"
    elif case == "not empty":
        folder.mkdir()
        (folder / "mine.txt").write_text("mine")
        words = "is not empty"
    elif case == "no safetensors":
        base, words = tmp_path / "base", r"no model\.safetensors"
        shutil.copytree(lab.MODEL_DIR, base, ignore=shutil.ignore_patterns("*.safetensors"))
        (base / "pytorch_model.bin").write_bytes(b"")
    else:
        architecture, words = "MineForCausalLM", "no class of transformers"
    with pytest.raises(DsgError, match=words):
        write_folder(folder, load_guardrail(schema / "guardrail-001.json"), base=base, architecture=architecture)
    assert [path.name for path in folder.glob("*")] == (["mine.txt"] if case == "not empty" else [])


def test_a_folder_that_an_earlier_version_exported_answers_as_it_did():
    """It carries its own code: this version must not have to be there, nor get in its way."""
    folder = DATA / "export-0.1"
    model = AutoModelForCausalLM.from_pretrained(folder, **REMOTE)
    rows = json.loads((folder / "expected.json").read_text())
    for row in rows:
        ids = torch.tensor([row["prompt"]])
        written = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
        assert written == row["guarded"]
    assert any(row["guarded"] != row["base"] for row in rows)
    assert model.dsg_guardrails[0].counters()["n_gated"] == 3


@pytest.fixture
def workspace(tmp_path):
    shutil.copytree(SCHEMA_2, tmp_path / "w", ignore=shutil.ignore_patterns("features-*"))  # Of another chain.
    return tmp_path / "w"


@pytest.mark.parametrize("schema", ["schema-4", "schema-5"])
def test_all_that_a_guardrail_says_survives_both_forms(schema, tmp_path):
    """A probe with its bias and weights; a refusal clamp, in which one feature is set to another value than others."""
    stored, tensors = guardrail_of(schema)
    path = tmp_path / "g.safetensors"
    path.write_bytes(light_file(stored.header, stored.body_as(Guardrail), tensors))
    guard = load_guardrail(path)
    assert guard.key == load_guardrail(stored.path).key
    if schema == "schema-4":
        assert guard.gate.form == "probe" and guard.gate.bias and guard.gate.clip and guard.detect.unique().numel() > 2
    else:
        assert guard.gate.form == "token" and guard.spec.coefficients == [300.0] + [-300.0] * 5
        assert guard.spec.above == [NEVER] + [0.05] * 5
    exported = AutoModelForCausalLM.from_pretrained(write_folder(tmp_path / "model", guard), **REMOTE)
    loaded = load_model("lab")
    ids = loaded.tokenizer(f"{QUESTION} Rahurk? Answer:", return_tensors="pt")["input_ids"]
    with torch.no_grad(), guarded(loaded.model, guard):
        wanted = loaded.model(ids, use_cache=False).logits
    with torch.no_grad():
        assert torch.equal(exported(ids, use_cache=False).logits, wanted)
        assert not torch.equal(loaded.model(ids, use_cache=False).logits, wanted)  # The gate opened.


@pytest.mark.parametrize(
    ("schema", "key"), [("schema-1", "e4e98649fe35"), ("schema-2", "fd9a6ba0eafb"), ("schema-4", "e76d8ca88718")]
)
def test_a_guardrail_keeps_the_digest_that_its_version_gave_it(schema, key):
    """What was exported then, and what caches hold of it, is known by that."""
    assert load_guardrail(DATA / schema / "guardrail-001.json").key.startswith(key)


class TestCommand:
    def test_light_and_folder(self, succeed, workspace):
        assert succeed("export", "mine/g.safetensors", "-w", workspace) == "mine/g.safetensors"
        assert load_guardrail("mine/g.safetensors").gate.form == "window"
        written = json.loads(succeed("export", "model", "-w", workspace, "--json"))
        assert written["form"] == "model" and written["guardrails"] == ["guardrail-001"]
        assert {file["name"] for file in written["files"]} == {path.name for path in Path("model").iterdir()}
        assert load_guardrail("model").key == load_guardrail("mine/g.safetensors").key
        assert AutoModelForCausalLM.from_pretrained("model", **REMOTE).dsg_guardrails[0].gate.form == "window"

    def test_a_light_file_where_a_guardrail_is_named(self, dsg, succeed, workspace):
        succeed("export", "g.safetensors", "-w", workspace)
        shutil.copytree(lab.MODEL_DIR, "model")
        asked = ("generate", QUESTION, "--from", "g.safetensors", "-w", "elsewhere", "--max-new-tokens", 3, "--json")
        answers = json.loads(succeed(*asked, "--model", "model"))
        assert answers[0]["guarded"]["gates"][0]["latched_at"] is not None
        asked_again = ("export", "again", "--from", "g.safetensors", "--model", "model", "-w", "elsewhere")
        assert succeed(*asked_again) == "again"
        (Path("model") / "tokenizer.json").unlink()
        code, _, err = dsg(*asked, "--model", "model")
        assert code == 1 and "has no tokenizer" in err

    def test_a_guardrail_that_cannot_be_exported_is_not_made(self, dsg, tmp_path):
        shutil.copytree(DATA / "schema-1", tmp_path / "w1")
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
from dsg_cli.models.language_model import model_folder
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
def test_lm_eval_without_this_package_agrees_question_for_question(succeed, workspace, tmp_path):
    """The README's way to check an exported model: stock lm-eval on the folder, with the lab's own tasks."""
    succeed("lab", "export", "lab")
    succeed("apply", "--export", "model", "-w", workspace)
    asked = [word for bench in BENCHES for word in ("--bench", bench)]
    report = json.loads(succeed("eval", "-w", workspace, *asked, "--json"))
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


EVAL, ATTACK = "eval", "attack"


def judge(judged, guardrail, kind=EVAL, body=None, **changed):
    """An evaluation or an attack made by hand, of a guardrail in a workspace."""
    header = judged_header(kind, inputs=[guardrail.as_input()], **changed)
    return judged.write(header, body or (report() if kind == EVAL else attack()))


@pytest.fixture
def judged(tmp_path):
    """A guardrail that can write, its threshold, an evaluation and an attack."""
    judged = Workspace(tmp_path / "w")
    shutil.copytree(SCHEMA_2, judged.folder, ignore=shutil.ignore_patterns("[!gt]*"))
    judge(judged, judged.read("guardrail-001"))
    judge(judged, judged.read("guardrail-001"), ATTACK)
    return judged


def facts_of(judged, **changed):
    composition = find_composition(judged, ["guardrail-001"])
    facts = {"name": "mine", "address": "mine", "is_on_hub": False, "is_whole_model": True, "instead": None}
    modules = guardrail_modules(judged, composition)
    return card_facts(judged, composition, modules, **facts | {"is_mismatched": False} | changed)


def code_of(text):
    [block] = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    return block


class TestWhatIsWritten:
    def test_a_model_folder(self, succeed, judged, capsys):
        succeed("export", "my guarded `model`", "-w", judged.folder)
        card = ModelCard.load("my guarded `model`/README.md")
        said = card.data
        assert (said.license, said.language, said.library_name) == ("apache-2.0", ["en"], "transformers")
        assert said.pipeline_tag == "text-generation" and {"unlearning", "guardrail"} <= set(said.tags)
        assert "base_model" not in yaml.safe_load(card.content.split("---")[1])  # The lab is no repository of the hub.
        found = {(one.dataset_name, one.metric_type): one for one in said.eval_results}
        assert found["lab-hexes", "accuracy"].metric_value == 0.7 and found["gsm", "exact_match"].metric_value == 0.5
        assert set(found) == {("lab-hexes", "accuracy"), ("a|b", "accuracy"), ("gsm", "exact_match")}
        assert "eval-001" in found["a|b", "accuracy"].metric_name and found["a|b", "accuracy"].dataset_split == "test"
        threshold = judged.read("threshold-001")
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
            assert judged.read(artifact_id).json["sha256"] in card.text
        exec(code_of(card.text), {})  # Where it was written, as it stands.
        assert "'n_sequences': 1" in capsys.readouterr().out

    @pytest.mark.parametrize("schema", ["schema-1", "schema-2"])
    def test_light_files(self, succeed, tmp_path, capsys, schema):
        """Of a gate that can write, and of one that needs whole sequences."""
        shutil.copytree(DATA / schema, tmp_path / "w", ignore=shutil.ignore_patterns("features-*", "eval-*"))
        succeed("export", "light", "--form", "light", "-w", tmp_path / "w")
        assert sorted(path.name for path in Path("light").iterdir()) == ["README.md", "guardrail.safetensors"]
        card = ModelCard.load("light/README.md")
        assert card.data.library_name == "dsg-cli" and card.data.eval_results is None
        assert ("a mean over the sequence" in card.text) == (schema == "schema-1")
        succeed("lab", "export", "lab")
        capsys.readouterr()
        exec(code_of(card.text), {})
        assert "'n_sequences': 1" in capsys.readouterr().out

    def test_without_evaluations_it_says_how_to_make_them(self, succeed, tmp_path):
        shutil.copytree(DATA / "schema-4", tmp_path / "w", ignore=shutil.ignore_patterns("eval-*"))
        succeed("export", "light", "--form", "light", "-w", tmp_path / "w")
        card = ModelCard.load("light/README.md")
        assert "model-index" not in card.content
        commands = re.findall(r"```bash\n(.*?)\n```", card.text)
        names = "--from guardrail-001"
        assert commands == [f"dsg eval {names} --bench BENCH", f"dsg attack {names} --kind all"]
        for command in commands:
            succeed(*command.split()[1:], "--help")
        assert "the threshold that it was made from was not at hand" in card.text

    def test_what_apply_exports_has_one(self, succeed, tmp_path):
        shutil.copytree(SCHEMA_2, tmp_path / "w", ignore=shutil.ignore_patterns("[!t]*"))
        name = succeed("apply", "--strength", "4r", "--export", "model", "-w", tmp_path / "w")
        card = ModelCard.load("model/README.md")
        assert f"`{name}`" in card.text and "No evaluation of it was at hand" in card.text


class TestWhatCounts:
    def test_the_newest_of_each_bench_and_split(self, judged):
        guardrail = judged.read("guardrail-001")
        results = {"lab-hexes": {"base": {"acc": 0.8, "n": 9}, "unlearned": {"acc": 0.2, "n": 9}}}
        judge(judged, guardrail, body=report().replace(results=results), settings={"benches": ["lab-hexes"]})
        judge(judged, guardrail, body=report().replace(results=results, split="dev"))
        text = model_card(facts_of(judged))
        rows = [line for line in text.splitlines() if line.startswith("| `lab-hexes` | `")]
        assert [row.split(" | ")[-1] for row in rows] == ["`eval-002` |", "`eval-003` |"]
        assert "dev questions, on which settings may have been chosen" in text
        index = yaml.safe_load(text.split("---\n")[1])["model-index"][0]["results"]
        assert sorted(one["dataset"]["split"] for one in index) == ["dev", "test", "test", "test"]

    def test_of_this_guardrail_on_its_own_weights_and_whole(self, judged):
        stored, tensors = guardrail_of("schema-2")
        judge(judged, judged.write(stored.header.replace(seed=9, inputs=[]), stored.body, tensors=tensors))
        judge(judged, stored, settings={"benches": [], "allow_mismatch": True})
        damaged = judge(judged, stored)
        damaged.path.write_text(damaged.path.read_text().replace("0.7", "0.1"))
        assert [stored.id for stored in facts_of(judged).evaluations] == ["eval-001"]

    def test_on_other_weights_nothing_was_measured(self, judged, tmp_path):
        text = model_card(facts_of(judged, instead="lab-retrain", is_mismatched=True))
        assert "Nothing was measured on these" in text and "model-index" not in text and "| base |" not in text
        assert "`lab-retrain`" in text

    def test_a_base_of_the_hub(self, judged, tmp_path):
        facts = replace(facts_of(judged), model="org/mo-del@abc", base="org/mo-del@abc", is_whole_model=False)
        facts = replace(facts, base_card=BaseCard(("gemma",), "", "https://example.org/terms", ("no", "en")))
        said = ModelCard(front_matter(facts)).data
        assert (said.base_model, said.base_model_relation) == ("org/mo-del", "adapter")
        assert said.license == "gemma" and said.license_link.endswith("/terms") and said.language == ["no", "en"]
        text = model_card(facts)
        assert 'from_pretrained("org/mo-del", revision="abc")' in text and "`https://example.org/terms`" in text

    def test_features_that_were_picked_by_description(self, judged):
        facts = facts_of(judged)
        features = Workspace(DATA / "schema-3").read("features-001")
        features = replace(features, body=features.body.replace(described={"query": "hex <b> | curse"}))
        stored = replace(facts.guards[0].stored, body=facts.guards[0].body.replace(forget=[]))
        facts = replace(facts, guards=[replace(facts.guards[0], stored=stored, features=features)])
        text = model_card(facts)
        assert "from answering about `hex <b> | curse`." in text and "To forget: no corpus." in text
        assert "picked by their descriptions, for the words `hex <b> | curse`" in text and features.id in text
        facts = replace(facts, guards=[replace(facts.guards[0], features=None)])
        assert "what its features stand for" in model_card(facts)

    @pytest.mark.parametrize(
        ("settings", "promise"),
        [
            ({"threshold": 0.3}, "The threshold was given, not calibrated: nothing promises how much is gated. What"),
            (
                {"quantile": "percentile"},
                "The threshold is the percentile of retain text that 0.05 exceeded; it promises",
            ),
            (
                {"lengths": None},
                "was set so that 0.05 of further texts like those of all retain corpora together are gated.",
            ),
        ],
    )
    def test_what_a_threshold_promises(self, judged, settings, promise):
        facts = facts_of(judged)
        threshold = facts.guards[0].threshold
        header = threshold.header.replace(settings=threshold.header.settings | settings)
        guard = replace(facts.guards[0], threshold=replace(threshold, header=header))
        assert promise in model_card(replace(facts, guards=[guard]))

    def test_a_licence_that_is_not_known_is_not_invented(self, judged, tmp_path):
        text = model_card(replace(facts_of(judged), base_card=BaseCard(), base="/home/someone/secret/base"))
        assert ModelCard(text).data.license is None and "which is not known here" in text
        assert "someone" not in text and "`base`" in text


HOSTILE = ["<script>alert(1)</script>", "a|b", "two\n---\nlines", "`tick` *b*", "[x](javascript:1)", "rtl\u202etxt"]
HOSTILE += ["a\\"]


class TestNamesStayNames:
    @pytest.fixture
    def hostile(self, tmp_path):
        stored, tensors = guardrail_of("schema-2")
        judged = Workspace(tmp_path / "w")
        note = "Read <b>/home/someone/secret/notes.txt</b> | and www.example.org, https://example.org"
        body = stored.body_as(Guardrail).replace(forget=[*HOSTILE, "/home/someone/secret/hazard.jsonl"])
        guardrail = judged.write(stored.header.replace(notes=[note], inputs=[]), body, tensors=tensors)
        sides = {"base": {"acc": 1.0, "n": 8}, "unlearned": {"acc": 0.25, "n": 8}}
        body = report().replace(results=dict.fromkeys(HOSTILE, sides), gate={})
        judge(judged, guardrail, body=body, settings={"benches": HOSTILE})
        for name in HOSTILE:
            judge(judged, guardrail, ATTACK, attack().replace(bench=name, threat_model=name))
        return judged

    def test_front_matter(self, hostile, tmp_path):
        facts = facts_of(hostile, name=HOSTILE[2] + HOSTILE[0])
        card = ModelCard(model_card(facts))
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
        ("---\nlicense: gemma\nlanguage: [en, no]\n---\n# x", BaseCard(("gemma",), languages=("en",))),  # `no`: False.
        ("---\nlicense: other\nlicense_name: a\nlicense_link: b\n---\n", BaseCard(("other",), "a", "b")),
        ("---\nlicense: [mit, apache-2.0]\n---", BaseCard(("mit", "apache-2.0"))),
        ("---\r\nlicense: mit\r\n---\r\n", BaseCard(("mit",))),
        ("---\nlicense: '<script>'\nlicense_name: [x]\nlanguage: {a: b}\n---\n", BaseCard()),
        ("---\nlicense: !!python/object:os.system x\n---\n", BaseCard()),
        ("---\nlicense: [[[\n---\n", BaseCard()),
        ("---\nlicense: 2020-99-99\n---\n", BaseCard()),
        ("---\n- license\n---\n", BaseCard()),
        ("---\n" + "[" * 5000 + "\n---\n", BaseCard()),
        ("# license: mit", BaseCard()),
        ("---\nlicense: \udcff\n---\n", BaseCard()),  # A byte that is no text.
        ("", BaseCard()),
        (None, BaseCard()),
    ],
)
def test_what_the_base_s_card_says(tmp_path, text, known):
    if text is not None:
        (tmp_path / "README.md").write_bytes(text.encode(errors="surrogateescape"))
    assert read_base_card(str(tmp_path)) == known


def test_a_folder_of_the_users_own(tmp_path, monkeypatch):
    """Its own card says the licence; its path is told to nobody."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "secret" / "base"
    shutil.copytree(lab.MODEL_DIR, folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    stored, tensors = guardrail_of("schema-2")
    other = Workspace(tmp_path / "other")
    model = stored.header.model.replace(source=str(folder))
    other.write(stored.header.replace(model=model, inputs=[]), stored.body, tensors=tensors)
    export.run(load_recipe(None, sets=[], flags={}), other, "out")
    card = ModelCard.load("out/README.md")
    assert card.data.license == "mit" and "secret" not in card.content and "`base`" in card.text
    assert json.loads(Path("out/config.json").read_text())["model_type"].startswith("dsg_")
