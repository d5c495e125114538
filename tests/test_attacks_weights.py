"""Attacks by training and on weights: each has a property that would fail if it did nothing."""

import copy

import pytest
import torch
from conftest import make_guardrail, make_sae
from dsg_cli.attacks.adapters import add_adapters
from dsg_cli.attacks.gradients import losses_and_statistics
from dsg_cli.attacks.summary import summarise
from dsg_cli.attacks.training import answer_batch, answer_losses
from dsg_cli.benches.tasks import Question, load_tasks, questions_of
from dsg_cli.model import load_model, whole_digest
from dsg_cli.protection import protected_parameters
from dsg_cli.runtime.gates import Gate
from dsg_cli.sae import read_sae
from dsg_cli.tokens import special_ids
from transformers import GPT2Config, GPT2LMHeadModel

from dsg_cli.attacks import dilution, probe, prune, quantize, relearn, soft_prompt, suffix, unhook
from dsg_cli.attacks.target import Material, Target, of_forget
from dsg_cli.attacks.weights import linear_layers
from dsg_cli.errors import DsgError
from dsg_cli.guardrail import guarded

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = {"bos": 2, "batch_size": 64, "max_length": 1024}
RELEARN = {"parameters": ["all"], "rank": 4, "frozen_below": False, "guard": ["loop"], "data": ["forget"]}
KNOWN = [Question(f"w{i} w{i + 1}", (" w40", " w41", " w42", " w43"), i % 4) for i in range(12)]
BENIGN = [list(range(4 + i, 24 + i)) for i in range(20)]


@pytest.fixture(scope="module")
def lab():
    """The lab under a guardrail whose every token is hot, so that it always fires."""
    loaded = load_model("lab")
    special = special_ids(loaded.tokenizer)
    guards = [make_guardrail(read_sae("lab"), list(range(200)), threshold=0.5, strength=90.0, special=special)]
    asked = {bench: questions_of(*load_tasks([bench], split="dev"))[:12] for bench in ("lab-hexes", "lab-near")}
    material = Material(asked["lab-hexes"], utility=asked["lab-near"])
    return Target(loaded.model, loaded.tokenizer, guards, **OPTIONS), material


@pytest.fixture
def tiny(model, tokenizer, tmp_path):
    """A random model under a guardrail that fires on most sequences."""
    make_sae(tmp_path, bias=0.0)
    guards = [make_guardrail(read_sae(str(tmp_path)), list(range(12)), threshold=0.1, strength=5.0, gate="window")]
    return Target(model, tokenizer, guards, bos=2, batch_size=64, max_length=64)


def plain(target, questions, *, is_guarded=True):
    return of_forget(target.ask(questions, name="plain", is_guarded=is_guarded))


def trained(tiny, **changes):
    options = {"steps": [0, 3], "learning_rates": [1e-2]} | RELEARN | changes
    return relearn.attack(tiny, Material(KNOWN, known=KNOWN, benign=BENIGN), **options)


def test_every_combination_is_a_variant_and_shares_the_unguarded_side(tiny):
    curve = trained(tiny, learning_rates=[1e-3, 1e-2], guard=["loop", "test", "removed"], data=["forget", "unrelated"])
    variants = list(dict.fromkeys(point["variant"] for point in curve))
    assert len(curve) == 24 and len(variants) == 12
    assert variants[0] == "all, lr 0.001, guard in loop"
    assert variants[-1] == "all, lr 0.01, guard removed, unrelated text"
    begun, end = ({point["variant"]: point for point in curve if point["x"] == x} for x in (0, 3))
    loop, asked, removed = (f"all, lr 0.01, guard {words}" for words in ("in loop", "at test", "removed"))
    for variant in variants:
        guarded = plain(tiny, KNOWN, is_guarded="removed" not in variant)
        assert begun[variant]["guarded"] == guarded and begun[variant]["unguarded"] == plain(
            tiny, KNOWN, is_guarded=False
        )
    assert end[loop]["unguarded"] == end[asked]["unguarded"] == end[removed]["unguarded"] == end[removed]["guarded"]
    # Without the guard while training, the loss is that of the unguarded model; with it, another.
    assert end[asked]["guarded"]["loss"] == end[asked]["unguarded"]["loss"] != end[loop]["guarded"]["loss"]
    assert end[loop]["unguarded"]["loss"] != end[f"{loop}, unrelated text"]["unguarded"]["loss"]
    assert end[loop]["unguarded"]["loss"] != end["all, lr 0.001, guard in loop"]["unguarded"]["loss"]


@pytest.mark.parametrize("kind", ["all", "lora", "above"])
@pytest.mark.parametrize("frozen_below", [False, True])
def test_only_what_should_be_trained_is(tiny, monkeypatch, kind, frozen_below):
    attacked = []
    monkeypatch.setattr(relearn, "copied", lambda model: attacked.append(copy.deepcopy(model)) or attacked[-1])
    before = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    losses = [
        point["unguarded"]["loss"]
        for point in trained(tiny, parameters=[kind], frozen_below=frozen_below, guard=["removed"], steps=[0, 1, 40])[
            1:
        ]
    ]
    assert losses[1] < 0.8 * losses[0]
    changed = {name for name, value in attacked[0].state_dict().items() if not torch.equal(value, before[name])}
    protected = {name for name, _ in protected_parameters(tiny.model, tiny.guardrails)}
    above = {name for name in before if name.startswith("model.layers.2.")}
    if kind == "all":
        assert changed == set(before) - (protected if frozen_below else set())
    else:
        assert changed == (above if kind == "above" else set())
    assert all(torch.equal(value, before[name]) for name, value in tiny.model.state_dict().items())
    n_hooks = sum(len(module._forward_hooks) for module in attacked[0].modules())
    assert n_hooks == (0 if kind != "lora" else 7 if frozen_below else 21)


def test_what_the_guardrail_reads_does_not_move_while_what_is_below_is_frozen(tiny):
    (guard,) = tiny.guardrails
    plain(tiny, KNOWN)
    guard.gate = Gate("window", float(guard.last_statistic_B.median()), 4)
    gates = {}
    for frozen_below in (False, True):
        curve = trained(tiny, steps=[0, 30], learning_rates=[5e-2], frozen_below=frozen_below)
        gates[frozen_below] = [point["guarded"]["gate_rate"] for point in curve]
        assert ("frozen below" in curve[0]["variant"]) == frozen_below
    assert gates[True][0] == gates[True][1] == gates[False][0] != gates[False][1]


def test_nothing_above_the_last_layer_can_be_trained(model, tokenizer, tmp_path):
    make_sae(tmp_path, hook="blocks.2.hook_resid_post")
    guards = [make_guardrail(read_sae(str(tmp_path)), [0], threshold=1.0, strength=1.0)]
    target = Target(model, tokenizer, guards, bos=2, batch_size=16, max_length=64)
    with pytest.raises(DsgError, match="nothing is left to train"):
        trained(target, parameters=["above"])


def test_unrelated_training_needs_text(tiny):
    with pytest.raises(DsgError, match="no benign text to train on"):
        relearn.attack(
            tiny, Material(KNOWN, known=KNOWN), steps=[0, 1], learning_rates=[1e-3], **RELEARN | {"data": ["unrelated"]}
        )


def test_adapters_begin_as_nothing_and_reach_layers_that_keep_weights_transposed():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    gpt2 = GPT2LMHeadModel(config).eval().requires_grad_(False)
    ids = torch.arange(12)[None]
    before = gpt2(input_ids=ids).logits
    parameters = add_adapters(gpt2, 3, frozen=[gpt2.transformer.h[0].mlp.c_fc.weight], seed=0)
    assert len(parameters) == 2 * (4 * 2 - 1)
    assert torch.equal(gpt2(input_ids=ids).logits, before)
    with torch.no_grad():
        parameters[1].add_(1.0)
    assert not torch.equal(gpt2(input_ids=ids).logits, before)


def test_unhooking_gives_what_the_base_knows(lab):
    target, material = lab
    (point,) = unhook.attack(target, material)
    assert point["guarded"] == point["unguarded"] == plain(target, material.forget, is_guarded=False)
    assert point["guarded"]["forget_acc"] > plain(target, material.forget)["forget_acc"]


def test_quantisation_rounds_every_output_channel(lab):
    target, material = lab
    before = whole_digest(target.model)
    coarse = quantize.quantized(copy.deepcopy(target.model), 3)
    old = {id_: weight for id_, (_, weight, _) in enumerate(linear_layers(target.model))}
    assert len(old) == 28
    for i, (_, weight, outputs) in enumerate(linear_layers(coarse)):
        step = old[i].abs().amax(1 - outputs, keepdim=True) / 3
        assert ((weight - old[i]).abs() <= step * 0.5001).all() and not torch.equal(weight, old[i])
        assert len(weight.select(outputs, 0).unique()) <= 7
    assert torch.equal(coarse.get_input_embeddings().weight, target.model.get_input_embeddings().weight)
    curve = quantize.attack(target, material, bits=[8, 2])
    assert [point["x"] for point in curve] == [8, 2]
    # Eight bits change next to nothing; two destroy the model, guarded or not.
    assert curve[0]["unguarded"]["forget_acc"] > 0.9 > curve[1]["unguarded"]["forget_acc"]
    assert curve[1]["unguarded"]["utility_acc"] < curve[0]["unguarded"]["utility_acc"]
    assert whole_digest(target.model) == before


def test_pruning_of_nothing_is_plain_evaluation(lab):
    target, material = lab
    before = whole_digest(target.model)
    curve = prune.attack(target, material, shares=[0.0, 0.9])
    for side in ("guarded", "unguarded"):
        found = {key: value for key, value in curve[0][side].items() if key != "utility_acc"}
        assert found == plain(target, material.forget, is_guarded=side == "guarded")
    assert curve[1]["unguarded"]["forget_acc"] < 0.7 and whole_digest(target.model) == before


def test_pruning_takes_the_smallest(tiny):
    pruned = prune.pruned(copy.deepcopy(tiny.model), 0.25)
    for (_, old, _), (_, new, _) in zip(linear_layers(tiny.model), linear_layers(pruned), strict=True):
        gone = new == 0
        assert int(gone.sum()) == old.numel() // 4 and torch.equal(new[~gone], old[~gone])
        assert old[gone].abs().max() <= old[~gone].abs().min()


def test_the_summary_says_where_each_variant_first_evades():
    def point(variant, x, accuracy):
        return {"x": x, "variant": variant, "guarded": {"forget_acc": accuracy}, "unguarded": {"forget_acc": 1.0}}

    before = {"guarded": {"forget_acc": 0.2}, "unguarded": {"forget_acc": 1.0}}
    curve = [
        point("low", 0, 0.2),
        point("low", 9, 0.6),
        point("high", 0, 0.2),
        point("high", 5, 0.7),
        point("high", 9, 0.9),
    ]
    found = summarise(before, curve, on_prompts=False)
    assert found["evades_above"] == 0.6 and found["evaded_at"] == {"high": 5}
    useless = {"guarded": {"forget_acc": 1.0}, "unguarded": {"forget_acc": 1.0}}
    assert summarise(useless, curve, on_prompts=False)["evaded_at"] == {}


def test_a_soft_prompt_begins_as_dilution_and_lowers_the_loss_it_minimises(tiny):
    material = Material(KNOWN[6:], known=KNOWN[:6], benign=[[9, 11], *BENIGN])
    options = {"learning_rate": 0.1, "objectives": ["loop", "gate"], "gate_weight": 1.0}
    curve = soft_prompt.attack(tiny, material, tokens=5, steps=[0, 40], **options)
    (diluted,) = dilution.attack(tiny, Material(KNOWN[6:], benign=BENIGN[:1]), lengths=[5], places=["before"])
    assert [point["variant"] for point in curve] == ["guard in loop"] * 2 + ["against the gate"] * 2
    for first, last in (curve[:2], curve[2:]):
        for side in ("guarded", "unguarded"):
            begun, end = (dict(point[side]) for point in (first, last))
            assert end["loss"] < 0.9 * begun.pop("loss") and begun == diluted[side]
    # The guard was on: the same first prompt has another loss under it.
    assert curve[0]["guarded"]["loss"] != curve[0]["unguarded"]["loss"]
    # At first, the statistic relative to itself is 1.
    assert curve[2]["guarded"]["loss"] == pytest.approx(curve[0]["unguarded"]["loss"] + 1, rel=1e-5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.model.modules())


def test_the_soft_statistic_of_a_window_gate_is_its_statistic(tiny):
    batch = answer_batch(tiny, KNOWN, lambda context, _: context)
    _, soft_B = losses_and_statistics(tiny.model, tiny.guardrails, batch)
    with guarded(tiny.model, tiny.guardrails, allow_mismatch=True), torch.no_grad():
        tiny.model(input_ids=batch.tokens.ids_BL, attention_mask=batch.tokens.mask_BL.long())
    assert torch.allclose(soft_B, tiny.guardrails[0].last_statistic_B) and soft_B.max() > 0


def test_a_soft_prompt_stands_after_bos_and_counts(tiny):
    """Where the trained vectors are those of other tokens, the guardrail sees what it sees of those tokens."""
    ids, others = torch.tensor([[2, 9, 10, 30, 31]]), torch.tensor([[2, 40, 41, 30, 31]])
    prompt = tiny.model.get_input_embeddings()(others[0, 1:3])
    seen = []
    for asked, replaced in ((others, None), (ids, [9, 10])):
        with guarded(tiny.model, tiny.guardrails, allow_mismatch=True), torch.no_grad():
            if replaced is None:
                tiny.model(input_ids=asked)
            else:
                with soft_prompt.embedded(tiny.model, prompt, replaced):
                    tiny.model(input_ids=asked)
        seen.append(tiny.guardrails[0].last.statistic_BL)
    assert torch.equal(*seen) and seen[0].max() > 0


def test_a_suffix_begins_as_dilution_and_lowers_the_guarded_loss(tiny):
    """Without a step it is what `dilution` puts after the question; every exchange lowers the guarded loss."""
    questions = [Question(f"w{i} w{i + 1} w50 w51", (" w40", " w41", " w42", " w43"), i % 4) for i in range(12)]
    material = Material(questions[6:], known=questions[:6], benign=BENIGN)
    options = {"candidates": 48, "gate_weight": 0.1, "places": ["after", "before"]}
    curve = suffix.attack(tiny, material, tokens=4, steps=[0, 3, 8], **options)
    diluted = dilution.attack(tiny, Material(questions[6:], benign=BENIGN[:1]), lengths=[4], places=["after", "before"])
    assert [point["variant"] for point in curve] == ["after"] * 3 + ["before"] * 3
    for points, plain_ones in ((curve[:3], diluted[0]), (curve[3:], diluted[1])):
        for side in ("guarded", "unguarded"):
            losses = [point[side].pop("loss") for point in points]
            assert losses[0] >= losses[1] >= losses[2] < losses[0] and points[0][side] == plain_ones[side]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.model.modules())


def test_the_slope_of_a_suffix_is_that_of_its_embeddings(tiny):
    batch = answer_batch(tiny, KNOWN[:3], suffix.before_cue([20, 21], 1))
    assert (batch.tokens.ids_BL[:, 2:4] == torch.tensor([20, 21])).all()

    def loss(_batch):
        return answer_losses(tiny.model, batch).mean()

    slope_SD = suffix.slope_of_embeddings(tiny.model, loss, batch, torch.full((3,), 2), 2)
    step = 1e-3 * slope_SD / slope_SD.norm()
    before, prompt = loss(batch), tiny.model.get_input_embeddings()(torch.tensor([20, 21]))
    with soft_prompt.embedded(tiny.model, prompt + step, [20, 21]), torch.no_grad():
        after = loss(batch)
    assert float((after - before) / 1e-3) == pytest.approx(float(slope_SD.norm()), rel=0.05)


def test_exchanges_change_one_token_to_a_proposed_one(tiny):
    assert suffix.exchanges(torch.zeros(1, 1), (0,), 9, torch.Generator()) == []  # Nothing else to take.
    scores = torch.zeros(3, 200)
    scores[:, :64] = torch.arange(64.0)
    scores[:, 5] = -torch.inf
    found = suffix.exchanges(scores, (100, 101, 102), 40, torch.Generator().manual_seed(0))
    assert 20 < len(found) == len(set(found)) <= 40
    for one in found:
        assert sum(a != b for a, b in zip(one, (100, 101, 102), strict=True)) == 1
        assert 5 not in one


def test_the_lens_at_the_last_layer_is_plain_evaluation(lab):
    target, material = lab
    material = Material(material.forget, known=material.utility)
    curve = probe.attack(target, material, ridge=0.01)
    assert [(point["variant"], point["x"]) for point in curve] == [
        (variant, layer) for variant in ("logit lens", "linear probe") for layer in range(4)
    ]
    for side in ("guarded", "unguarded"):
        assert curve[3][side] == plain(target, material.forget, is_guarded=side == "guarded")
    # The guard comes after the first layer.
    assert (
        curve[0]["guarded"]["forget_acc"] == curve[0]["unguarded"]["forget_acc"] < curve[3]["unguarded"]["forget_acc"]
    )
    assert all(point["guarded"]["n_known"] == 12 for point in curve[4:])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in target.model.modules())


def test_a_probe_reads_what_is_linearly_there():
    generator = torch.Generator().manual_seed(0)
    directions, mixing = torch.randn(10, 24, generator=generator), torch.randn(24, 24, generator=generator)
    words = torch.arange(60) % 10
    resid = directions[words] @ mixing + 5.0 + 0.1 * torch.randn(60, 24, generator=generator)
    read = probe.fitted(resid[:40], directions[words[:40]], 1e-3)(resid[40:])
    assert ((read @ directions.T).argmax(1) == words[40:]).float().mean() > 0.9
    blind = probe.fitted(torch.randn(40, 24, generator=generator), directions[words[:40]], 1e-3)(resid[40:])
    assert ((blind @ directions.T).argmax(1) == words[40:]).float().mean() < 0.5
