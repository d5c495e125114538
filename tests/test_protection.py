"""Fine-tuning with the protected parameters frozen leaves what a guardrail reads bit for bit as it was."""

import copy
import subprocess
import sys

import pytest
import torch
from conftest import make_guardrail, make_sae
from dsg_cli.sae import read_sae
from transformers import GPT2Config, GPT2LMHeadModel

import dsg_cli
from dsg_cli import protected_parameters
from dsg_cli.errors import DsgError
from dsg_cli.guardrail import guarded

pytestmark = pytest.mark.usefixtures("one_thread")
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
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=2, n_positions=64, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


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
    ids = torch.randint(4, 60, (4, 12), generator=torch.Generator().manual_seed(0))
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
    ids = torch.randint(4, 60, (4, 12), generator=torch.Generator().manual_seed(0))
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
    with pytest.raises(DsgError, match="the model has 3 layers"):
        protected_parameters(model, guard_at(tmp_path, "blocks.7.hook_resid_post"))


def test_the_public_name_is_imported_when_it_is_used():
    code = "import sys, dsg_cli; assert 'torch' not in sys.modules; dsg_cli.protected_parameters"
    assert "protected_parameters" in dsg_cli.__all__
    subprocess.run([sys.executable, "-c", code], check=True)
