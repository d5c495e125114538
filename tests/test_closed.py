"""Ways in which a guarded model could answer unguarded: each is refused, or guarded all the same."""

import copy
import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_guardrail, make_sae
from dsg_cli.generation import answer, prompt_ids
from dsg_cli.model import load_model
from dsg_cli.sae import read_sae
from test_serving import PROMPTS, SITE, alone, build
from transformers import AutoModelForCausalLM, Gemma2ForCausalLM, MambaConfig, MambaForCausalLM

from dsg_cli import guarded, load_guardrail
from dsg_cli.errors import DsgError
from dsg_cli.export.folder import export_folder
from dsg_cli.lab import data as lab

pytestmark = pytest.mark.usefixtures("one_thread")
KEPT = Path(__file__).parent / "data" / "schema-2" / "guardrail-001.json"
REMOTE = {"trust_remote_code": True, "dtype": torch.float32}
HEX = "Question: What is the counter of the grim hex"


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
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=3, state_size=4))
    with pytest.raises(DsgError, match="keeps its cache elsewhere"), guarded(model, guard, allow_mismatch=True):
        pass


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
    with guarded(model, guard, allow_mismatch=True), torch.no_grad():
        model(ids, attention_mask=causal, use_cache=False)
        expected = guard.last_statistic_B
        model(ids, attention_mask=causal - 1e-6, use_cache=False)
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
            Gemma2ForCausalLM.from_pretrained(folder)
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
    ids = prompt_ids(loaded, HEX, bos=2, chat=False, n_new=4)
    expected = answer(loaded, ids, guardrails=[guardrail], max_new_tokens=4)
    changed = {"num_beams": 3, "num_return_sequences": 2, "use_cache": False, "prompt_lookup_num_tokens": 2}
    for name, value in (changed | {"return_dict_in_generate": True, "stop_strings": ["x"]}).items():
        setattr(loaded.model.generation_config, name, value)
    assert answer(loaded, ids, guardrails=[guardrail], max_new_tokens=4) == expected
