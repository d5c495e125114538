"""The same decision however a sequence is served: families of models x ways of masking and caching."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import WIDTH, make_guardrail, make_sae
from transformers import DynamicCache, StaticCache

from dsg_cli.errors import DsgError
from dsg_cli.guardrail.guarded import guarded
from dsg_cli.guardrail.runtime.sites import HookSite
from dsg_cli.models.sae import read_sae

pytestmark = pytest.mark.usefixtures("one_thread")
SITE = HookSite(1, "resid_post")
N_NEW = 12

IDS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": None, "initializer_range": 0.3}
COMMON = IDS | {
    "hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 128,
}  # fmt: skip
GEMMA = {"num_key_value_heads": 1, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
FAMILIES = {
    "Llama": COMMON | {"num_key_value_heads": 2},
    "Qwen2": COMMON | {"num_key_value_heads": 1},
    "Gemma2": COMMON | GEMMA,
    "Gemma3": COMMON | GEMMA,
    "GPTNeoX": COMMON,
    "GPT2": IDS | {"n_embd": WIDTH, "n_layer": 3, "n_head": 2, "n_positions": 128},
}

PROMPTS = [[2, 5, 6, 7, 8, 9], [2, 30, 31], [2, 12, 40, 41, 42, 43, 44, 45], [2, 50]]


def build(family):
    torch.manual_seed(1)
    text = f"{family}Text" if family == "Gemma3" else family
    config = getattr(transformers, f"{text}Config")(**FAMILIES[family])
    model = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(config)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=FAMILIES)
def served(request, tmp_path_factory):
    """A model, and a guardrail whose gate opens on some prompts at once, on others while the answer is written."""
    folder = tmp_path_factory.mktemp("sae")
    # Residuals of the tiny GPT-2 are small.
    make_sae(folder, bias=1.0 if request.param == "GPT2" else 6.0)
    source = replace(read_sae(str(folder)), site=SITE, write=SITE)
    model = build(request.param)
    options = {"strength": 20.0, "gate": "window", "window": 3, "detectors": [4, 9]}
    closed = make_guardrail(source, [3, 11, 30], threshold=1e9, **options)
    peaks = []
    with guarded(model, closed, allow_mismatch=True):
        for ids in PROMPTS:
            model(torch.tensor([ids]), use_cache=False)
            peaks.append(float(closed.last_statistic_B))
    threshold = sorted(peaks)[1] + 1e-3
    return model, make_guardrail(source, [3, 11, 30], threshold=threshold, **options)


@torch.no_grad()
def alone(model, ids, n_new=N_NEW):
    """Greedy, one sequence, the whole of it anew for every token."""
    ids = list(ids)
    for _ in range(n_new):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids


@pytest.fixture(scope="module")
def expected(served):
    model, guard = served
    with guarded(model, guard, allow_mismatch=True):
        answers = [alone(model, ids) for ids in PROMPTS]
    assert answers != [alone(model, ids) for ids in PROMPTS], "the guardrail changed nothing"
    return answers


def generate(model, ids, n_new=N_NEW, **options):
    batch = torch.tensor(ids)
    mask = options.pop("attention_mask", torch.ones_like(batch))
    found = model.generate(batch, attention_mask=mask, do_sample=False, max_new_tokens=n_new, **options)
    return found.tolist()


WAYS = ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 2}, {"use_cache": False})
"""To generate: with a cache that grows, with one that does not, with the prompt in chunks, without a cache."""


def test_generation_in_every_way_equals_one_sequence_alone(served, expected):
    model, guard = served
    with guarded(model, guard, allow_mismatch=True):
        for ids, answer in zip(PROMPTS, expected, strict=True):
            for way in WAYS:
                assert generate(model, [ids], **way)[0] == answer, way
    assert guard.counters()["n_gated"] > 0


def test_left_padded_batch(served, expected):
    model, guard = served
    longest = max(map(len, PROMPTS))
    rows = [[0] * (longest - len(ids)) + ids for ids in PROMPTS]
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in PROMPTS])
    with guarded(model, guard, allow_mismatch=True):
        found = generate(model, rows, attention_mask=mask)
    assert [row[longest - len(ids) :] for ids, row in zip(PROMPTS, found, strict=True)] == expected


def test_beams_and_copied_prefix(served):
    model, guard = served
    with guarded(model, guard, allow_mismatch=True):
        for ids in PROMPTS:
            plain = generate(model, [ids], num_beams=3, use_cache=False)
            assert generate(model, [ids], num_beams=3) == plain
        prefix = PROMPTS[0][:3]
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(torch.tensor([prefix]), past_key_values=cache, use_cache=True)
        for rest in ([7, 8, 9], [30], [41, 42]):
            answer = alone(model, [*prefix, *rest])
            assert generate(model, [[*prefix, *rest]], past_key_values=copy.deepcopy(cache))[0] == answer


def test_masks_of_every_kind(served):
    """Right padding with a 2D mask, a 4D mask or none decides as each sequence alone."""
    model, guard = served
    longest = max(map(len, PROMPTS))
    ids_BL = torch.tensor([ids + [0] * (longest - len(ids)) for ids in PROMPTS])
    mask_BL = (torch.arange(longest) < torch.tensor([[len(ids)] for ids in PROMPTS])).long()
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    mask_4d = torch.where(causal & mask_BL[:, None, None, :].bool(), 0.0, torch.finfo(torch.float32).min)
    with guarded(model, guard, allow_mismatch=True), torch.no_grad():
        wanted = [
            (model(torch.tensor([ids]), use_cache=False).logits[0], float(guard.last_statistic_B)) for ids in PROMPTS
        ]
        if "sliding_attention" in (getattr(model.config, "layer_types", None) or []):
            # These families take prepared masks one a kind of attention.
            near = causal.triu(1 - model.config.sliding_window)
            mask_near = mask_4d.masked_fill(~near, torch.finfo(torch.float32).min)
            mask_4d = {"full_attention": mask_4d, "sliding_attention": mask_near}
        for mask in (mask_BL, mask_4d, None):
            logits_BLV = model(ids_BL, attention_mask=mask, use_cache=False).logits
            for row, (logits, statistic) in enumerate(wanted):
                torch.testing.assert_close(logits_BLV[row, : len(logits)], logits, rtol=1e-4, atol=1e-4)
                assert float(guard.last_statistic_B[row]) == pytest.approx(statistic, rel=1e-4)


@torch.no_grad()
def test_in_bfloat16_wherever_the_unguarded_model_does_it_too(served):
    """Rounding differs with the shape of a call; where it moves no token of the bare model, it moves none here."""
    bare, guard = served
    model = copy.deepcopy(bare).to(torch.bfloat16)
    n_compared = 0
    for ids in PROMPTS:
        expected = alone(model, ids)
        stable = [way for way in WAYS if generate(model, [ids], **way)[0] == expected]
        with guarded(model, guard, allow_mismatch=True):
            expected = alone(model, ids)
            for way in stable:
                assert generate(model, [ids], **way)[0] == expected, way
        n_compared += len(stable)
    assert n_compared >= len(PROMPTS)


def test_a_cache_filled_without_the_guardrail_is_refused(served):
    model, guard = served
    with torch.no_grad():
        cache = model(torch.tensor([PROMPTS[0]]), use_cache=True).past_key_values
        with guarded(model, guard, allow_mismatch=True), pytest.raises(DsgError, match="has not seen"):
            model(torch.tensor([[7]]), past_key_values=cache)


def test_gate_and_clamp_compile_without_a_break(served):
    """Tensors only: one graph, for a prompt and for a token after it."""
    _, guard = served
    bare = copy.deepcopy(guard)
    torch.manual_seed(0)
    resid_BLD, counted_BL = torch.randn(2, 9, WIDTH) * 3, torch.rand(2, 9) > 0.2

    def both(guard, resid_BLD, counted_BL, state_BC):
        decision = guard.decide(resid_BLD, counted_BL, state_BC)
        return guard.edit(resid_BLD, decision), decision.states_BLC

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    state = bare.gate.initial_state(2, resid_BLD.device)
    for part in (slice(0, 8), slice(8, 9)):
        expected = both(bare, resid_BLD[:, part], counted_BL[:, part], state)
        found = compiled(guard, resid_BLD[:, part], counted_BL[:, part], state)
        torch.testing.assert_close(found, expected)
        state = expected[1][:, -1]


SITES = {
    "hook_z": ("standard", "blocks.1.attn.hook_z", None),
    "resid_pre": ("standard", "blocks.1.hook_resid_pre", None),
    "transcoder": ("transcoder", "blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out"),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SITES)
def test_other_sites_and_transcoders_generate_as_one_sequence_alone(family, name, tmp_path):
    architecture, read, write = SITES[name]
    extra = {"d_out": WIDTH, "apply_b_dec_to_input": False} if write else {}
    make_sae(tmp_path, architecture, hook=read, bias=0.5, **extra)
    if write:
        settings = json.loads((tmp_path / "cfg.json").read_text())
        settings["metadata"] |= {"hook_name": read, "hook_name_out": write}
        (tmp_path / "cfg.json").write_text(json.dumps(settings))
    source, model = read_sae(str(tmp_path)), build(family)
    guard = make_guardrail(source, [3, 11, 30], threshold=0.2, strength=20.0, gate="window", window=3)
    assert guard.write.name == (write or read)
    n_changed = 0
    for ids in PROMPTS:
        base = alone(model, ids, 6)
        with guarded(model, guard, allow_mismatch=True):
            expected = alone(model, ids, 6)
            assert generate(model, [ids], n_new=6)[0] == expected
            assert generate(model, [ids], n_new=6, cache_implementation="static")[0] == expected
        n_changed += expected != base
    assert n_changed > 0 and guard.counters()["n_clamped"] > 0


GATES = {
    "window": {"threshold": 0.5},
    "cusum": {"threshold": 0.5, "weights": [0.5, 0.5], "detectors": [4, 9], "clip": 16.0},
    "probe": {"threshold": 7.5, "weights": [1.0, -0.5], "detectors": [4, 9], "bias": -0.5, "clip": 8.0},
    "token": {"threshold": 0.5},
}


class TestOnLlama:
    @pytest.fixture(params=GATES)
    def llama(self, request, tmp_path):
        make_sae(tmp_path, bias=6.0)
        source = replace(read_sae(str(tmp_path)), site=SITE, write=SITE)
        options = {"strength": 20.0, "gate": request.param, "window": 3} | GATES[request.param]
        return build("Llama"), make_guardrail(source, [3, 11, 30], **options)

    def test_assisted_decoding_rolls_back(self, llama):
        model, guard = llama
        assistant = build("Llama")
        assistant.lm_head.weight.data += 0.05 * torch.randn_like(assistant.lm_head.weight)
        with guarded(model, guard, allow_mismatch=True):
            for ids in PROMPTS:
                assert generate(model, [ids], assistant_model=assistant)[0] == alone(model, ids)

    def test_packed_positions(self, llama):
        model, guard = llama
        ids = [token for prompt in PROMPTS for token in prompt]
        positions = [i for prompt in PROMPTS for i in range(len(prompt))]
        with guarded(model, guard, allow_mismatch=True), torch.no_grad():
            packed = model(torch.tensor([ids]), position_ids=torch.tensor([positions]), use_cache=False).logits[0]
            start = 0
            for prompt in PROMPTS:
                one = model(torch.tensor([prompt]), use_cache=False).logits[0]
                torch.testing.assert_close(packed[start : start + len(prompt)], one, rtol=1e-4, atol=1e-4)
                start += len(prompt)

    def test_continuous_batching_is_refused(self, llama):
        model, guard = llama
        with guarded(model, guard, allow_mismatch=True), pytest.raises(DsgError, match="Continuous batching"):
            model(torch.tensor([PROMPTS[0]]), cu_seq_lens_q=torch.tensor([0, 6]))

    def test_a_broken_residual_is_gated_and_told_at_the_end(self, llama):
        model, guard = llama
        model.model.layers[0].mlp.down_proj.weight.data[0, 0] = torch.nan
        with pytest.raises(DsgError, match="not finite"), guarded(model, guard, allow_mismatch=True), torch.no_grad():
            model(torch.tensor([PROMPTS[0]]), use_cache=False)
        assert guard.last_gated_B.all() and guard.counters()["n_broken"] == 5

    def test_a_static_cache_can_be_reset(self, llama):
        model, guard = llama
        cache = StaticCache(config=model.config, max_cache_len=40)
        with guarded(model, guard, allow_mismatch=True):
            for ids in PROMPTS:
                assert generate(model, [ids], past_key_values=cache)[0] == alone(model, ids)
                cache.reset()
