"""The two lines by which a guardrail is put on a model."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import python
from dsg_cli.model import load_model
from transformers import LlamaConfig, LlamaForCausalLM

from dsg_cli import guarded, load_guardrail
from dsg_cli.errors import DsgError

DATA = Path(__file__).parent / "data"
QUESTION = "Question: What is the counter of the grim hex"


def test_importing_the_package_needs_no_torch():
    code = "import sys, dsg_cli; assert 'torch' not in sys.modules; dsg_cli.nothing"
    assert "has no attribute 'nothing'" in python("-c", code).stderr


@pytest.mark.parametrize("schema", [1, 2])
def test_on_the_model_it_was_made_for(schema):
    loaded = load_model("lab")
    guardrail = load_guardrail(DATA / f"schema-{schema}/guardrail-001.json")
    ids = loaded.tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = loaded.model(ids, use_cache=False).logits
        with guarded(loaded.model, guardrail) as model:
            assert not torch.equal(model(ids, use_cache=False).logits, before)
        assert torch.equal(loaded.model(ids, use_cache=False).logits, before)
    found = guardrail.counters()
    assert found["n_sequences"] == found["n_gated"] == 1 and 0 < found["n_clamped"] < ids.numel()
    assert 1 < found["largest_edit"] < 20


def test_guardrails_compose_and_stay_in_float32():
    loaded = load_model("lab", dtype="bfloat16")
    guards = [load_guardrail(DATA / f"schema-{schema}/guardrail-001.json").to(torch.bfloat16) for schema in (1, 2)]
    assert all(guard.slice.W_enc.dtype == torch.float32 for guard in guards)
    ids = loaded.tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    with torch.no_grad(), guarded(loaded.model, guards):
        assert loaded.model(ids, use_cache=False).logits.dtype == torch.bfloat16
    assert all(guard.counters()["n_gated"] == 1 for guard in guards)
    with pytest.raises(DsgError, match="named twice"), guarded(loaded.model, [guards[0], guards[0]]):
        pass


def test_another_model_is_refused_unless_it_is_wanted(model):
    guardrail = load_guardrail(DATA / "schema-2/guardrail-001.json")
    with pytest.raises(DsgError, match="architecture Gemma2ForCausalLM; this one has Llama"), guarded(model, guardrail):
        pass
    changed = load_model("lab").model
    changed.model.layers[0].mlp.up_proj.weight.data *= 2
    with pytest.raises(DsgError, match="other weights"), guarded(changed, guardrail):
        pass
    with guarded(changed, guardrail, allow_mismatch=True):
        pass


def test_a_model_whose_layers_cannot_be_found_is_refused():
    config = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, vocab_size=8)
    strange = LlamaForCausalLM(config)
    strange.model.layers = torch.nn.Sequential(*strange.model.layers)
    guardrail = load_guardrail(DATA / "schema-2/guardrail-001.json")
    message = "The decoder layers of LlamaForCausalLM cannot be found"
    with pytest.raises(DsgError, match=message), guarded(strange, guardrail, allow_mismatch=True):
        pass


def test_what_is_no_guardrail_is_refused(tmp_path):
    with pytest.raises(DsgError, match="is no guardrail"):
        load_guardrail(DATA / "schema-1/features-001.json")
    with pytest.raises(DsgError, match="There is no artifact"):
        load_guardrail(tmp_path / "guardrail-001.json")
    shutil.copy(DATA / "schema-2/guardrail-001.json", tmp_path)
    with pytest.raises(DsgError, match="is incomplete"):
        load_guardrail(tmp_path / "guardrail-001.json")
    (tmp_path / "guardrail-001.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(DsgError, match="was altered"):
        load_guardrail(tmp_path / "guardrail-001.json")


def test_a_compiled_model_never_runs_unguarded():
    """Compiled before or after the guardrail is put on, with a backend that needs no compiler."""
    loaded = load_model("lab")
    guardrail = load_guardrail(DATA / "schema-2/guardrail-001.json")
    ids = loaded.tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    compiled = torch.compile(loaded.model, backend="eager")
    with torch.no_grad():
        before = compiled(ids, use_cache=False).logits
        with guarded(loaded.model, guardrail):
            expected = loaded.model(ids, use_cache=False).logits
            torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)
            later = torch.compile(loaded.model, backend="eager")
            torch.testing.assert_close(later(ids, use_cache=False).logits, expected)
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, before)
        assert not torch.equal(expected, before)
        with guarded(compiled, guardrail) as model:
            torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
