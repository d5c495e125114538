"""Gate and clamp against decode(clamped) + error with the whole SAE, and the properties that users rely on."""

from __future__ import annotations

import copy
import json
import os
import resource
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import LAYER, WIDTH, make_guardrail, make_sae, python, refuses
from loopback import LoopbackHub
from test_hub import SELECT, files_of, run
from test_serving import PROMPTS, SITE, alone, build
from transformers import AutoModelForCausalLM

import dsg_cli
from dsg_cli.data.batches import pad_rows
from dsg_cli.data.corpora import load_corpus
from dsg_cli.errors import DsgError, redacted
from dsg_cli.export.folder import export_folder
from dsg_cli.guardrail.guarded import Effect, guarded, measure_effect, module_from_artifact, protected_parameters
from dsg_cli.guardrail.loading import load_guardrail
from dsg_cli.guardrail.runtime.gates import Gate
from dsg_cli.guardrail.runtime.sites import HookSite
from dsg_cli.inference.generation import answer, prompt_ids
from dsg_cli.inference.scoring import GuardedModel
from dsg_cli.lab import data as lab
from dsg_cli.models.language_model import devices_of, load_model, read_config
from dsg_cli.models.residuals import read_residual, replace_residual
from dsg_cli.models.sae import read_sae
from dsg_cli.recipe import load_recipe
from dsg_cli.settings import GenerateSection, ModelSection
from dsg_cli.stages import apply, calibrate, evaluate, select
from dsg_cli.workspace.artifacts import Guardrail, Threshold
from dsg_cli.workspace.store import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")
AT_LAYER = HookSite(LAYER, "resid_post")
SPECIAL = (0, 1, 2)
INDICES = [3, 11, 30]
ROWS = [[2, 5, 6, 7, 8, 9], [2, 30, 31], [2, 12, 1, 40, 41, 42, 43, 44, 45], [2, 50]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sae")
    return make_sae(folder, bias=1.0), read_sae(str(folder))


def read(model, ids):
    batch = pad_rows([ids], 0, SPECIAL)
    return batch, read_residual(model, AT_LAYER, batch.ids_BL, batch.mask_BL)


def put_on(*arguments, **options):
    with guarded(*arguments, **options):
        pass


@torch.no_grad()
def logits(model, ids, **options):
    return model(ids, use_cache=False, **options).logits


def guard(whole, *, threshold=0.3, strength=7.0, indices=INDICES, site=AT_LAYER):
    source = replace(whole[1], site=site, write=site)
    return make_guardrail(source, indices, threshold=threshold, strength=strength, special=SPECIAL)


def reference(sae, resid_LD, ids, *, threshold, strength, indices=INDICES):
    """The paper's form, token by token: decode(acts with selected set to -c) + (h - decode(acts))."""
    acts = sae.encode(resid_LD).detach()
    counted = [i for i, token in enumerate(ids) if token not in SPECIAL]
    active = [i for i in counted if (acts[i, indices] > 0).any()]
    rho = len(active) / len(counted) if counted else 0.0
    out = resid_LD.clone()
    if rho > threshold:
        for i in active:
            clamped = acts[i].clone()
            clamped[indices] = -strength
            error = resid_LD[i] - sae.decode(acts[i][None])[0].detach()
            out[i] = sae.decode(clamped[None])[0].detach() + error
    return out, rho


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6])
def test_equals_decode_of_the_clamped_plus_error(model, whole, threshold):
    module = guard(whole, threshold=threshold)
    n_gated = 0
    for ids in ROWS:
        batch, resid = read(model, ids)
        expected, rho = reference(whole[0], resid[0], ids, threshold=threshold, strength=7.0)
        found = module(resid, batch.counted_BL)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
        assert module.last_statistic_B.item() == pytest.approx(rho)
        assert bool(module.last_gated_B) == (rho > threshold)
        untouched = (expected == resid[0]).all(-1)
        assert torch.equal(found[untouched], resid[0][untouched])
        n_gated += rho > threshold
    assert n_gated or threshold == 0.6


def test_a_statistic_that_is_no_number_opens_the_gate(model, whole, monkeypatch):
    module, batch = guard(whole, threshold=1e9), pad_rows([ROWS[0]], 0, SPECIAL)
    monkeypatch.setattr(Gate, "scan", lambda _, signal, *__: (signal * torch.nan, signal[..., None]))
    module(read_residual(model, AT_LAYER, batch.ids_BL, batch.mask_BL), batch.counted_BL)
    assert module.last_gated_B.all()


def test_batch_of_one_equals_a_padded_batch_of_eight(model, whole):
    """Neither padding nor its side moves a decision or a logit."""
    module = guard(whole)
    rows = [*ROWS, *ROWS]
    with guarded(model, module, allow_mismatch=True):
        alone, decided = [], []
        for ids in rows:
            alone.append(logits(model, torch.tensor([ids]))[0])
            decided.append((module.last_statistic_B.item(), module.last_gated_B.item()))
        right = pad_rows(rows, 0, SPECIAL)
        together = logits(model, right.ids_BL, attention_mask=right.mask_BL.long())
        assert module.last_statistic_B.tolist() == [rho for rho, _ in decided]
        assert module.last_gated_B.tolist() == [is_gated for _, is_gated in decided]
        left_ids, left_mask = right.ids_BL.flip(1), right.mask_BL.flip(1)
        for i, ids in enumerate(rows):
            left_ids[i, -len(ids) :] = torch.tensor(ids)
        positions = (left_mask.long().cumsum(-1) - 1).clamp(min=0)
        left = logits(model, left_ids, attention_mask=left_mask.long(), position_ids=positions)
        assert module.last_statistic_B.tolist() == [rho for rho, _ in decided]
        # lm-eval pads with id 0 and sends no mask: the id is special, so it is not counted either.
        logits(model, right.ids_BL)
        assert module.last_statistic_B.tolist() == [rho for rho, _ in decided]
    assert any(is_gated for _, is_gated in decided) and not all(is_gated for _, is_gated in decided)
    for i, ids in enumerate(rows):
        torch.testing.assert_close(together[i, : len(ids)], alone[i], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(left[i, -len(ids) :], alone[i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unreachable_threshold_and_no_features_are_exact_identities(model, whole, dtype):
    resid = torch.randn(3, 5, WIDTH).to(dtype)
    counted = torch.ones(3, 5, dtype=torch.bool)
    assert torch.equal(guard(whole, threshold=1.0)(resid, counted), resid)
    empty = guard(whole, threshold=0.0, strength=9.0, indices=[])
    assert torch.equal(empty(resid, counted), resid)
    fires = guard(whole, threshold=0.0)(resid, counted)
    assert fires.dtype == dtype and not torch.equal(fires, resid)


def test_special_tokens_are_never_counted_nor_edited(model, whole):
    module = guard(whole, threshold=0.0, indices=list(range(48)))
    batch, resid = read(model, [2, 5, 1, 6])
    found = module(resid, batch.counted_BL)
    assert module.last_statistic_B.item() == 1.0
    assert torch.equal(found[0, [0, 2]], resid[0, [0, 2]]) and not torch.equal(found[0, 1], resid[0, 1])


def test_a_sequence_without_counted_tokens_is_not_gated():
    counted = torch.zeros(1, 3, dtype=torch.bool)
    for form in ("mean", "causal-mean", "window", "token"):
        gate = Gate(form, 0.0)
        statistic, _ = gate.scan(torch.ones(1, 3), counted, gate.initial_state(1, counted.device))
        assert statistic.tolist() == [[0.0] * 3]


def test_hooks_are_gone_after_the_block_and_after_an_exception(model, whole):
    ids = torch.tensor([ROWS[0]])
    hooked = (model, model.model, model.model.layers[LAYER])

    def hooks():
        return [(dict(module._forward_pre_hooks), dict(module._forward_hooks)) for module in hooked]

    hooks_before = hooks()
    before, module = logits(model, ids), guard(whole, threshold=0.0)
    with guarded(model, module, allow_mismatch=True):
        assert hooks() != hooks_before
        assert not torch.equal(logits(model, ids), before)
    assert torch.equal(logits(model, ids), before)
    with pytest.raises(RuntimeError, match="stop"), guarded(model, module, allow_mismatch=True):
        raise RuntimeError("stop")
    assert torch.equal(logits(model, ids), before)
    assert hooks() == hooks_before


def test_the_input_of_a_layer_is_the_output_of_the_one_before(model, whole):
    ids = torch.tensor([ROWS[0]])
    before = HookSite(LAYER + 1, "resid_pre")
    mask = torch.ones_like(ids)
    assert torch.equal(read_residual(model, before, ids, mask), read_residual(model, AT_LAYER, ids, mask))
    answers = []
    for site in (AT_LAYER, before):
        with guarded(model, guard(whole, threshold=0.0, site=site), allow_mismatch=True):
            answers.append(logits(model, ids))
    assert torch.equal(*answers)


def test_layers_that_return_tuples_are_handled():
    torch.manual_seed(0)
    config = transformers.GPTJConfig(vocab_size=20, n_positions=32, n_embd=16, n_layer=2, n_head=2, rotary_dim=4)
    gptj = transformers.GPTJForCausalLM(config).eval()
    ids = torch.tensor([[1, 2, 3]])
    seen = read_residual(gptj, HookSite(0, "resid_post"), ids, torch.ones_like(ids))
    plain = logits(gptj, ids)
    for added in (0, 1):
        with replace_residual(gptj, HookSite(0, "resid_post"), lambda h, added=added: h + added):
            assert torch.equal(logits(gptj, ids), plain) == (added == 0)
    assert seen.shape == (1, 3, 16)


def test_a_call_that_holds_no_whole_sequence_is_refused(model, whole):
    ids = torch.tensor([ROWS[0]])
    cache = model(ids, use_cache=True).past_key_values
    with guarded(model, guard(whole), allow_mismatch=True):
        refuses("whole sequences", model, ids[:, -1:], past_key_values=cache)
        refuses("needs token ids", model, inputs_embeds=torch.zeros(1, 2, WIDTH))
        refuses("whole sequences", model.generate, ids, max_new_tokens=3)


def test_counters_say_what_was_seen_and_done(model, whole):
    module = guard(whole, threshold=0.3)
    largest, n_clamped, n_gated = 0.0, 0, 0
    for ids in ROWS:
        batch, resid = read(model, ids)
        edit = (module(resid, batch.counted_BL) - resid).norm(dim=-1)
        largest = max(largest, float((edit / resid.norm(dim=-1)).max()))
        n_clamped += int((edit > 0).sum())
        n_gated += int((edit > 0).any())
    found = module.counters()
    assert (found["n_sequences"], found["n_gated"], found["n_clamped"]) == (len(ROWS), n_gated, n_clamped)
    assert found["largest_edit"] == pytest.approx(largest, rel=1e-3) and found["n_broken"] == 0


DATA = Path(__file__).parent / "data"
KEPT = DATA / "schema-2/guardrail-001.json"
QUESTION = "Question: What is the counter of the grim hex"
REMOTE = {"trust_remote_code": True, "dtype": torch.float32}


@pytest.fixture
def llama(tmp_path):
    make_sae(tmp_path, bias=6.0)
    source = replace(read_sae(str(tmp_path)), site=SITE, write=SITE)
    return build("Llama"), make_guardrail(source, [3, 11, 30], threshold=0.5, strength=20.0, gate="window", window=3)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_layer_that_does_not_run(llama, use_cache):
    model, guard = llama
    with guarded(model, guard, allow_mismatch=True), pytest.raises(DsgError, match="did not run"):
        model.model.layers[1] = copy.deepcopy(build("Llama").model.layers[1])
        model(torch.tensor([PROMPTS[0]]), use_cache=use_cache)


def test_a_cache_that_is_not_where_others_have_it(llama):
    _, guard = llama
    config = transformers.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=3, state_size=4)
    model = transformers.MambaForCausalLM(config)
    refuses("keeps its cache elsewhere", put_on, model, guard, allow_mismatch=True)


def test_threads_do_not_share_a_call(llama):
    """Decoding steps of several prompts, interleaved one by one."""
    model, guard = llama
    with guarded(model, guard, allow_mismatch=True):
        expected = [alone(model, ids, 6) for ids in PROMPTS]
    turn, found, problems = threading.Barrier(len(PROMPTS)), {}, []

    def decode(number):
        ids, cache = list(PROMPTS[number]), None
        try:
            for _ in range(6):
                new = ids if cache is None else ids[-1:]
                turn.wait(timeout=60)
                with torch.no_grad():
                    out = model(torch.tensor([new]), past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                ids.append(int(out.logits[0, -1].argmax()))
            found[number] = ids
        except BaseException as error:
            problems.append(error)
            turn.abort()

    with guarded(model, guard, allow_mismatch=True):
        threads = [threading.Thread(target=decode, args=(number,)) for number in range(len(PROMPTS))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not problems and [found[number] for number in range(len(PROMPTS))] == expected


def test_a_mask_with_a_bias_is_no_padding(llama):
    model, guard = llama
    ids = torch.tensor([PROMPTS[0]])
    causal = torch.full((6, 6), torch.finfo(torch.float32).min).triu(1)[None, None]
    with guarded(model, guard, allow_mismatch=True):
        logits(model, ids, attention_mask=causal)
        expected = guard.last_statistic_B
        logits(model, ids, attention_mask=causal - 1e-6)
        torch.testing.assert_close(guard.last_statistic_B, expected, rtol=1e-3, atol=1e-3)
        assert expected > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_guard_computes_in_float32(llama, dtype):
    model, guard = llama
    ids = torch.tensor([PROMPTS[0]])
    with guarded(model, guard, allow_mismatch=True), torch.no_grad():
        model(ids, use_cache=False)
        expected = guard.last_statistic_B
        with torch.autocast("cpu", dtype):
            model(ids, use_cache=False)
        assert guard.last.statistic_BL.dtype == torch.float32
        torch.testing.assert_close(guard.last_statistic_B, expected, rtol=0.1, atol=0.1)


def test_packed_rows_of_a_family_that_does_not_keep_them_apart_count_as_one(llama):
    model, guard = llama
    ids = torch.tensor([[*PROMPTS[0], *PROMPTS[1]]])
    positions = torch.tensor([[*range(6), *range(3)]])
    with guarded(model, guard, allow_mismatch=True), torch.no_grad():
        model(ids, position_ids=positions, use_cache=False)
        apart = guard.last.statistic_BL[0, -3:].clone()
        model.config.model_type = "strange"
        model(ids, position_ids=positions, use_cache=False)
        assert (guard.last.statistic_BL[0, -3:] >= apart).all() and guard.last.statistic_BL[0, -3] > apart[0]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab") / "exported"
    options = {"architecture": "Gemma2ForCausalLM", "tokenizer_class": "PreTrainedTokenizerFast"}
    export_folder(folder, base=lab.MODEL_DIR, guardrails=[load_guardrail(KEPT)], light_files=[], card="", **options)
    return folder


def test_an_export_whose_configuration_forgets_its_guardrail(exported, tmp_path):
    folder = tmp_path / "forgetful"
    shutil.copytree(exported, folder)
    config = json.loads((folder / "config.json").read_text()) | {"dsg_guardrails": []}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match="names other guardrails"):
        AutoModelForCausalLM.from_pretrained(folder, **REMOTE)
    with pytest.raises(Exception, match="names other guardrails"):
        AutoModelForCausalLM.from_pretrained(exported, dsg_guardrails=[], **REMOTE)


def test_an_export_is_of_no_use_to_the_bases_own_classes(exported, tmp_path):
    AutoModelForCausalLM.from_pretrained(exported, **REMOTE).save_pretrained(tmp_path / "again")
    for folder in (exported, tmp_path / "again"):
        with pytest.raises(Exception, match="vocab_size"):
            transformers.Gemma2ForCausalLM.from_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", **REMOTE)
    assert again.config.vocab_size == again.get_input_embeddings().num_embeddings == 670


def test_an_export_on_other_weights(exported, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(exported, **REMOTE)
    model.model.layers[0].mlp.up_proj.weight.data *= 2
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(Exception, match="weights of the base model are others"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", **REMOTE)
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dsg_allow_mismatch=True, **REMOTE)
    assert tuned.dsg_attached is not None


def test_an_export_holds_no_file_of_the_users_own(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(lab.MODEL_DIR, base)
    for name in ("api_key.txt", "credentials.json", "trainer_state.json"):
        (base / name).write_text("{}")
    config = json.loads((base / "config.json").read_text()) | {"_name_or_path": "/home/someone/model"}
    (base / "config.json").write_text(json.dumps(config))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    del settings["tokenizer_class"]
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"name_or_path": "/home/someone/model"}))
    options = {"architecture": "Gemma2ForCausalLM", "tokenizer_class": "GemmaTokenizer"}
    export_folder(tmp_path / "to", base=base, guardrails=[load_guardrail(KEPT)], light_files=[], card="", **options)
    names = {path.name for path in (tmp_path / "to").iterdir()}
    assert not names & {"api_key.txt", "credentials.json", "trainer_state.json"} and "tokenizer.json" in names
    for name in ("config.json", "tokenizer_config.json"):
        assert "someone" not in (tmp_path / "to" / name).read_text()
    assert json.loads((tmp_path / "to" / "tokenizer_config.json").read_text())["tokenizer_class"] == "GemmaTokenizer"


def test_generation_settings_of_the_model_do_not_change_how_it_is_asked():
    loaded, guardrail = load_model("lab"), load_guardrail(KEPT)
    model, settings = GuardedModel(loaded.model, loaded.tokenizer, 2, [guardrail]), GenerateSection(max_new_tokens=4)
    ids = prompt_ids(model, QUESTION, chat=False, n_new=4)
    expected = answer(model, ids, settings)
    changed = {"num_beams": 3, "num_return_sequences": 2, "use_cache": False, "prompt_lookup_num_tokens": 2}
    for name, value in (changed | {"return_dict_in_generate": True, "stop_strings": ["x"]}).items():
        setattr(loaded.model.generation_config, name, value)
    assert answer(model, ids, settings) == expected


SMALL = ["corpora.limit=80"]
TOKEN = "hf_" + "Aa1" * 11


@pytest.fixture(scope="module")
def chain(lab_chain, tmp_path_factory):
    return Workspace(shutil.copytree(lab_chain, tmp_path_factory.mktemp("chain") / "ws"))


def test_a_gate_that_never_fires_is_refused_unless_allowed(chain, dsg, tmp_path):
    threshold = chain.read("threshold-001")
    workspace = Workspace(tmp_path / "ws")
    never = threshold.body_as(Threshold).replace(threshold=99.0)
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
    apply.check_effect(real)
    refuses("its edit changes nothing", apply.check_effect, empty)
    refuses("its gate never fires", apply.check_effect, Effect(64, 0.0, 0.0, 0, 0.0))


def test_the_effect_is_that_of_the_whole_model(chain):
    """Rows gated, and tokens clamped, are those that the guarded whole model counts."""
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
    ask = [*SMALL, "eval.benches=[lab-hexes]", "eval.limit=24"]
    report = evaluate.run(load_recipe("lab", sets=[*ask, "eval.batch_size=32"]), chain)
    usual = (chain.read("features-001"), chain.read("threshold-001"), report)
    assert usual[1].body.gate == "probe"
    monkeypatch.setattr("dsg_cli.data.batches.batches.__kwdefaults__", {"batch_tokens": 700, "device": "cpu"})
    recipe, workspace = load_recipe("lab", sets=[*ask, "eval.batch_size=5"]), Workspace(tmp_path)
    features, threshold, _, report = (s.run(recipe, workspace) for s in (select, calibrate, apply, evaluate))
    small = (features, threshold, report)
    one, two = ([artifact.body for artifact in artifacts] for artifacts in (usual, small))
    assert [f.index for f in one[0].features] == [f.index for f in two[0].features]
    assert one[1].threshold == pytest.approx(two[1].threshold, abs=1e-6) and one[1].detectors == two[1].detectors
    assert one[2].results == two[2].results


def test_the_same_seed_gives_the_same_files_apart_from_times(tmp_path, chain):
    recipe = load_recipe("lab", sets=SMALL)
    workspace = Workspace(tmp_path / "ws")
    for stage in (select, calibrate, apply):
        stage.run(recipe, workspace)
    times = ("created", "seconds", "peak_memory_mb", "sha256", "inputs")
    for artifact_id in workspace.ids():
        one, two = (where.read(artifact_id) for where in (chain, workspace))
        assert one.header.files == two.header.files  # Digests of tensors and rows.
        for key in (one.json.keys() | two.json.keys()) - set(times):
            assert one.json.get(key, "absent") == two.json.get(key, "absent"), key


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

    monkeypatch.setattr("dsg_cli.workspace.store.verify_all", refuse)
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
    refuses("--trust-remote-code runs them", read_config, str(folder))
    assert type(read_config(str(folder), ModelSection(trust_remote_code=True))).__name__ == "OwnConfig"


def test_trusted_code_is_recorded_and_never_taken_over(chain, dsg):
    code, out, _ = dsg("select", "--recipe", "lab", "--trust-remote-code", "--json", "--limit", 64)
    made = json.loads(out)
    assert code == 0 and made["trust_remote_code"] is True and any("Python files" in note for note in made["notes"])
    code, out, _ = dsg("calibrate", "--recipe", "lab", "--json", "--set", "corpora.limit=64", "--alpha", 0.2)
    assert code == 0 and json.loads(out)["trust_remote_code"] is False


def test_a_device_map_on_one_device_changes_nothing(chain):
    plain, mapped = load_model("lab"), load_model("lab", ModelSection(device="cpu", dtype="float32", device_map="auto"))
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
            from dsg_cli.data.corpora import load_corpora

            os._exit(0 if len(load_corpora([str(path)], role="forget", limit=64)[0].texts) == 64 else 3)
        except BaseException:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


HOOKS = {
    "blocks.1.hook_resid_pre": 0,
    "blocks.1.hook_resid_post": 1,
    "blocks.1.hook_mlp_out": 1,
    "blocks.1.hook_attn_out": 1,
    "blocks.1.attn.hook_z": 1,
    "blocks.1.hook_mlp_in": 1,
}


def guard_at(folder, hook, **changes):
    make_sae(folder, hook=hook, bias=0.0)
    options = {"threshold": 0.3, "strength": 5.0, "gate": "window", "detectors": [3, 4, 5]}
    return make_guardrail(read_sae(str(folder)), list(range(12)), **(options | changes))


def small_gpt2():
    torch.manual_seed(1)
    sizes = {"vocab_size": 64, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, initializer_range=0.3)).eval()


def random_ids():
    return torch.randint(4, 60, (4, 12), generator=torch.Generator().manual_seed(0))


def statistics(model, guards, ids):
    with torch.inference_mode(), guarded(model, guards, allow_mismatch=True):
        model(input_ids=ids)
    return [guard.last.statistic_BL.clone() for guard in guards]


def fine_tuned(model, frozen, ids, *, steps=3):
    """Every other parameter is trained, with decay."""
    model.requires_grad_(True)
    for _, parameter in frozen:
        parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_frozen_parameters_keep_the_statistic(model, tmp_path, hook, family):
    tuned = copy.deepcopy(model) if family == "llama" else small_gpt2()
    guard = guard_at(tmp_path, hook)
    ids = random_ids()
    before = statistics(tuned, [guard], ids)[0]
    assert before.max() > 0
    frozen = protected_parameters(tuned, guard)
    with torch.inference_mode():
        logits = tuned(input_ids=ids).logits
    fine_tuned(tuned, frozen, ids)
    assert torch.equal(statistics(tuned, [guard], ids)[0], before)
    with torch.inference_mode():
        assert (tuned(input_ids=ids).logits - logits).abs().max() > 0.1  # It was trained.


def test_training_everything_moves_the_statistic(model, tmp_path):
    guard = guard_at(tmp_path, "blocks.1.hook_resid_post")
    ids = random_ids()
    before = statistics(model, [guard], ids)[0]
    assert not torch.equal(statistics(fine_tuned(copy.deepcopy(model), [], ids), [guard], ids)[0], before)


@pytest.mark.parametrize("hook", HOOKS)
def test_what_is_frozen(model, tmp_path, hook):
    names = {name for name, _ in protected_parameters(model, guard_at(tmp_path, hook))}
    wanted = ("model.embed_tokens.", *(f"model.layers.{i}." for i in range(HOOKS[hook] + 1)))
    assert names == {name for name, _ in model.named_parameters() if name.startswith(wanted)}


def test_a_tied_head_is_frozen_with_the_embeddings_and_several_guardrails_take_the_highest(model, tmp_path):
    tied = small_gpt2()
    assert tied.lm_head.weight is tied.transformer.wte.weight
    low = guard_at(tmp_path / "low", "blocks.0.hook_mlp_out")
    high = guard_at(tmp_path / "high", "blocks.2.hook_resid_pre")
    frozen = dict(protected_parameters(tied, [high, low]))
    assert any(one is tied.lm_head.weight for one in frozen.values())
    assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.h.1.ln_2.weight"} <= set(frozen)
    assert not any(name.startswith(("transformer.h.2", "transformer.ln_f")) for name in frozen)
    assert protected_parameters(tied, [low, high]) == list(frozen.items())
    assert protected_parameters(tied, []) == []
    assert "lm_head.weight" not in dict(protected_parameters(model, low))  # This one has a head of its own.


def test_a_hook_that_the_model_lacks_is_refused(model, tmp_path):
    refuses("the model has 3 layers", protected_parameters, model, guard_at(tmp_path, "blocks.7.hook_resid_post"))


def test_the_public_names_are_imported_when_they_are_used():
    assert "protected_parameters" in dsg_cli.__all__
    code = "import sys, dsg_cli; assert 'torch' not in sys.modules; dsg_cli.protected_parameters; dsg_cli.nothing"
    assert "has no attribute 'nothing'" in python("-c", code).stderr


@pytest.mark.parametrize("schema", [1, 2])
def test_on_the_model_it_was_made_for(schema):
    loaded = load_model("lab")
    guardrail = load_guardrail(DATA / f"schema-{schema}/guardrail-001.json")
    ids = loaded.tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    before = logits(loaded.model, ids)
    with guarded(loaded.model, guardrail) as model:
        assert not torch.equal(logits(model, ids), before)
    assert torch.equal(logits(loaded.model, ids), before)
    counters = guardrail.counters()
    assert counters["n_sequences"] == counters["n_gated"] == 1 and 0 < counters["n_clamped"] < ids.numel()
    assert 1 < counters["largest_edit"] < 20


def test_guardrails_compose_and_stay_in_float32():
    loaded = load_model("lab", dtype="bfloat16")
    guards = [load_guardrail(DATA / f"schema-{schema}/guardrail-001.json").to(torch.bfloat16) for schema in (1, 2)]
    assert all(guard.slice.W_enc.dtype == torch.float32 for guard in guards)
    ids = loaded.tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    with guarded(loaded.model, guards):
        assert logits(loaded.model, ids).dtype == torch.bfloat16
    assert all(guard.counters()["n_gated"] == 1 for guard in guards)
    refuses("named twice", put_on, loaded.model, [guards[0], guards[0]])


def test_another_model_is_refused_unless_it_is_wanted(model):
    guardrail = load_guardrail(KEPT)
    refuses("architecture Gemma2ForCausalLM; this one has Llama", put_on, model, guardrail)
    changed = load_model("lab").model
    changed.model.layers[0].mlp.up_proj.weight.data *= 2
    refuses("other weights", put_on, changed, guardrail)
    put_on(changed, guardrail, allow_mismatch=True)


def test_a_model_whose_layers_cannot_be_found_is_refused():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    strange = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=8))
    strange.model.layers = torch.nn.Sequential(*strange.model.layers)
    message = "The decoder layers of LlamaForCausalLM cannot be found"
    refuses(message, put_on, strange, load_guardrail(KEPT), allow_mismatch=True)


def test_what_is_no_guardrail_is_refused(tmp_path):
    refuses("is no guardrail", load_guardrail, DATA / "schema-1/features-001.json")
    refuses("There is no artifact", load_guardrail, tmp_path / "guardrail-001.json")
    shutil.copy(DATA / "schema-2/guardrail-001.json", tmp_path)
    refuses("is incomplete", load_guardrail, tmp_path / "guardrail-001.json")
    (tmp_path / "guardrail-001.safetensors").write_bytes(b"\x00" * 64)
    refuses("was altered", load_guardrail, tmp_path / "guardrail-001.json")


def test_a_compiled_model_never_runs_unguarded():
    """Compiled before or after the guardrail is put on, with a backend that needs no compiler."""
    loaded = load_model("lab")
    guardrail = load_guardrail(KEPT)
    ids = loaded.tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    compiled = torch.compile(loaded.model, backend="eager")
    before = logits(compiled, ids)
    with guarded(loaded.model, guardrail):
        expected = logits(loaded.model, ids)
        torch.testing.assert_close(logits(compiled, ids), expected)
        later = torch.compile(loaded.model, backend="eager")
        torch.testing.assert_close(logits(later, ids), expected)
    torch.testing.assert_close(logits(compiled, ids), before)
    assert not torch.equal(expected, before)
    with guarded(compiled, guardrail) as model:
        torch.testing.assert_close(logits(model, ids), expected)
