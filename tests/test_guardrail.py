"""Gate and clamp against decode(clamped) + error with the whole SAE, and the properties that users rely on."""

from dataclasses import replace

import pytest
import torch
from conftest import LAYER, WIDTH, make_guardrail, make_sae
from dsg_cli.residuals import read_residual, replace_residual
from dsg_cli.runtime.gates import Gate
from dsg_cli.runtime.sites import HookSite
from dsg_cli.sae import read_sae
from dsg_cli.tokens import pad_rows

from dsg_cli.errors import DsgError
from dsg_cli.guardrail import guarded

SITE = HookSite(LAYER, "resid_post")
SPECIAL = (0, 1, 2)
INDICES = [3, 11, 30]
ROWS = [[2, 5, 6, 7, 8, 9], [2, 30, 31], [2, 12, 1, 40, 41, 42, 43, 44, 45], [2, 50]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sae")
    return make_sae(folder, bias=1.0), read_sae(str(folder))


def guard(whole, *, threshold=0.3, strength=7.0, indices=INDICES, site=SITE):
    source = replace(whole[1], site=site, write=site)
    return make_guardrail(source, indices, threshold=threshold, strength=strength, special=SPECIAL)


def reference(sae, resid_LD, ids, *, threshold, strength, indices=INDICES):
    """The paper's form, token by token: decode(acts with selected set to -c) + (h - decode(acts))."""
    acts = sae.encode(resid_LD).detach()
    counted = [i for i, token in enumerate(ids) if token not in SPECIAL]
    hot = [i for i in counted if (acts[i, indices] > 0).any()]
    rho = len(hot) / len(counted) if counted else 0.0
    out = resid_LD.clone()
    if rho > threshold:
        for i in hot:
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
        batch = pad_rows([ids], 0, SPECIAL)
        resid = read_residual(model, SITE, batch.ids_BL, batch.mask_BL)
        expected, rho = reference(whole[0], resid[0], ids, threshold=threshold, strength=7.0)
        found = module(resid, batch.counted_BL)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
        assert module.last_statistic_B.item() == pytest.approx(rho)
        assert bool(module.last_gated_B) == (rho > threshold)
        untouched = (expected == resid[0]).all(-1)
        assert torch.equal(found[untouched], resid[0][untouched])
        n_gated += rho > threshold
    assert n_gated or threshold == 0.6


def test_batch_of_one_equals_a_padded_batch_of_eight(model, whole):
    """Neither padding nor its side moves a decision or a logit."""
    module = guard(whole)
    rows = [*ROWS, *ROWS]
    with guarded(model, module, allow_mismatch=True), torch.no_grad():
        alone, decided = [], []
        for ids in rows:
            alone.append(model(torch.tensor([ids]), use_cache=False).logits[0])
            decided.append((module.last_statistic_B.item(), module.last_gated_B.item()))
        right = pad_rows(rows, 0, SPECIAL)
        together = model(right.ids_BL, attention_mask=right.mask_BL.long(), use_cache=False).logits
        assert module.last_statistic_B.tolist() == [rho for rho, _ in decided]
        assert module.last_gated_B.tolist() == [is_gated for _, is_gated in decided]
        left_ids, left_mask = right.ids_BL.flip(1), right.mask_BL.flip(1)
        for i, ids in enumerate(rows):
            left_ids[i, -len(ids) :] = torch.tensor(ids)
        positions = (left_mask.long().cumsum(-1) - 1).clamp(min=0)
        left = model(left_ids, attention_mask=left_mask.long(), position_ids=positions, use_cache=False).logits
        assert module.last_statistic_B.tolist() == [rho for rho, _ in decided]
        # lm-eval pads with id 0 and sends no mask: the id is special, so it is not counted either.
        model(right.ids_BL, use_cache=False)
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
    batch = pad_rows([[2, 5, 1, 6]], 0, SPECIAL)
    resid = read_residual(model, SITE, batch.ids_BL, batch.mask_BL)
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
    hooks = [(dict(one._forward_pre_hooks), dict(one._forward_hooks)) for one in hooked]
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        with guarded(model, guard(whole, threshold=0.0), allow_mismatch=True):
            assert [(dict(one._forward_pre_hooks), dict(one._forward_hooks)) for one in hooked] != hooks
            assert not torch.equal(model(ids, use_cache=False).logits, before)
        assert torch.equal(model(ids, use_cache=False).logits, before)
        with (
            pytest.raises(RuntimeError, match="stop"),
            guarded(model, guard(whole, threshold=0.0), allow_mismatch=True),
        ):
            raise RuntimeError("stop")
        assert torch.equal(model(ids, use_cache=False).logits, before)
    assert [(dict(one._forward_pre_hooks), dict(one._forward_hooks)) for one in hooked] == hooks


def test_the_input_of_a_layer_is_the_output_of_the_one_before(model, whole):
    ids = torch.tensor([ROWS[0]])
    before = HookSite(LAYER + 1, "resid_pre")
    mask = torch.ones_like(ids)
    assert torch.equal(read_residual(model, before, ids, mask), read_residual(model, SITE, ids, mask))
    with torch.no_grad():
        with guarded(model, guard(whole, threshold=0.0), allow_mismatch=True):
            post = model(ids, use_cache=False).logits
        with guarded(model, guard(whole, threshold=0.0, site=before), allow_mismatch=True):
            pre = model(ids, use_cache=False).logits
    assert torch.equal(post, pre)


def test_layers_that_return_tuples_are_handled():
    from transformers import GPTJConfig, GPTJForCausalLM

    torch.manual_seed(0)
    config = GPTJConfig(vocab_size=20, n_positions=32, n_embd=16, n_layer=2, n_head=2, rotary_dim=4)
    gptj = GPTJForCausalLM(config).eval()
    ids = torch.tensor([[1, 2, 3]])
    seen = read_residual(gptj, HookSite(0, "resid_post"), ids, torch.ones_like(ids))
    with torch.no_grad():
        plain = gptj(ids, use_cache=False).logits
        with replace_residual(gptj, HookSite(0, "resid_post"), lambda h: h):
            assert torch.equal(gptj(ids, use_cache=False).logits, plain)
        with replace_residual(gptj, HookSite(0, "resid_post"), lambda h: h + 1):
            assert not torch.equal(gptj(ids, use_cache=False).logits, plain)
    assert seen.shape == (1, 3, 16)


def test_a_call_that_holds_no_whole_sequence_is_refused(model, whole):
    ids = torch.tensor([ROWS[0]])
    cache = model(ids, use_cache=True).past_key_values
    with guarded(model, guard(whole), allow_mismatch=True):
        with pytest.raises(DsgError, match="whole sequences"):
            model(ids[:, -1:], past_key_values=cache)
        with pytest.raises(DsgError, match="needs token ids"):
            model(inputs_embeds=torch.zeros(1, 2, WIDTH))
        with pytest.raises(DsgError, match="whole sequences"):
            model.generate(ids, max_new_tokens=3)


def test_counters_say_what_was_seen_and_done(model, whole):
    module = guard(whole, threshold=0.3)
    largest, n_clamped, n_gated = 0.0, 0, 0
    for ids in ROWS:
        batch = pad_rows([ids], 0, SPECIAL)
        resid = read_residual(model, SITE, batch.ids_BL, batch.mask_BL)
        edit = (module(resid, batch.counted_BL) - resid).norm(dim=-1)
        largest = max(largest, float((edit / resid.norm(dim=-1)).max()))
        n_clamped += int((edit > 0).sum())
        n_gated += int((edit > 0).any())
    found = module.counters()
    assert (found["n_sequences"], found["n_gated"], found["n_clamped"]) == (len(ROWS), n_gated, n_clamped)
    assert found["largest_edit"] == pytest.approx(largest, rel=1e-3) and found["n_broken"] == 0
