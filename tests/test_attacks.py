"""Each attack has a property that would fail if it did nothing."""

import dataclasses

import pytest
from conftest import make_guardrail, make_sae
from dsg_cli.attacks.asking import ask
from dsg_cli.benches.tasks import load_tasks, questions_of
from dsg_cli.model import fingerprint, load_model
from dsg_cli.sae import read_sae
from dsg_cli.tokens import special_ids

from dsg_cli.attacks import dilution, relearn
from dsg_cli.attacks.target import Material, Target, of_forget
from dsg_cli.errors import DsgError

OPTIONS = {"bos": 2, "batch_size": 16, "max_length": 1024}
RELEARN = {"parameters": ["all"], "rank": 8, "frozen_below": False, "guard": ["loop"], "data": ["forget"]}


@pytest.fixture(scope="module")
def lab():
    loaded = load_model("lab")
    questions = {bench: questions_of(*load_tasks([bench], split="dev"))[:16] for bench in ("lab-hexes", "lab-near")}
    return loaded, questions


@pytest.fixture(scope="module")
def guardrail(lab):
    """Every token is hot: the gate always fires, whatever the prompt."""
    loaded, _ = lab
    sae = read_sae("lab")
    special = special_ids(loaded.tokenizer)
    return [make_guardrail(sae, list(range(200)), threshold=0.5, strength=90.0, special=special)]


def test_asking_counts_what_is_right_and_gated(lab, guardrail):
    loaded, questions = lab
    base = ask(loaded.model, loaded.tokenizer, questions["lab-hexes"], guardrails=[], **OPTIONS)
    assert base["acc"] == 1.0 and base["n"] == 16 and base["low"] < 1.0 == base["high"] and "gate_rate" not in base
    clamped = ask(loaded.model, loaded.tokenizer, questions["lab-hexes"], guardrails=guardrail, **OPTIONS)
    assert clamped["gate_rate"] == 1.0 and clamped["acc"] < 0.6


def test_dilution_of_length_zero_is_plain_evaluation_and_prefixes_reach_the_model(lab, guardrail):
    loaded, questions = lab
    asked = questions["lab-hexes"]
    benign = [loaded.tokenizer("Few remember who said it first. " * 6, add_special_tokens=False)["input_ids"]]
    seen = []

    def watch(_module, _args, kwargs):
        seen.append(kwargs["input_ids"])

    handle = loaded.model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        target = Target(loaded.model, loaded.tokenizer, guardrail, **OPTIONS)
        curve = dilution.attack(target, Material(asked, benign=benign), lengths=[0, 20], places=["before"])
    finally:
        handle.remove()
    plain = ask(loaded.model, loaded.tokenizer, asked, guardrails=guardrail, **OPTIONS)
    assert curve[0]["guarded"] == of_forget(plain)
    assert [point["x"] for point in curve] == [0, 20] and curve[1]["unguarded"]["forget_acc"] > 0.9
    longest = max(seen, key=lambda ids: ids.shape[1])
    assert longest[0, 0] == loaded.tokenizer.bos_token_id and longest[0, 1:21].tolist() == benign[0][:20]


def test_dilution_needs_text_and_room(lab, guardrail):
    loaded, questions = lab
    target = Target(loaded.model, loaded.tokenizer, guardrail, **OPTIONS)
    with pytest.raises(DsgError, match="no benign text"):
        dilution.attack(target, Material(questions["lab-hexes"], benign=[]), lengths=[0, 50], places=["after"])
    with pytest.raises(DsgError, match="the model reads 1024"):
        dilution.attack(target, Material(questions["lab-hexes"], benign=[[5] * 2000]), lengths=[1020], places=["after"])


def test_benign_tokens_stand_where_they_should(lab, guardrail):
    loaded, questions = lab
    target = Target(loaded.model, loaded.tokenizer, guardrail, **OPTIONS)
    assert dilution.cue_length(target, questions["lab-hexes"]) == 3  # "? Answer :"
    context, benign = (2, 10, 11, 12, 20, 21), [[5, 6, 7, 8]]
    placed = {place: dilution._insert(2, benign, 4, place, 2)(context, 3) for place in dilution.PLACES}
    assert placed["before"] == (2, 5, 6, 7, 8, 10, 11, 12, 20, 21)
    assert placed["after"] == (2, 10, 11, 12, 5, 6, 7, 8, 20, 21)
    assert placed["around"] == (2, 5, 6, 10, 11, 12, 7, 8, 20, 21)


def test_relearning_starts_at_plain_evaluation_and_trains(lab, guardrail):
    loaded, questions = lab
    before = fingerprint(loaded.model, 3)
    target = Target(loaded.model, loaded.tokenizer, guardrail, **OPTIONS)
    asked = questions["lab-hexes"]
    material = Material(asked[8:], known=asked[:8], utility=questions["lab-near"])
    curve = relearn.attack(target, material, steps=[0, 1, 6], learning_rates=[1e-3], **RELEARN)
    # Under another guard on the same model, only the guarded side is trained and asked.
    seen = []
    again = dataclasses.replace(target, report=lambda task, done, of: seen.append((task, done)))
    second = relearn.attack(again, material, steps=[0, 1, 6], learning_rates=[1e-3], **RELEARN)
    assert second == curve and ("relearning, forget/all/0.001/guard, steps", 6) in seen
    assert not any("/none" in task for task, _ in seen)
    plain = ask(loaded.model, loaded.tokenizer, questions["lab-hexes"][8:], guardrails=guardrail, **OPTIONS)
    assert curve[0]["guarded"]["forget_acc"] == plain["acc"] and "loss" not in curve[0]["guarded"]
    assert curve[0]["unguarded"]["forget_acc"] == 1.0 and curve[0]["unguarded"]["utility_acc"] == 1.0
    for side in ("guarded", "unguarded"):
        assert curve[2][side]["loss"] < curve[1][side]["loss"]
    # The guard was in the loop: the same first step has another loss under it.
    assert curve[1]["guarded"]["loss"] > 2 * curve[1]["unguarded"]["loss"]
    # The attacked model is a copy.
    assert fingerprint(loaded.model, 3) == before
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert not any(module._forward_hooks for module in loaded.model.modules())


def test_relearning_recovers_what_a_model_never_knew(model, tokenizer, tmp_path):
    """On a random model without a guard that fires, training on the very questions that are asked teaches them."""
    from dsg_cli.benches.tasks import Question

    questions = [Question(f"w{i} w{i + 1}", (" w40", " w41", " w42", " w43"), i % 4) for i in range(12)]
    make_sae(tmp_path)
    silent = [make_guardrail(read_sae(str(tmp_path)), [0], threshold=1.0, strength=1.0, special=(0, 1, 2))]
    target = Target(model, tokenizer, silent, bos=2, batch_size=16, max_length=64)
    curve = relearn.attack(
        target, Material(questions, known=questions), steps=[0, 60], learning_rates=[1e-2], **RELEARN
    )
    for side in ("guarded", "unguarded"):
        assert curve[0][side]["forget_acc"] < 0.7 and curve[1][side]["forget_acc"] == 1.0
    assert curve[1]["guarded"]["gate_rate"] == 0.0
