"""Light files, and model folders that stock transformers loads without this package."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_guardrail, make_sae, python
from dsg_cli.artifacts import Guardrail
from dsg_cli.export.light import light_file, read_light
from dsg_cli.integrity import digest_of
from dsg_cli.model import load_model
from dsg_cli.runtime.spec import NEVER, tensors_digest
from dsg_cli.sae import read_sae
from loopback import LoopbackHub
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_serving import FAMILIES, PROMPTS, SITE, build
from transformers import AutoModelForCausalLM

from dsg_cli import guarded, load_guardrail
from dsg_cli.errors import DsgError
from dsg_cli.export.folder import GUARD_SHARD, export_folder
from dsg_cli.lab import data as lab
from dsg_cli.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")
DATA = Path(__file__).parent / "data" / "schema-2"
REMOTE = {"trust_remote_code": True, "dtype": torch.float32}
QUESTION = "Question: What is the counter of the grim hex"


@pytest.fixture
def light(tmp_path):
    workspace = Workspace(DATA)
    stored = workspace.read("guardrail-001")
    model = replace(stored.header.model, source="/home/someone/secret/model")
    body = replace(stored.body_as(Guardrail), forget=["/home/someone/secret/hazard.jsonl", "lab-hexes"])
    path = tmp_path / "guardrail.safetensors"
    path.write_bytes(light_file(replace(stored.header, model=model), body, workspace.tensors(stored)))
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
            data["sha256"] = digest_of(data)

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
from dsg_cli.export.base_card import BaseCard, read_base_card
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
