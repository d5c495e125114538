"""Never a silent no-op, no secret in what is printed, no code that was not asked for, no corpus too large."""

import json
import os
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dsg_cli.artifacts import Guardrail, Threshold
from dsg_cli.corpora import load_corpus
from dsg_cli.effect import Effect, measure_effect
from dsg_cli.model import devices_of, load_model, read_config
from dsg_cli.secrets import redacted
from loopback import LoopbackHub
from test_hub import SELECT, files_of, run

from dsg_cli.errors import DsgError
from dsg_cli.guardrail import module_from_artifact
from dsg_cli.lab import data as lab
from dsg_cli.recipe import load_recipe
from dsg_cli.stages import apply, calibrate, select, trial
from dsg_cli.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["calibrate.max_pieces=512", "corpora.limit=80"]
TOKEN = "hf_" + "Aa1" * 11


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    workspace = Workspace(tmp_path_factory.mktemp("chain") / "ws")
    recipe = load_recipe("lab", sets=SMALL)
    for stage in (select, calibrate, apply):
        stage.run(recipe, workspace)
    return workspace


def test_a_gate_that_never_fires_is_refused_unless_allowed(chain, dsg, tmp_path):
    threshold = chain.read("threshold-001")
    workspace = Workspace(tmp_path / "ws")
    never = replace(threshold.body_as(Threshold), threshold=99.0)
    workspace.write(threshold.header, never, rows=[])
    code, out, err = dsg("apply", "-w", "ws")
    assert (code, out) == (1, "") and "its gate never fires" in err and "--allow-ineffective" in err
    assert workspace.ids("guardrail") == []
    assert dsg("apply", "-w", "ws", "--allow-ineffective")[:2] == (0, "guardrail-001\n")
    effect = workspace.read("guardrail-001").body_as(Guardrail).effect
    assert effect["n_rows"] == 64 and effect["gate_rate"] == effect["edit"] == effect["changed_rate"] == 0
    ask = ("eval", "-w", "ws", "--bench", "lab-hexes", "--limit", 8)
    code, out, err = dsg(*ask)
    assert (code, out) == (1, "") and "did nothing on lab-hexes" in err and "eval-001" in err
    assert workspace.read("eval-001").body.gate["lab-hexes"] == {"rate": 0.0, "n": 8, "edit": 0.0}  # Nothing is lost.
    assert dsg(*ask, "--allow-ineffective")[:2] == (0, "eval-002\n")
    assert dsg("eval", "-w", "ws", "--bench", "lab-far", "--limit", 8)[0] == 0  # Nothing to be gated there.


def test_an_edit_that_changes_nothing_is_seen(chain):
    stored = chain.read("guardrail-001")
    body, tensors = stored.body_as(Guardrail), chain.tensors(stored)
    loaded = load_model("lab", last_layer=stored.header.model.last_layer)
    rows = [loaded.tokenizer(text)["input_ids"][:40] for text in load_corpus("lab-hexes").texts[:20]]
    effects = []
    for name in (None, "W_dec"):
        changed = tensors | ({name: torch.zeros_like(tensors[name])} if name else {})
        module = module_from_artifact(body, stored.header.model, changed, where="test")
        effects.append(measure_effect(loaded, module, rows))
    real, empty = effects
    assert real.gate_rate == empty.gate_rate > 0.5 and real.n_clamped == empty.n_clamped
    assert real.changed_rate == real.gate_rate and real.edit > 1
    assert empty.changed_rate == empty.edit == 0
    trial.check_effect(real)
    with pytest.raises(DsgError, match="its edit changes nothing"):
        trial.check_effect(empty)
    with pytest.raises(DsgError, match="its gate never fires"):
        trial.check_effect(Effect(64, 0.0, 0.0, 0, 0.0))


def test_the_effect_is_that_of_the_whole_model(chain):
    """Rows gated, and tokens clamped, are those that the guarded whole model counts."""
    from dsg_cli import guarded, load_guardrail

    stored = chain.read("guardrail-001")
    whole, cut = load_model("lab"), load_model("lab", last_layer=stored.header.model.last_layer)
    guards = [load_guardrail(stored.path) for _ in range(2)]
    rows = [cut.tokenizer(text)["input_ids"][:40] for text in load_corpus("lab-hexes").texts[:12]]
    effect = measure_effect(cut, guards[0], rows)
    with guarded(whole.model, guards[1]):
        for row in rows:
            whole.model(torch.tensor([row]), use_cache=False)
    counters = guards[1].counters()
    assert effect.n_clamped == counters["n_clamped"] and effect.gate_rate == counters["n_gated"] / len(rows)
    assert effect.edit == pytest.approx(counters["largest_edit"], rel=1e-5)


def test_results_do_not_depend_on_the_size_of_batches(chain, tmp_path, monkeypatch):
    """Same features, threshold to 1e-6, same answers, as of the chain in batches of the usual size."""
    from dsg_cli.stages import evaluate

    ask = [*SMALL, "eval.benches=[lab-hexes]", "eval.limit=24"]
    report = evaluate.run(load_recipe("lab", sets=[*ask, "eval.batch_size=32"]), chain)
    features, threshold = chain.read("features-001"), chain.read("threshold-001")
    assert threshold.body.gate == "probe"
    found = [([f.index for f in features.body.features], threshold.body, report.body)]
    monkeypatch.setattr("dsg_cli.tokens.batches.__kwdefaults__", {"batch_tokens": 700, "device": "cpu"})
    recipe, workspace = load_recipe("lab", sets=[*ask, "eval.batch_size=5"]), Workspace(tmp_path)
    features, threshold, _, report = (s.run(recipe, workspace) for s in (select, calibrate, apply, evaluate))
    found.append(([f.index for f in features.body.features], threshold.body, report.body))
    (one, two) = found
    assert one[0] == two[0] and one[1].threshold == pytest.approx(two[1].threshold, abs=1e-6)
    assert one[1].detectors == two[1].detectors and one[2].results == two[2].results


def test_the_same_seed_gives_the_same_files_apart_from_times(tmp_path, chain):
    recipe = load_recipe("lab", sets=SMALL)
    workspace = Workspace(tmp_path / "ws")
    for stage in (select, calibrate, apply):
        stage.run(recipe, workspace)
    times = ("created", "seconds", "peak_memory_mb", "sha256", "inputs")
    for artifact_id in workspace.ids():
        one, two = (where.read(artifact_id) for where in (chain, workspace))
        assert one.header.files == two.header.files  # Digests of tensors and rows.
        assert {k: v for k, v in one.json.items() if k not in times} == {
            k: v for k, v in two.json.items() if k not in times
        }


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"401 for {TOKEN}: no", "401 for ***: no"),
        ("Authorization: Bearer abc.def", "Authorization: ***"),
        ("at https://me:secret@mirror.example/x", "at https://***@mirror.example/x"),
        ("the value s3cr3t-value here", "the value *** here"),
        ("org/name@main and hf_hub", "org/name@main and hf_hub"),
    ],
)
def test_tokens_are_taken_out_of_what_is_said(monkeypatch, text, shown):
    monkeypatch.setenv("HF_TOKEN", "s3cr3t-value")
    assert redacted(text) == shown


def test_a_token_is_taken_out_of_messages_and_tracebacks(dsg, monkeypatch, tmp_path):
    (tmp_path / "token").write_text("from-a-file-123\n")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))

    def refuse(*_arguments, **_options):
        raise DsgError("The hub refused from-a-file-123.")

    monkeypatch.setattr("dsg_cli.stages.verify.run", refuse)
    code, _, err = dsg("verify")
    assert code == 1 and err == "error: The hub refused ***.\n"


def test_no_token_reaches_output_or_artifacts(tmp_path):
    with LoopbackHub(tmp_path / "hub") as hub:
        hub.add("models", "acme/lab-model", files_of(lab.MODEL_DIR))
        environment = hub.environment(tmp_path / "cache") | {"HF_TOKEN": TOKEN, "DSG_DEBUG": ""}
        names = ("acme/lab-model", "acme/nothing")
        found = run(environment, tmp_path, *((*SELECT, "--model", name) for name in names))
    assert [code for code, _, _ in found] == [0, 1]
    assert TOKEN not in json.dumps(found)
    written = [path for path in (tmp_path / "dsg-workspace").rglob("*") if path.is_file()]
    assert len(written) >= 2 and not any(TOKEN.encode() in path.read_bytes() for path in written)


CODE = """
from transformers import Gemma2Config
class OwnConfig(Gemma2Config):
    model_type = "own"
"""


def test_code_that_comes_with_a_model_runs_only_when_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((lab.MODEL_DIR / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    (folder / "configuration_own.py").write_text(CODE)
    with pytest.raises(DsgError, match="--trust-remote-code runs them"):
        read_config(str(folder))
    assert type(read_config(str(folder), trust_remote_code=True)).__name__ == "OwnConfig"


def test_trusted_code_is_recorded_and_never_taken_over(chain, dsg):
    code, out, _ = dsg("select", "--recipe", "lab", "--trust-remote-code", "--json", "--limit", 64)
    made = json.loads(out)
    assert code == 0 and made["trust_remote_code"] is True and any("Python files" in note for note in made["notes"])
    code, out, _ = dsg("calibrate", "--recipe", "lab", "--json", "--set", "corpora.limit=64", "--alpha", 0.2)
    assert code == 0 and json.loads(out)["trust_remote_code"] is False


def test_a_device_map_on_one_device_changes_nothing(chain):
    plain, mapped = load_model("lab"), load_model("lab", device_map="auto")
    assert devices_of(plain.model) == devices_of(mapped.model) == ["cpu"]
    ids_BL = torch.tensor([[2, 5, 9, 11]])
    with torch.inference_mode():
        assert torch.equal(plain.model(ids_BL).logits, mapped.model(ids_BL).logits)


def test_a_corpus_larger_than_what_is_drawn_is_not_held_in_memory(tmp_path):
    path = tmp_path / "large.jsonl"
    text = "a word " * 1500
    with path.open("w") as file:
        for number in range(20_000):
            file.write(json.dumps({"text": f"{number} {text}"}) + "\n")
    assert path.stat().st_size > 200e6
    pid = os.fork()
    if not pid:
        limit = 160 * 2**20 + _virtual_bytes()
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            from dsg_cli.corpora import load_corpora

            os._exit(0 if len(load_corpora([str(path)], role="forget", limit=64)[0].texts) == 64 else 3)
        except BaseException:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
