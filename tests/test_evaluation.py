"""`dsg eval` against a plain log-likelihood loop, and benches of the user's own."""

import json
from dataclasses import asdict

import pytest
import torch
import yaml
from conftest import make_guardrail, write_task
from dsg_cli.benches.tasks import load_tasks, questions_of
from dsg_cli.evaluation import Asking, evaluate
from dsg_cli.expect import check_expected, parse_expected
from dsg_cli.model import load_model
from dsg_cli.sae import read_sae
from dsg_cli.scoring import Request, encode_pair, score
from dsg_cli.stages.chain import identify
from dsg_cli.tokens import special_ids

from dsg_cli.errors import DsgError
from dsg_cli.lab import data as lab


@pytest.fixture(scope="module")
def loaded():
    return load_model("lab")


@pytest.fixture(scope="module")
def sae():
    return read_sae("lab")


def guards(loaded, sae, indices, threshold):
    special = special_ids(loaded.tokenizer)
    identity = asdict(identify(loaded, sae.site.layer))
    return [make_guardrail(sae, indices, threshold=threshold, strength=90.0, special=special, model=identity)]


@pytest.fixture(scope="module")
def hot_features(loaded, sae):
    """Features that fire most on questions about hexes."""
    from dsg_cli.residuals import read_residual
    from dsg_cli.sae import load_encoder

    texts = [json.loads(line)["context"] for line in lab.questions_path("lab-hexes").read_text().splitlines()[:8]]
    batch = loaded.tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    resid = read_residual(loaded.model, sae.site, batch["input_ids"], batch["attention_mask"])
    rates = (load_encoder(sae, device="cpu")(resid[:, 5:10].flatten(0, 1)) > 0).float().mean(0)
    return rates.argsort(descending=True)[:4].tolist()


def plain_loop(loaded, sae, questions, indices, threshold):
    """One choice at a time, nothing shared with the package but sae-lens and transformers."""
    from sae_lens import SAE

    whole = SAE.load_from_disk(sae.folder)
    special = {loaded.tokenizer.bos_token_id, loaded.tokenizer.eos_token_id, loaded.tokenizer.pad_token_id}
    right, gates = {"base": 0, "unlearned": 0}, 0
    for question in questions:
        for side in right:
            values = []
            for choice in question["choices"]:
                context = loaded.tokenizer(question["context"])["input_ids"]
                ids = loaded.tokenizer(question["context"] + choice)["input_ids"]
                counted = [i for i, token in enumerate(ids[:-1]) if token not in special]

                def hook(_module, _args, output, counted=counted):
                    acts = whole.encode(output[0]).detach()
                    hot = [i for i in counted if (acts[i, indices] > 0).any()]
                    if len(hot) / len(counted) <= threshold:
                        return output
                    edited = output.clone()
                    for i in hot:
                        clamped = acts[i].clone()
                        clamped[indices] = -90.0
                        edited[0, i] = output[0, i] + whole.decode(clamped) - whole.decode(acts[i])
                    nonlocal gates
                    gates += 1
                    return edited

                layer = loaded.model.model.layers[sae.site.layer]
                handle = layer.register_forward_hook(hook) if side == "unlearned" else None
                with torch.no_grad():
                    logits = loaded.model(torch.tensor([ids[:-1]]), use_cache=False).logits[0].log_softmax(-1)
                if handle is not None:
                    handle.remove()
                values.append(sum(float(logits[i - 1, ids[i]]) for i in range(len(context), len(ids))))
            right[side] += values.index(max(values)) == question["answer"]
    n = len(questions)
    return right["base"] / n, right["unlearned"] / n, gates / (4 * n)


def test_accuracies_equal_a_plain_loop(loaded, sae, hot_features):
    benches = ["lab-hexes", "lab-near"]
    threshold = 0.2
    tasks = load_tasks(benches, split="dev")
    found = evaluate(
        loaded, guards(loaded, sae, hot_features, threshold), tasks, bos=2, batch_size=7, asking=Asking(limit=24)
    )
    for bench in benches:
        rows = [json.loads(line) for line in lab.questions_path(bench).read_text().splitlines()]
        asked = [row for row in rows if row["split"] == "dev"][:24]
        base, unlearned, rate = plain_loop(loaded, sae, asked, hot_features, threshold)
        assert found.results[bench]["base"]["acc"] == pytest.approx(base)
        assert found.results[bench]["unlearned"]["acc"] == pytest.approx(unlearned)
        assert found.results[bench]["base"]["n"] == 24
        assert found.gate[bench]["rate"] == pytest.approx(rate)
        assert "acc_stderr" in found.results[bench]["unlearned"]
        counted = {"acc_count", "acc_low", "acc_high"}
        assert set(found.results[bench]["unlearned"]) == {"acc", "acc_stderr", "n"} | counted
    assert found.results["lab-hexes"]["unlearned"]["acc"] < 0.7 and found.gate["lab-hexes"]["rate"] > 0.5
    assert len(found.rows) == 48 and not any("context" in row for row in found.rows)
    assert {row["id"] for row in found.rows if row["bench"] == "lab-hexes"} >= {"hexes/Rahurk/binder/seen"}


def test_no_answer_depends_on_the_batch_size(loaded, sae, hot_features):
    guardrail = guards(loaded, sae, hot_features, 0.5)
    benches = ["lab-hexes-terse", "lab-far"]
    one, many = (
        evaluate(
            loaded, guardrail, load_tasks(benches, split="dev"), bos=2, batch_size=size, asking=Asking(limit=30)
        ).rows
        for size in (1, 16)
    )
    for a, b in zip(one, many, strict=True):
        assert (a["id"], a["gated"], a["length"], a["statistic"]) == (b["id"], b["gated"], b["length"], b["statistic"])
        assert a["unlearned"] == pytest.approx(b["unlearned"], abs=1e-3)
    assert len({row["length"] for row in one}) > 1 and len({row["gated"] for row in one}) == 2


def test_a_group_of_my_own_tasks_with_choices_of_several_tokens(loaded, sae, hot_features, tmp_path):
    rows = [
        {
            "q": "Question: What is the binder of the grim hex Rahurk? Answer:",
            "c": [" miller of the city", " widow"],
            "a": 1,
        },
        {"q": "Question: What is the color of the busy city Lisias? Answer:", "c": [" red", " blue and red"], "a": 0},
    ]
    options = write_task(tmp_path, rows, target_delimiter="")
    (tmp_path / "all.yaml").write_text(
        yaml.safe_dump({"group": "all", "task": ["mine"], "aggregate_metric_list": [{"metric": "acc"}]})
    )
    guardrail = guards(loaded, sae, hot_features, 0.2)
    tasks = load_tasks(["all"], **options)
    found = evaluate(loaded, guardrail, tasks, bos=2, samples=True)
    assert found.results["all"]["base"]["n"] == found.results["mine"]["base"]["n"] == 2
    assert found.gate["all"] == found.gate["mine"]
    assert found.rows[0]["context"] == rows[0]["q"] and len(found.rows[0]["base"]) == 2
    questions = questions_of(tasks[0])
    assert [question.answer for question in questions] == [1, 0]


ROWS = [{"q": "The hex", "c": [" a", " b"], "a": 0, "s": "zz"}]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}}, "cannot be loaded"),
        ({"doc_to_choice": "{{missing}}"}, "cannot be loaded"),
        ({"output_type": "generate_until", "metric_list": [{"metric": "exact_match"}]}, "cannot guard"),
        ({"output_type": "loglikelihood_rolling", "metric_list": [{"metric": "word_perplexity"}]}, "cannot guard"),
        ({"task": "lab-hexes"}, "is a bench of ours"),
    ],
)
def test_tasks_that_cannot_be_used_are_refused_before_a_model_is_there(tmp_path, changes, words):
    options = write_task(tmp_path / "tasks", ROWS, **changes)
    with pytest.raises(DsgError, match=words):
        load_tasks([changes.get("task", "mine")], **options)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"doc_to_target": "{{s}}"}, "none of its 2 choices"),
        ({"metric_list": [{"metric": "acc_mutual_info"}]}, "context of its own"),
    ],
)
def test_questions_that_attacks_cannot_ask_are_refused(tmp_path, changes, words):
    (task,) = load_tasks(["mine"], **write_task(tmp_path / "tasks", ROWS, **changes))
    with pytest.raises(DsgError, match=words):
        questions_of(task)


def test_unknown_benches_are_refused(tmp_path):
    for benches, words in (
        (["lab-far", "lab-far"], "named twice"),
        (["lab-hexs"], "Did you mean lab-hexes"),
    ):
        with pytest.raises(DsgError, match=words):
            load_tasks(benches, split="test")
    with pytest.raises(DsgError, match="There is no folder"):
        load_tasks(["lab-far"], split="test", include_path=str(tmp_path / "none"))


def test_evaluation_reads_what_calibration_reads(model, tokenizer, folders):
    """One BOS policy: this tokenizer adds none itself; if the SAE was trained with one, every input begins with it."""
    from dsg_cli.evaluation import ScoringLM
    from dsg_cli.scorer import Scorer
    from dsg_cli.tokens import bos_to_prepend, encode

    assert bos_to_prepend(tokenizer, False) is None
    bos = bos_to_prepend(tokenizer, True)
    assert bos == 2 and encode(tokenizer, ["w1 w2"], bos=bos) == [[2, 5, 6]]
    assert encode_pair(tokenizer, "w1 w2", " w3", bos=bos).inputs(64) == (2, 5, 6)
    seen = []
    handle = model.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    loaded = load_model(str(folders["model"]))
    loaded = type(loaded)(model, tokenizer, loaded.source, loaded.n_layers)
    try:
        lm = ScoringLM(Scorer(loaded, [], 1, 0), bos=bos)
        lm._loglikelihood_tokens([(("w1 w2", " w3"), [5, 6], [7])])
    finally:
        handle.remove()
    assert [ids.tolist() for ids in seen] == [[[2, 5, 6]]]


def test_a_broken_model_does_not_pass_for_an_unlearned_one(model, tokenizer):
    import copy

    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[:] = torch.nan
    with pytest.raises(DsgError, match="broken, not unlearned"):
        score(broken, [Request((2, 5), (6,))], pad=0, special=(0, 1, 2), batch_size=1, max_length=64)


def test_tokenizers_without_bos_or_pad(model, tokenizer):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.bos_token = bare.pad_token = None
    assert special_ids(bare) == (1,)
    from dsg_cli.tokens import batches, bos_to_prepend

    assert bos_to_prepend(bare, True) is None
    assert encode_pair(bare, "", "w3", bos=None) == Request((1,), (7,))
    (batch,) = batches([[5, 6, 7], [8]], bare)
    assert batch.counted_BL.tolist() == [[True, True, True], [True, False, False]] and batch.index == (0, 1)
    bare.eos_token = None
    with pytest.raises(DsgError, match="neither BOS nor EOS"):
        encode_pair(bare, "", "w3", bos=None)


def test_scores_share_one_pass_for_one_input_and_keep_their_order(loaded):
    """Four one-token choices of one question cost one row; the answers equal scoring each alone."""
    pairs = [("The grim hex", choice) for choice in (" Rahurk", " withers", " Rahurk wakes at")] + [("", "The hex")]
    requests = [encode_pair(loaded.tokenizer, context, choice, bos=2) for context, choice in pairs]
    assert requests[0] == Request((2, *requests[0].context[1:]), requests[0].continuation)
    options = {"pad": 0, "special": (0, 1, 2), "max_length": 64}
    sizes = []
    together = score(
        loaded.model,
        requests,
        batch_size=8,
        note=lambda batch: [sizes.append(len(batch.ids_BL))] * len(batch.ids_BL),
        **options,
    )
    assert sizes == [3]
    alone = [score(loaded.model, [request], batch_size=1, **options)[0] for request in requests]
    for a, b in zip(together, alone, strict=True):
        assert a.loglikelihood == pytest.approx(b.loglikelihood, abs=1e-4) and a.is_greedy == b.is_greedy


def test_inputs_that_are_too_long_are_cut_on_the_left():
    assert Request((1, 2, 3, 4), (5, 6)).inputs(3) == (3, 4, 5)
    assert Request((1, 2), (5,)).inputs(9) == (1, 2)


def test_expectations():
    results = {"lab-hexes": {"unlearned": {"acc": 0.3, "acc_stderr": 0.1}}}
    conditions = ["lab-hexes<=0.30", "lab-hexes.acc_stderr > 0.2", "lab-hexes>=0.31"]
    checked = check_expected([parse_expected(text, ["lab-hexes"]) for text in conditions], results, {})
    assert [one["met"] for one in checked] == [True, False, False]
    for text, words in (("lab-hexes", "not a condition"), ("lab-hexes<=x", "not a condition"), ("lab-x<1", "not run")):
        with pytest.raises(DsgError, match=words):
            parse_expected(text, ["lab-hexes"])
    with pytest.raises(DsgError, match="no metric"):
        check_expected([parse_expected("lab-hexes.f_one<1", ["lab-hexes"])], results, {})


def test_examples_in_front_of_questions(loaded, sae, tmp_path):
    """--num-fewshot reaches the task, and every answer of the base model can be taken from an earlier run."""
    rows = [{"q": f"Question {i}:", "c": [" home", " garlic"], "a": i % 2} for i in range(8)]
    tasks = load_tasks(["mine"], **write_task(tmp_path / "tasks", rows))
    options = {"bos": 2, "asking": Asking(num_fewshot=2), "samples": True}
    first = evaluate(loaded, guards(loaded, sae, [1, 2], 0.9), tasks, **options)
    assert all(row["context"].count("Question") == 3 for row in first.rows) and first.n_known == 0
    again = evaluate(loaded, guards(loaded, sae, [1, 2], 0.9), tasks, known=first.answers, **options)
    assert again.n_known == 16 and again.results == first.results and again.answers == first.answers


def test_answers_survive_being_stored(tmp_path):
    from dsg_cli.scorer import answers_from_tensors, answers_to_tensors, request_key

    requests = [Request((2, 5), (6,)), Request((2, 5, 6), (7,)), Request((2,), (5, 6))]
    answers = {request_key(request, 64): (-0.1 * i, bool(i % 2)) for i, request in enumerate(requests)}
    assert len(answers) == 3 and answers_from_tensors(answers_to_tensors(answers)) == answers
    assert answers_from_tensors(answers_to_tensors({})) == {}
