"""Methods that change weights, as a user runs them: artifacts, adapters, what composes, and what is refused."""

import json
import os
import signal

import pytest
import torch
from conftest import write_task
from dsg_cli.adapters import base_of
from dsg_cli.artifacts import AttackReport, EvalReport, Guardrail, ModelWeights
from dsg_cli.interruption import Signalled, install
from dsg_cli.methods.names import METHODS, section_of
from dsg_cli.model import load_model
from dsg_cli.stages.chain import settle
from dsg_cli.stages.session import Session
from dsg_cli.stages.subject import find_subject, load_subject
from transformers import AutoModelForCausalLM

from dsg_cli.errors import DsgError
from dsg_cli.recipe import load_recipe
from dsg_cli.stages import attack, evaluate, export, generate, method, select, verify
from dsg_cli.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")
TRAINED = [name for name, one in METHODS.items() if one.is_trained]
WEIGHTS = [name for name, one in METHODS.items() if one.form == "model"]  # And what teaches.
SMALL = [
    *("methods.sspu.n_relevant=4", "methods.sspu.n_irrelevant=4", "methods.ssd.n_rows=8", "methods.ssd.alpha=1"),
    *("methods.ssd.dampening=0.5", "select.n_features=4", "select.ratio_percentile=50", "eval.benches=[mine]"),
    *("guardrail.allow_ineffective=true", "calibrate.gate=window", "calibrate.lengths=[4, 20]", "calibrate.alpha=0.2"),
    *("calibrate.n_detectors=2", "calibrate.detector_percentile=50", "attack.bench=mine", "attack.known_questions=4"),
    *("attack.relearn_learning_rates=[1e-2]", "attack.relearn_steps=[0, 2]"),
]
QUESTIONS = [{"q": f"w{i} w{i + 1}", "c": [" w40", " w41", " w42", " w43"], "a": i % 4} for i in range(24)]


@pytest.fixture(scope="module")
def recipe(folders, tmp_path_factory):
    tasks = tmp_path_factory.mktemp("tasks")
    write_task(tasks, QUESTIONS)

    names = [f"corpora.{role}=[{folders[f'{role}.jsonl']}]" for role in ("forget", "retain")]
    named = [*names, f"model.source={folders['model']}", f"sae.source={folders['sae']}", f"eval.include_path={tasks}"]
    named.append(f"methods.finetune.corpora=[{folders['retain.jsonl']}]")
    for name in TRAINED:
        values = ("steps=3", "accumulation=1", "learning_rate=1e-2")
        named += [f"methods.{section_of(name)}.{value}" for value in values]
    (tasks / "unknown.txt").write_text("\n".join(" ".join(f"w{i + j}" for j in range(12)) for i in range(30, 46)))
    named.append(f"methods.sae_representation.unknown_file={tasks / 'unknown.txt'}")

    def make(*sets):
        return settle(load_recipe(sets=[*named, *SMALL, *sets]))

    return make


@pytest.fixture(scope="module")
def made(recipe, tmp_path_factory):
    """A workspace with two models: by npo, and by an adapter on top of that; and a guardrail on the first."""
    workspace = Workspace(tmp_path_factory.mktemp("made"))
    select.run(recipe(), workspace)
    method.run(recipe(), workspace, "npo", source="features-001")  # As the SAE reads text: with BOS.
    method.run(recipe("methods.grad_diff.lora=true"), workspace, "grad-diff", source="model-001")
    method.run(recipe(), workspace, "dsg", source="model-001")
    return workspace


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_method_leaves_a_model_that_anyone_can_load(name, recipe, folders, tmp_path):
    workspace = Workspace(tmp_path)
    stored = method.run(recipe(), workspace, name)
    body = stored.body_as(ModelWeights)
    assert body.method == name and body.form == "whole" and stored.header.settings["method"] == name
    assert len(body.losses) == (3 if name in TRAINED else 0) and body.diverged_at is None
    assert body.cost["forward_passes"] >= body.cost["backward_passes"] > 0
    assert bool(body.features) == METHODS[name].needs_sae == (stored.header.sae is not None)
    changed = AutoModelForCausalLM.from_pretrained(tmp_path / stored.id)
    base = AutoModelForCausalLM.from_pretrained(folders["model"])
    ids = torch.arange(4, 30)[None]
    assert not torch.equal(changed(input_ids=ids).logits, base(input_ids=ids).logits)
    own = load_subject(workspace, find_subject(workspace, []), recipe())
    assert torch.equal(own.model.model(input_ids=ids).logits, changed(input_ids=ids).logits)
    assert torch.equal(own.base.model(input_ids=ids).logits, base(input_ids=ids).logits)
    moved = {
        name
        for (name, one), other in zip(changed.state_dict().items(), base.state_dict().values(), strict=True)
        if not torch.equal(one, other)
    }
    assert {one.rpartition(".")[0] for one in moved} <= set(body.trained["modules"])
    assert all(finding.state == "ok" for finding in verify.run(workspace))


def test_the_same_seed_gives_the_same_weights_and_another_does_not(recipe, tmp_path):
    digests = []
    for number, seed in enumerate((0, 0, 1)):
        stored = method.run(recipe(f"seed={seed}"), Workspace(tmp_path / str(number)), "npo")
        digests.append(stored.header.files["model-001/model.safetensors"])
    assert digests[0] == digests[1] != digests[2]


def test_half_precision_is_for_passes_or_files_and_adds_up_in_full(recipe, tmp_path):
    plain, mixed, _ = (
        method.run(recipe(*sets), Workspace(tmp_path / name), "npo")
        for name, sets in (
            ("plain", []),
            ("mixed", ["methods.npo.mixed_precision=bfloat16"]),
            ("halved", ["methods.npo.save_dtype=bfloat16"]),
        )
    )
    weights = {
        name: AutoModelForCausalLM.from_pretrained(tmp_path / name / "model-001", dtype="auto")
        for name in ("plain", "mixed", "halved")
    }
    assert {name: one.dtype for name, one in weights.items()} == {
        "plain": torch.float32,
        "mixed": torch.float32,
        "halved": torch.bfloat16,
    }
    losses = [stored.body_as(ModelWeights).losses[0]["loss"] for stored in (plain, mixed)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)
    for a, b in zip(weights["plain"].parameters(), weights["halved"].parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b)
    assert load_subject(Workspace(tmp_path / "halved"), find_subject(Workspace(tmp_path / "halved"), []), recipe())


def test_gradients_add_up_over_passes(recipe, tmp_path):
    sets = ["methods.npo.retain_loss=none", "methods.npo.steps=1"]
    split = [*sets, "methods.npo.batch_size=2", "methods.npo.accumulation=2"]
    whole = [*sets, "methods.npo.batch_size=4", "methods.npo.accumulation=1"]
    one, other = (
        method.run(recipe(*chosen), Workspace(tmp_path / name), "npo").body_as(ModelWeights)
        for name, chosen in (("split", split), ("whole", whole))
    )
    assert one.losses[0]["loss"] == pytest.approx(other.losses[0]["loss"], rel=1e-5)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name / "model-001") for name in ("split", "whole")]
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_both_sides_write(made, recipe, folders):
    (answers,) = generate.run(recipe("generate.max_new_tokens=6"), made, ["w1 w2 w3"], sources=["model-001"])
    assert set(answers.sides) == {"base", "guarded"} and answers.sides["base"].text != answers.sides["guarded"].text
    assert answers.sides["guarded"].gates == [] and not answers.sides["guarded"].refused


def test_an_interrupted_training_goes_on_bit_for_bit(recipe, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    install()
    calls = []

    def interrupt(what, done, _total):
        calls.append(done)
        if what.startswith("training") and done == 2 and len(calls) < 4:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        with pytest.raises(Signalled) as stopped:
            method.run(recipe(), Workspace(tmp_path / "a"), "npo", session=Session(report=interrupt))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.is_kept
    done = []

    def note(what, n, _total):
        if what.startswith("training"):
            done.append(n)

    session = Session(resume=True, report=note)
    resumed = method.run(recipe(), Workspace(tmp_path / "a"), "npo", session=session)
    whole = method.run(recipe(), Workspace(tmp_path / "b"), "npo")
    assert done == [3] and resumed.body_as(ModelWeights).losses == whole.body_as(ModelWeights).losses
    assert resumed.header.files == whole.header.files


def test_adapters_are_peft_s_and_merge_into_what_was_trained(made, recipe, folders):
    from peft import PeftModel

    stored = made.find("model", "model-002")
    body, folder = stored.body_as(ModelWeights), made.folder / "model-002"
    assert body.form == "adapter" and sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert base_of(folder) == str(made.folder / "model-001")
    ids = torch.arange(4, 30)[None]
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_of(folder)), folder)
    ours = load_model(str(folder)).model
    torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    cut = load_model(str(folder), last_layer=0)
    assert cut.n_layers == 3 and len(cut.model.model.layers) == 1
    for name, value in cut.model.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name])
    subject = find_subject(made, ["model-002"])
    assert [one["method"] for one in subject.composition()] == ["npo", "grad-diff"]
    assert subject.base == str(folders["model"].resolve())


def test_an_adapter_above_the_cut_leaves_what_is_below(recipe, tmp_path, folders):
    stored = method.run(recipe("methods.npo.lora=true", "methods.npo.layers=[2]"), Workspace(tmp_path), "npo")
    assert all(".layers.2." in name for name in stored.body_as(ModelWeights).trained["modules"])
    sources = (str(tmp_path / stored.id), str(folders["model"]))
    cut, base = (load_model(source, last_layer=1).model for source in sources)
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in cut.state_dict().items())


def test_a_guardrail_on_changed_weights_is_evaluated_beside_the_first_base(made, recipe, folders):
    subject = find_subject(made, [])
    assert [one["method"] for one in subject.composition()] == ["npo", "dsg"]
    assert subject.base == str(folders["model"].resolve()) and subject.model == str(made.folder / "model-001")
    alone = evaluate.run(recipe(), made, sources=["model-001"])
    both = evaluate.run(recipe(), made, sources=["guardrail-001"])
    named = evaluate.run(recipe(), made, sources=["model-001", "guardrail-001"])
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


def test_relearning_begins_on_each_side_from_its_own_weights(made, recipe):
    (stored,) = attack.run(recipe(), made, ["relearn"], sources=["model-001"])
    body = stored.body_as(AttackReport)
    for side in ("guarded", "unguarded"):
        assert body.curve[0][side]["forget_acc"] == body.before[side]["forget_acc"]
        assert "gate_rate" not in body.curve[0][side]
    losses = [body.curve[1][side]["loss"] for side in ("guarded", "unguarded")]
    assert losses[0] != losses[1]
    (both,) = attack.run(recipe(), made, ["relearn"], sources=["guardrail-001"])
    assert [one["method"] for one in both.body_as(AttackReport).composition] == ["npo", "dsg"]


@pytest.mark.parametrize(
    ("kinds", "words"), [(["unhook"], "nothing to take off"), (["all"], None)], ids=["unhook", "all"]
)
def test_attacks_that_mean_nothing_on_weights_are_refused_or_left_out(made, recipe, kinds, words, monkeypatch):
    said = []
    session = Session(say=said.append)
    sets = ["attack.paraphrase_benches=[mine]", "attack.dilution_lengths=[0, 2]", "attack.suffix_steps=[0, 1]"]
    sets += ["attack.soft_prompt_steps=[0, 1]", "attack.few_shot_counts=[0, 1]", "attack.suffix_candidates=2"]
    sets += ["attack.suffix_tokens=2", "attack.soft_prompt_tokens=2"]
    if words:
        with pytest.raises(DsgError, match=words):
            attack.run(recipe(*sets), made, kinds, sources=["model-001"], session=session)
        return
    stored = attack.run(recipe(*sets), made, kinds, sources=["model-001"], session=session)
    kinds_made = [one.body_as(AttackReport).attack for one in stored]
    assert "unhook" not in kinds_made and {"relearn", "soft-prompt", "quantize", "probe"} <= set(kinds_made)
    assert any("unhook is left out" in text for text in said)
    for one in stored:
        point = one.body_as(AttackReport).curve[0]
        assert "gate_rate" not in point["guarded"]


def test_what_makes_no_sense_together_is_refused(made, recipe, tmp_path):
    for sources, words in (
        (["model-001", "model-002"], "two models"),
        (["model-001", "model-001"], "named twice"),
        (["features-001"], "unlearns nothing"),
        (["model-002", "guardrail-001"], "lower layers have changed"),
    ):
        with pytest.raises(DsgError, match=words):
            load_subject(made, find_subject(made, sources), recipe())
    with pytest.raises(DsgError, match="takes guardrails, not model-001"):
        export.run(recipe(), made, str(tmp_path / "out"), sources=["model-001"])
    with pytest.raises(DsgError, match="cannot go on from guardrail-001"):
        method.run(recipe(), made, "npo", source="guardrail-001")
    with pytest.raises(DsgError, match="cannot go on from threshold-001"):
        method.run(recipe(), made, "static-clamp", source="threshold-001")
    with pytest.raises(DsgError, match="model would put another"):
        load_subject(made, find_subject(made, ["model-001"]), recipe(f"model.instead={made.folder / 'model-002'}"))


def test_a_guarded_model_on_changed_weights_is_exported_with_them(made, recipe, tmp_path):
    exported = export.run(recipe(), made, str(tmp_path / "out"), sources=["guardrail-001"], form="model")
    assert exported.form == "model"
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    changed = AutoModelForCausalLM.from_pretrained(made.folder / "model-001")
    assert torch.equal(whole.get_input_embeddings().weight, changed.get_input_embeddings().weight)
    on_adapter = method.run(recipe(), made, "dsg", source="model-002")
    assert isinstance(on_adapter.body, Guardrail)
    with pytest.raises(DsgError, match="is an adapter"):
        export.run(recipe(), made, str(tmp_path / "more"), sources=[on_adapter.id], form="model")


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
        method.run(recipe(*sets), workspace, name)
    assert words in str(caught.value)
    assert not workspace.ids("model") and not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("npo.beta=0", "methods.npo.beta"),
        ("npo.steps=0", "methods.npo.steps"),
        ("rmu.learning_rate=-1", "methods.rmu.learning_rate"),
        ("scrub.temperature=0", "methods.scrub.temperature"),
        ("ssd.alpha=0", "methods.ssd.alpha"),
        ("grad_diff.batch_size=0", "methods.grad_diff.batch_size"),
        ("sspu.n_relevant=0", "methods.sspu.n_relevant"),
        ("npo.lora_rank=0", "methods.npo.lora_rank"),
        ("npo.retain_loss=mse", "methods.npo.retain_loss"),
        ("nqo.beta=1", "unknown key methods.nqo"),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_runs(key, words):
    with pytest.raises(DsgError, match=words.replace(".", r"\.")):
        load_recipe(sets=[f"methods.{key}"])


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
