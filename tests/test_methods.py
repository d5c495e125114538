"""Methods that change weights, as a user runs them: artifacts, adapters, what composes, and what is refused."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import shutil
import signal
from collections import Counter

import pytest
import torch
from papers import BOS, FEATURES, SPECIAL, UNKNOWN, Watched, forget_text, nll, retain_text, run, text, unlearn, weights
from transformers import AutoModelForCausalLM

from dsg_cli.errors import DsgError
from dsg_cli.evals.metrics import unlearning_score
from dsg_cli.job import Job
from dsg_cli.methods import METHODS
from dsg_cli.methods.training import Cost, ReferenceWeights, TrainingInputs, count_passes, train, trainable_parameters
from dsg_cli.models.language_model import base_of, load_model
from dsg_cli.recipe import load_recipe
from dsg_cli.settings import CompareSection, Training
from dsg_cli.stages import apply as method
from dsg_cli.stages import attack, evaluate, export
from dsg_cli.stages import prompts as generate
from dsg_cli.stages.compare import best_trial, settings_to_try
from dsg_cli.stages.composition import find_composition, load_composition
from dsg_cli.stages.stage import RunOptions
from dsg_cli.workspace import store as verify
from dsg_cli.workspace.artifacts import Guardrail, ModelWeights
from dsg_cli.workspace.checkpoints import Checkpoint
from dsg_cli.workspace.files import Signalled, install
from dsg_cli.workspace.results import AttackReport, EvalReport
from dsg_cli.workspace.store import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")

TRAINED = [name for name, entry in METHODS.items() if entry.is_trained]
WEIGHTS = [name for name, entry in METHODS.items() if entry.form == "model"]  # And what finetunes.


@pytest.fixture(scope="module")
def recipe(tiny_recipe):
    return tiny_recipe


@pytest.fixture
def apply(recipe, tmp_path):
    """Apply a method in a workspace of that name."""

    def run(name, *sets, to="w", **options):
        return method.run_method(recipe(*sets), Workspace(tmp_path / to), name, **options)

    return run


@pytest.fixture(scope="module")
def store(recipe, tiny_features, tmp_path_factory):
    """A workspace with two models: by npo, and by an adapter on top of that; and a guardrail on the first."""
    workspace = Workspace(shutil.copytree(tiny_features, tmp_path_factory.mktemp("made") / "ws"))
    method.run_method(recipe(), workspace, "npo", source="features-001")  # As the SAE reads text: with BOS.
    method.run_method(recipe("methods.grad_diff.lora=true"), workspace, "grad-diff", source="model-001")
    method.run_method(recipe(), workspace, "dsg", source="model-001")
    return workspace


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_method_leaves_a_model_that_anyone_can_load(name, recipe, folders, tmp_path):
    workspace = Workspace(tmp_path)
    stored = method.run_method(recipe(), workspace, name)
    body = stored.body_as(ModelWeights)
    assert body.method == name and body.form == "whole" and stored.header.settings["method"] == name
    assert len(body.losses) == (3 if name in TRAINED else 0) and body.diverged_at is None
    assert body.cost["forward_passes"] >= body.cost["backward_passes"] > 0
    assert bool(body.features) == METHODS[name].needs_sae == (stored.header.sae is not None)
    changed = AutoModelForCausalLM.from_pretrained(tmp_path / stored.id)
    base = AutoModelForCausalLM.from_pretrained(folders["model"])
    ids = torch.arange(4, 30)[None]
    assert not torch.equal(changed(input_ids=ids).logits, base(input_ids=ids).logits)
    own = load_composition(workspace, find_composition(workspace, [stored.id]), recipe())
    assert torch.equal(own.model.model(input_ids=ids).logits, changed(input_ids=ids).logits)
    assert torch.equal(own.base.model(input_ids=ids).logits, base(input_ids=ids).logits)
    before = base.state_dict()
    moved = {name for name, value in changed.state_dict().items() if not torch.equal(value, before[name])}
    assert changed.state_dict().keys() == before.keys()
    assert {value.rpartition(".")[0] for value in moved} <= set(body.trained["modules"])
    assert all(finding.state == "ok" for finding in verify.verify_all(workspace))


def test_the_same_seed_gives_the_same_weights_and_another_does_not(apply):
    stored = [apply("npo", f"seed={seed}", to=to) for to, seed in (("a", 0), ("b", 0), ("c", 1))]
    digests = [model.header.files["model-001/model.safetensors"] for model in stored]
    assert digests[0] == digests[1] != digests[2]


def test_half_precision_is_for_passes_or_files_and_adds_up_in_full(recipe, apply, tmp_path):
    plain, mixed = apply("npo", to="plain"), apply("npo", "methods.npo.mixed_precision=bfloat16", to="mixed")
    apply("npo", "methods.npo.save_dtype=bfloat16", to="halved")
    folders = [tmp_path / name / "model-001" for name in ("plain", "mixed", "halved")]
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in folders]
    assert [model.dtype for model in models] == [torch.float32, torch.float32, torch.bfloat16]
    losses = [stored.body_as(ModelWeights).losses[0]["loss"] for stored in (plain, mixed)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)
    for a, b in zip(models[0].parameters(), models[2].parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b)
    halved = Workspace(tmp_path / "halved")
    assert load_composition(halved, find_composition(halved, []), recipe())


def test_gradients_add_up_over_passes(apply, tmp_path):
    losses, models = [], []
    for to, size, accumulation in (("split", 2, 2), ("whole", 4, 1)):
        values = ("retain_loss=none", "steps=1", f"batch_size={size}", f"accumulation={accumulation}")
        stored = apply("npo", *[f"methods.npo.{value}" for value in values], to=to)
        losses.append(stored.body_as(ModelWeights).losses[0]["loss"])
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path / to / "model-001"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_both_sides_write(store, recipe, folders):
    (answers,) = generate.run_prompts(recipe("generate.max_new_tokens=6"), store, ["w1 w2 w3"], sources=["model-001"])
    assert set(answers.sides) == {"base", "guarded"} and answers.sides["base"].text != answers.sides["guarded"].text
    assert answers.sides["guarded"].gates == [] and not answers.sides["guarded"].refused


def test_an_interrupted_training_goes_on_bit_for_bit(apply):
    before, calls, steps = signal.getsignal(signal.SIGTERM), [], []
    install()

    def interrupt(what, done, _total):
        calls.append(done)
        if what.startswith("training") and done == 2 and len(calls) < 4:
            os.kill(os.getpid(), signal.SIGTERM)

    def note(what, done, _total):
        steps.extend([done] if what.startswith("training") else [])

    try:
        with pytest.raises(Signalled) as stopped:
            apply("npo", to="a", options=RunOptions(report=interrupt))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.is_kept
    resumed, whole = apply("npo", to="a", options=RunOptions(resume=True, report=note)), apply("npo", to="b")
    assert steps == [3] and resumed.body_as(ModelWeights).losses == whole.body_as(ModelWeights).losses
    assert resumed.header.files == whole.header.files


def test_adapters_are_peft_s_and_merge_into_what_was_trained(store, recipe, folders):
    from peft import PeftModel

    stored = store.find("model", "model-002")
    body, folder = stored.body_as(ModelWeights), store.folder / "model-002"
    names = sorted(path.name for path in folder.iterdir())
    assert body.form == "adapter" and names == ["adapter_config.json", "adapter_model.safetensors"]
    assert base_of(folder) == str(store.folder / "model-001")
    ids = torch.arange(4, 30)[None]
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_of(folder)), folder)
    ours = load_model(str(folder)).model
    torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    cut = load_model(str(folder), last_layer=0)
    assert cut.n_layers == 3 and len(cut.model.model.layers) == 1
    for name, value in cut.model.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name])
    composition = find_composition(store, ["model-002"])
    assert [part["method"] for part in composition.described()] == ["npo", "grad-diff"]
    assert composition.base == str(folders["model"].resolve())


def test_an_adapter_above_the_cut_leaves_what_is_below(recipe, tmp_path, folders):
    stored = method.run_method(recipe("methods.npo.lora=true", "methods.npo.layers=[2]"), Workspace(tmp_path), "npo")
    assert all(".layers.2." in name for name in stored.body_as(ModelWeights).trained["modules"])
    sources = (str(tmp_path / stored.id), str(folders["model"]))
    cut, base = (load_model(source, last_layer=1).model for source in sources)
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in cut.state_dict().items())


def test_a_guardrail_on_changed_weights_is_evaluated_beside_the_first_base(store, recipe, folders):
    composition = find_composition(store, [])
    assert [part["method"] for part in composition.described()] == ["npo", "dsg"]
    assert composition.base == str(folders["model"].resolve()) and composition.model == str(store.folder / "model-001")
    alone = evaluate.run(recipe(), store, sources=["model-001"])
    both = evaluate.run(recipe(), store, sources=["guardrail-001"])
    named = evaluate.run(recipe(), store, sources=["model-001", "guardrail-001"])
    reports = [stored.body_as(EvalReport) for stored in (alone, both, named)]
    assert [len(report.composition) for report in reports] == [1, 2, 2]
    assert reports[0].gate == {} and set(reports[1].gate) == {"mine"}
    assert reports[0].results["mine"]["base"] == reports[1].results["mine"]["base"]
    assert reports[1].results == reports[2].results
    rows = [[json.loads(line) for line in stored.path.with_suffix(".jsonl").open()] for stored in (alone, both)]
    assert [row["base"] for row in rows[0]] == [row["base"] for row in rows[1]]
    assert [row["base"] for row in rows[0]] != [row["unlearned"] for row in rows[0]]
    # Where no gate opened, the guardrail leaves the changed model as it is.
    quiet = [(a, b) for a, b in zip(*rows, strict=True) if not b["gated"]]
    assert all(a["unlearned"] == b["unlearned"] for a, b in quiet)


def test_relearning_begins_on_each_side_from_its_own_weights(store, recipe):
    (stored,) = attack.run(recipe(), store, ["relearn"], sources=["model-001"])
    body = stored.body_as(AttackReport)
    for side in ("unlearned", "base"):
        assert body.curve[0][side]["forget_acc"] == body.before[side]["forget_acc"]
        assert "gate_rate" not in body.curve[0][side]
    losses = [body.curve[1][side]["loss"] for side in ("unlearned", "base")]
    assert losses[0] != losses[1]
    (both,) = attack.run(recipe(), store, ["relearn"], sources=["guardrail-001"])
    assert [part["method"] for part in both.body_as(AttackReport).composition] == ["npo", "dsg"]


def test_attacks_that_mean_nothing_on_weights_are_refused_or_left_out(store, recipe):
    notes = []
    sets = ["paraphrase_benches=[mine]", "dilution_lengths=[0, 2]", "suffix_steps=[0, 1]", "soft_prompt_steps=[0, 1]"]
    sets += ["few_shot_counts=[0, 1]", "suffix_candidates=2", "suffix_tokens=2", "soft_prompt_tokens=2"]
    small, options = recipe(*[f"attack.{item}" for item in sets]), RunOptions(say=notes.append)
    with pytest.raises(DsgError, match="nothing to take off"):
        attack.run(small, store, ["unhook"], sources=["model-001"], options=options)
    attacks = attack.run(small, store, ["all"], sources=["model-001"], options=options)
    kinds = {stored.body_as(AttackReport).attack for stored in attacks}
    assert "unhook" not in kinds and {"relearn", "soft-prompt", "quantize", "probe"} <= kinds
    assert any("unhook is left out" in note for note in notes)
    assert all("gate_rate" not in stored.body_as(AttackReport).curve[0]["unlearned"] for stored in attacks)


def test_what_makes_no_sense_together_is_refused(store, recipe, tmp_path):
    for sources, sets, words in (
        (["model-001", "model-002"], [], "two models"),
        (["model-001", "model-001"], [], "named twice"),
        (["features-001"], [], "unlearns nothing"),
        (["model-002", "guardrail-001"], [], "lower layers have changed"),
        (["model-001"], [f"model.instead={store.folder / 'model-002'}"], "model would put another"),
    ):
        with pytest.raises(DsgError, match=words):
            load_composition(store, find_composition(store, sources), recipe(*sets))
    with pytest.raises(DsgError, match="takes guardrails, not model-001"):
        export.run(recipe(), store, str(tmp_path / "out"), sources=["model-001"])
    for name, source in (("npo", "guardrail-001"), ("static-clamp", "threshold-001")):
        with pytest.raises(DsgError, match=f"cannot go on from {source}"):
            method.run_method(recipe(), store, name, source=source)


def test_a_guarded_model_on_changed_weights_is_exported_with_them(store, recipe, tmp_path):
    exported = export.run(recipe(), store, str(tmp_path / "out"), sources=["guardrail-001"], form="model")
    assert exported.form == "model"
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    changed = AutoModelForCausalLM.from_pretrained(store.folder / "model-001")
    assert torch.equal(whole.get_input_embeddings().weight, changed.get_input_embeddings().weight)
    on_adapter = method.run_method(recipe(), store, "dsg", source="model-002")
    assert isinstance(on_adapter.body, Guardrail)
    with pytest.raises(DsgError, match="is an adapter"):
        export.run(recipe(), store, str(tmp_path / "more"), sources=[on_adapter.id], form="model")


@pytest.mark.parametrize(
    ("name", "sets", "words"),
    [
        ("npo", ["methods.npo.lora=true", "methods.npo.lora_targets=[qq_proj]"], "ends with qq_proj"),
        ("npo", ["methods.npo.layers=[7]"], "there is no layer 7"),
        ("npo", ["methods.npo.learning_rate=1e30"], "before any weights could be kept"),
        ("sspu", ["methods.sspu.lora=true"], "Leave --lora out"),
        ("sspu", ["methods.sspu.n_irrelevant=4000"], "features are irrelevant"),
        ("grad-diff", ["corpora.forget=[]"], "Nothing says what grad-diff should unlearn"),
        ("rmu", ["methods.rmu.layer=9"], "there is no layer"),
        ("sae-representation", ["methods.sae_representation.unknown_file=absent.txt"], "cannot be read"),
        ("static-clamp", ["sae.source=gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_142"], "none is named"),
        ("dsg-2", [], "There is no method named dsg-2"),
    ],
)
def test_bad_input_is_one_error_and_leaves_nothing(name, sets, words, recipe, tmp_path):
    workspace = Workspace(tmp_path)
    with pytest.raises(DsgError) as caught:
        method.run_method(recipe(*sets), workspace, name)
    assert words in str(caught.value)
    assert not workspace.ids("model") and not list(tmp_path.glob(".*.tmp"))


OUT_OF_RANGE = {
    "npo": ["beta=0", "steps=0", "lora_rank=0", "retain_loss=mse"],
    "rmu": ["learning_rate=-1"],
    "scrub": ["temperature=0"],
    "ssd": ["alpha=0"],
    "grad_diff": ["batch_size=0"],
    "sspu": ["n_relevant=0"],
    "finetune": ["epochs=0", "steps=-1", "max_tokens=1", "rows=rows"],
    "static_clamp": ["n_features=0", "max_retain_rate=1.5", "max_retain_rate=.nan", "strength=auto", "strength=0r"],
    "conditional_clamp": ["above=-1", "above=.inf", "strength=-300"],
    "refusal_clamp": ["coefficient=strong", "refusal_feature=-1"],
    "in_context": ["n_forget=0", "n_retain=-1"],
    "input_filter": ["alpha=1", "ridge=0", "n_keywords=0"],
    "output_filter": ["alpha=.nan", "ridge=.inf", "layer=-1"],
}


@pytest.mark.parametrize("item", [f"{section}.{item}" for section, items in OUT_OF_RANGE.items() for item in items])
def test_settings_out_of_range_are_refused_with_the_recipe(item):
    with pytest.raises(DsgError) as error:
        load_recipe(sets=[f"methods.{item}"])
    key, _, value = item.partition("=")
    assert f"methods.{key}" in str(error.value) and value.removeprefix(".") in str(error.value)


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (["nqo.beta=1"], "unknown key methods.nqo"),
        (["finetune.rows=rows"], "methods.finetune.rows is 'rows'; it should be 'documents' or 'packed'"),
        (["finetune.answer_after=''"], "methods.finetune.answer_after is empty"),
        (["finetune.rows=packed", "finetune.answer_after=x"], "methods.finetune: answer_after needs rows=documents"),
        (["prompt.text=' '"], "prompt.text is empty"),
        (["input_filter.refusal=''"], "refusal is empty"),
        (["output_filter.keywords_file=a.txt"], "output_filter: keywords_file is given; set rule=keywords"),
    ],
)
def test_settings_that_make_no_sense_say_why(items, words):
    with pytest.raises(DsgError, match=words):
        load_recipe(sets=[f"methods.{item}" for item in items])


def test_the_command_line(dsg, folders):
    options = ["--model", folders["model"], "--forget", folders["forget.jsonl"], "--retain", folders["retain.jsonl"]]
    small = ["--set", "methods.npo.steps=2", "--set", "methods.npo.accumulation=1", "-w", "ws"]
    code, out, err = dsg("apply", "--method", "npo", *options, *small)
    assert (code, out) == (0, "model-001\n"), err
    code, out, err = dsg("apply", "--method", "npo", "--lora", *options, *small, "--json")
    assert code == 0 and json.loads(out)["form"] == "adapter"
    code, out, _ = dsg("apply", "--method", "npo", *options, *small, "--reuse")
    assert (code, out) == (0, "model-001\n")
    code, out, _ = dsg("show", "model-002", "-w", "ws")
    assert code == 0 and "an adapter of the base model" in out and "free to change" in out
    for arguments, words in (
        (["--method", "ssd", "--lora", *options], "--lora is for methods that train"),
        (["--method", "np", *options], "Did you mean npo"),
        (["--method", "npo", "--export", "out", *options], "npo makes none"),
        (["--method", "npo"], "Nothing says what npo should unlearn"),
        (["--method", "static-clamp", *options], "static-clamp needs an SAE"),
    ):
        code, out, err = dsg("apply", *arguments, "-w", "ws")
        assert code == 1 and words in err and not out, err
    code, out, _ = dsg("ls", "methods")
    assert code == 0 and out.split() == list(METHODS)


ROW = [BOS, 5, 9, 4, 7]
UNUSED = 63


def short_text():
    """Without the last token of the vocabulary."""
    return Watched([[BOS, 4, 5, 6], [BOS, 7, 8], [BOS, 9, 10, 11, 12]], [0] * 3, [1.0], 0, SPECIAL, "cpu")


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items()) and first.keys() == second.keys()


@pytest.mark.parametrize("lora", [False, True])
def test_a_reference_is_the_model_as_it_was(model, lora):
    own = copy.deepcopy(model)
    free = trainable_parameters(own, Training(lora=lora))
    reference = ReferenceWeights(free.parameters)
    with torch.no_grad():
        for parameter in free.parameters:
            parameter.add_(torch.randn_like(parameter))
    now = [parameter.detach().clone() for parameter in free.parameters]
    ids = torch.tensor([ROW])
    changed = own(ids).logits
    with reference():
        inside = own(ids).logits
    assert not inside.requires_grad and own(ids).logits.requires_grad
    torch.testing.assert_close(inside, model(ids).logits, rtol=0, atol=1e-6)
    assert not torch.allclose(changed, inside, atol=0.1)
    with pytest.raises(ZeroDivisionError), reference():
        1 / 0  # noqa: B018
    assert torch.is_grad_enabled() and torch.equal(own(ids).logits, changed)
    assert all(torch.equal(parameter, then) for parameter, then in zip(free.parameters, now, strict=True))
    (own(ids).logits ** 2).sum().backward()
    with reference():  # Gradients that were there stay.
        assert all(parameter.grad is not None for parameter in free.parameters)


def trained(model, breaks, steps, checkpoint=None, stop_after=None):
    """Ascent with a loss that `breaks(loss, own, step)`; what it says, the model, and the weights after each step."""
    own = copy.deepcopy(model)
    kept = [weights(own)]
    settings = Training(steps=steps, batch_size=2, accumulation=1, learning_rate=1e-3)

    def report(_what, done, _total):
        kept.append(weights(own))
        if done == stop_after:
            raise StopIteration

    def loss(batches):
        rows = [ids[mask].tolist() for ids, mask in zip(batches.forget.ids_BL, batches.forget.mask_BL, strict=True)]
        return {"loss": breaks(-nll(own, rows), own, batches.step)}

    job = Job(checkpoint=checkpoint or Checkpoint(), progress=report)
    inputs = TrainingInputs(own, short_text(), short_text(), job=job)
    try:
        return train(inputs, trainable_parameters(own, settings), loss), own, kept
    except DsgError as error:
        return error, own, kept


def every_step(folder):
    checkpoint = Checkpoint(folder / "c")
    checkpoint.interval = 0
    return checkpoint


def broken(kind, at):
    """What goes wrong at a step, from 1."""

    def breaks(loss, own, step):
        embeddings = own.get_input_embeddings().weight
        if kind == "hidden-inf" and step + 1 == at:
            embeddings.data[UNUSED, 0] = torch.inf  # No loss tells it.
        if step + 1 < at or kind == "hidden-inf":
            return loss
        if kind == "gradient":
            return loss + ((embeddings[5, 0] - embeddings[5, 0].detach()) ** 2).sqrt()  # 0, of infinite slope.
        return {"nan": loss * torch.nan, "inf": loss + torch.inf}[kind]

    return breaks


@pytest.mark.parametrize(
    ("kind", "at", "kept_at"),
    [("nan", 12, 10), ("nan", 3, 1), ("inf", 12, 10), ("gradient", 22, 20), ("hidden-inf", 12, 10)],
)
def test_where_training_diverges_the_last_good_weights_are_kept(model, kind, at, kept_at):
    changed, own, kept = trained(model, broken(kind, at), 25)
    assert (changed.diverged_at, changed.kept_at) == (at, kept_at)
    assert [row["step"] for row in changed.losses] == list(range(1, kept_at + 1)) and len(kept) == at
    assert same(weights(own), kept[kept_at]) and not same(kept[kept_at], kept[at - 1])
    assert not any(parameter.requires_grad for parameter in own.parameters())


@pytest.mark.parametrize(("kind", "at"), [("nan", 1), ("gradient", 1), ("inf", 2), ("hidden-inf", 2)])
def test_diverging_before_anything_is_kept_is_an_error_and_changes_nothing(model, kind, at):
    error, own, _ = trained(model, broken(kind, at), 11)
    assert isinstance(error, DsgError) and f"step {at}," in str(error)
    assert same(weights(own), weights(model))


def test_a_training_that_ends_well_says_so(model):
    changed, own, kept = trained(model, lambda loss, *_: loss, 12)
    assert (changed.diverged_at, changed.kept_at, len(changed.losses)) == (None, None, 12)
    assert same(weights(own), kept[12]) and changed.n_changed == own.num_parameters()


def test_what_was_kept_survives_a_resume(model, tmp_path):
    with pytest.raises(StopIteration):
        trained(model, broken("nan", 16), 25, every_step(tmp_path), stop_after=14)
    changed, own, kept = trained(model, broken("nan", 16), 25, Checkpoint(tmp_path / "c", resume=True))
    whole, other, _ = trained(model, broken("nan", 16), 25)
    assert len(kept) == 3 and (changed.diverged_at, changed.kept_at) == (16, 14)
    assert same(weights(own), weights(other)) and changed.losses == whole.losses


RESUMED = [
    ("npo", {"retain_loss": "kl", "warmup_steps": 6}),
    ("npo", {"lora": True}),
    ("scrub", {"last_max_step": 9}),
    ("sspu", {"trained": "all"}),
    ("sae-representation", {}),
    ("grad-diff", {"mixed_precision": "bfloat16", "retain_loss": "kl"}),
    ("finetune", {"warmup_steps": 4}),
    ("finetune", {"lora": True, "mixed_precision": "bfloat16"}),
]


@pytest.mark.parametrize(
    ("method", "options", "after"), [(*case, 6) for case in RESUMED] + [(*RESUMED[0], after) for after in (1, 10)]
)
def test_a_training_goes_on_bit_for_bit(model, tmp_path, method, options, after):
    options = options | {"steps": 11, "batch_size": 2, "accumulation": 1, "learning_rate": 0.01}

    def go(checkpoint, stop_after=None):
        own = copy.deepcopy(model)

        def report(_what, done, _total):
            if done == stop_after:
                raise StopIteration

        forget, job = text(9, 4, 26, 3, 17, seed=1), Job(checkpoint=checkpoint, progress=report)
        inputs = TrainingInputs(own, forget, retain_text(), FEATURES, UNKNOWN, 3, job)
        return unlearn(method, inputs, **options), weights(own)

    with pytest.raises(StopIteration):
        go(every_step(tmp_path), stop_after=after + 1)
    resumed = Checkpoint(tmp_path / "c", resume=True)
    assert resumed.entry("training")["step"] == after
    (changed, resumed_weights), (whole, whole_weights) = go(resumed), go(Checkpoint())
    assert same(resumed_weights, whole_weights) and changed.losses == whole.losses and len(whole.losses) == 11


@pytest.mark.parametrize(
    ("method", "options", "term"),
    [
        ("grad-diff", {"retain_loss": "kl"}, "retain"),
        ("rmu", {}, "retain"),
        ("npo", {"retain_loss": "kl"}, "retain"),
        ("scrub", {"last_max_step": 0}, "retain_kl"),
    ],
)
def test_mixed_precision_changes_no_more_than_digits(model, method, options, term):
    """The model as it was is not computed from weights in bfloat16 that autocast keeps of the model as it is."""
    terms = {}
    for precision in ("none", "bfloat16"):
        own = {"steps": 3, "accumulation": 1, "learning_rate": 0.01, "mixed_precision": precision}
        changed, *_ = run(model, method, own | options, forget_text(), retain_text())
        terms[precision] = [row[term] for row in changed.losses[1:]]
    assert terms["bfloat16"] == pytest.approx(terms["none"], rel=0.2) and min(terms["none"]) > 1e-3


@pytest.mark.parametrize(("warmup", "shares"), [(0, [1] * 6), (1, [1] * 6), (4, [0.25, 0.5, 0.75, 1, 1, 1])])
def test_the_learning_rate_rises_and_stays(model, warmup, shares):
    """Of a gradient that is always the same, AdamW makes steps of the learning rate."""
    own, kept = copy.deepcopy(model), []
    settings = Training(steps=6, learning_rate=0.01, warmup_steps=warmup, weight_decay=0.0, batch_size=1, layers=[0])
    free = trainable_parameters(own, settings)
    job = Job(progress=lambda *_: kept.append(free.parameters[0][0, 0].item()))
    inputs = TrainingInputs(own, short_text(), short_text(), job=job)
    before = free.parameters[0][0, 0].item()
    train(inputs, free, lambda _: {"loss": sum(parameter.sum() for parameter in free.parameters)})
    steps = [a - b for a, b in itertools.pairwise([before, *kept])]
    assert steps == pytest.approx([0.01 * share for share in shares], rel=1e-3)


def test_weights_decay_apart_from_gradients(model):
    own = copy.deepcopy(model)
    settings = Training(steps=3, learning_rate=0.1, weight_decay=0.2, batch_size=1, accumulation=1, layers=[1])
    free = trainable_parameters(own, settings)
    train(TrainingInputs(own, short_text(), short_text()), free, lambda _: {"loss": 0 * free.parameters[0].sum()})
    for name, before in model.named_parameters():
        after = dict(own.named_parameters())[name]
        factor = (1 - 0.1 * 0.2) ** 3 if name == free.names[0] else 1.0
        torch.testing.assert_close(after, before * factor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_every_row_is_drawn_once_before_any_is_twice(seed):
    rows = text(3, 4, 5, 6, 7, 8, 9)
    drawn = rows.draws(31, seed)
    blocks = [drawn[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(block) == list(range(7)) for block in blocks) and len(set(drawn[28:])) == 3
    assert len({tuple(block) for block in blocks}) == 4
    assert drawn == rows.draws(31, seed) and drawn != rows.draws(31, seed + 1)


def test_corpora_are_drawn_by_their_weights():
    two = Watched([[BOS, 5, 6]] * 7, [0, 0, 0, 1, 1, 1, 1], [1.0, 3.0], 0, SPECIAL, "cpu")
    drawn = two.draws(4000, 0)
    first, second = [i for i in drawn if i < 3], [i for i in drawn if i >= 3]
    assert len(second) / 4000 == pytest.approx(0.75, abs=4 * math.sqrt(0.75 * 0.25 / 4000))
    for of_corpus, size in ((first, 3), (second, 4)):
        assert all(len(set(of_corpus[i : i + size])) == size for i in range(0, len(of_corpus) - size, size))
        assert max(Counter(of_corpus).values()) - min(Counter(of_corpus).values()) <= 1
    assert set(Watched([[5, 6]] * 4, [0, 0, 1, 1], [1.0, 0.0], 0, SPECIAL, "cpu").draws(50, 0)) == {0, 1}


def test_retain_text_is_drawn_in_an_order_of_its_own(model):
    forget, retain = text(*[5] * 6), text(*[5] * 6)
    run(model, "gradient-ascent", {"steps": 3, "batch_size": 2, "accumulation": 2}, forget, retain)
    assert len(forget.drawn[0]) == len(retain.drawn[0]) == 12 and forget.drawn != retain.drawn
    assert [batch.index for batch in forget.batches] == [tuple(forget.drawn[0][i : i + 2]) for i in range(0, 12, 2)]


PASSES = [
    # Method, settings; of forget and of retain text per batch: forward, backward.
    ("gradient-ascent", {}, (1, 1), (0, 0)),
    ("finetune", {}, (1, 1), (0, 0)),
    ("grad-diff", {"retain_loss": "none"}, (1, 1), (0, 0)),
    ("grad-diff", {"retain_loss": "nll"}, (1, 1), (1, 1)),
    ("grad-diff", {"retain_loss": "kl", "lora": True}, (1, 1), (2, 1)),
    ("npo", {}, (1, 1), (1, 1)),
    ("rmu", {}, (1, 1), (2, 1)),
    ("sspu", {}, (1, 1), (2, 1)),
    ("scrub", {"last_max_step": 9, "min_steps": 0}, (2, 1), (0, 0)),
    ("scrub", {"last_max_step": 0}, (0, 0), (2, 1)),
    ("sae-representation", {}, (2, 1), (2, 1)),
]


@pytest.mark.parametrize(("method", "options", "forget_passes", "retain_passes"), PASSES)
def test_passes_and_tokens_are_counted(model, method, options, forget_passes, retain_passes):
    own, cost, forget, retain = copy.deepcopy(model), Cost(), forget_text(), retain_text()
    options = options | {"steps": 2, "batch_size": 2, "accumulation": 2}
    with count_passes(own, cost):
        unlearn(method, TrainingInputs(own, forget, retain, FEATURES, UNKNOWN), **options)
    tokens = [
        sum(2 * max(len(rows.rows[j]) for j in rows.drawn[0][i : i + 2]) for i in range(0, 8, 2))
        for rows in (forget, retain)
    ]
    expected = {}
    for way, forgets, retains in zip(("forward", "backward"), forget_passes, retain_passes, strict=True):
        expected[f"{way}_passes"] = 4 * (forgets + retains)
        expected[f"{way}_tokens"] = forgets * tokens[0] + retains * tokens[1]
    if method == "npo":  # Each row as the model was, once.
        expected["forward_passes"] += len(set(forget.drawn[0]))
        expected["forward_tokens"] += sum(len(forget.rows[i]) for i in set(forget.drawn[0]))
    if method == "sae-representation":  # The mean of unknown text; whether the first rows look different.
        expected["forward_passes"] += 2
        expected["forward_tokens"] += sum(len(rows.rows) * max(map(len, rows.rows)) for rows in (UNKNOWN, forget))
    assert cost.as_json() == expected
    own(torch.tensor([ROW]))
    assert cost.as_json() == expected  # Nothing counts on.


def test_the_cost_of_dampening_is_a_pass_a_row(model):
    own, cost, forget, retain = copy.deepcopy(model), Cost(), forget_text(), retain_text()
    with count_passes(own, cost):
        unlearn("ssd", TrainingInputs(own, forget, retain))
    n_tokens = sum(map(len, forget.rows + retain.rows))
    assert cost == Cost(11, 11, n_tokens, n_tokens)


GRID = {"beta": [1, 2, 3], "steps": [10, 20], "eval.limit": [5]}

POINTS = [
    {"methods.npo.beta": beta, "methods.npo.steps": steps, "eval.limit": 5} for beta in (1, 2, 3) for steps in (10, 20)
]


@pytest.mark.parametrize("budget", [1, 4, 6, 100])
def test_trials_are_points_of_the_grid_within_budget(budget):
    section = CompareSection(budget=budget, grids={"npo": GRID, "sae-representation": {"steps": [7]}})
    drawn = [settings_to_try("npo", section, seed) for seed in range(20)]
    for number, trials in enumerate(drawn):
        assert trials == [point for point in POINTS if point in trials] and len(trials) == min(budget, 6)
        assert trials == settings_to_try("npo", section, number)
    assert (len({str(trials) for trials in drawn}) > 1) == (budget < 6)
    assert settings_to_try("rmu", section, 0) == [{}]
    assert settings_to_try("sae-representation", section, 0) == [{"methods.sae_representation.steps": 7}]


@pytest.mark.parametrize(
    ("unlearned", "base", "forgetting", "utility"),
    [
        ({"f": 0.5, "a": 0.8, "b": 0.6}, {"f": 0.9, "a": 0.7, "b": 0.8}, 0.4 / 0.65, (1 + 0.75) / 2),
        ({"f": 0.95, "a": 0.35}, {"f": 0.9, "a": 0.7}, 0.0, 0.5),
        ({"f": 0.1, "a": 0.7}, {"f": 0.9, "a": 0.7}, 1.0, 1.0),
        ({"f": 0.25, "a": 0.0}, {"f": 0.9, "a": 0.7}, 1.0, 0.0),
        ({"f": 0.1, "a": 0.7}, {"f": 0.2, "a": 0.7}, 0.0, 1.0),
        ({"f": 0.9, "a": 0.0}, {"f": 0.9, "a": 0.7}, 0.0, 0.0),
        ({"f": 0.25, "a": 0.3, "b": 0.2}, {"f": 0.75, "a": 0.0, "b": 0.4}, 1.0, 0.5),
        ({"f": 0.25}, {"f": 0.75}, 1.0, 1.0),
    ],
)
def test_trials_are_judged(unlearned, base, forgetting, utility):
    score = 2 / (1 / forgetting + 1 / utility) if forgetting and utility else 0.0
    expected = {"forgetting": forgetting, "utility": utility, "score": score}
    assert unlearning_score("f", unlearned, base, 0.25) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("scores", "best"), [([None, 0.3, 0.5, 0.5], 2), ([0.0, None], 0), ([None, None], None), ([], None)]
)
def test_the_best_trial_is_the_first_of_those_with_the_highest_score(scores, best):
    assert best_trial([{"score": score} for score in scores]) == best
