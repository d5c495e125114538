"""`dsg eval` against a plain log-likelihood loop, and benches of the user's own."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
import re
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import make_guardrail, make_sae, watched, write_task
from sae_lens import SAE
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dsg_cli.data.batches import batches
from dsg_cli.data.tokens import Request, bos_to_prepend, encode, encode_pair, special_ids
from dsg_cli.errors import DsgError
from dsg_cli.evals import paper_protocol as paper
from dsg_cli.evals.benches import load_tasks
from dsg_cli.evals.expect import check_expected, parse_expected
from dsg_cli.evals.lm_harness import ScoringLM, evaluate
from dsg_cli.evals.paper_protocol import evaluate_paper
from dsg_cli.evals.questions import questions_of
from dsg_cli.guardrail.guarded import guarded
from dsg_cli.inference.scoring import GuardedModel, answers_from_tensors, answers_to_tensors, request_key
from dsg_cli.job import Job
from dsg_cli.lab import data as lab
from dsg_cli.models.language_model import load_model
from dsg_cli.models.residuals import read_residual
from dsg_cli.models.sae import load_encoder, read_sae
from dsg_cli.settings import EvalSection
from dsg_cli.stages.inputs import identify
from dsg_cli.workspace.checkpoints import Checkpoint


@pytest.fixture(scope="module")
def loaded():
    return load_model("lab")


@pytest.fixture(scope="module")
def sae():
    return read_sae("lab")


def guards(loaded, sae, indices, threshold):
    special = special_ids(loaded.tokenizer)
    identity = identify(loaded, sae.site.layer).model_dump()
    return [make_guardrail(sae, indices, threshold=threshold, strength=90.0, special=special, model=identity)]


@pytest.fixture(scope="module")
def hot_features(loaded, sae):
    """Features that fire most on questions about hexes."""
    texts = [json.loads(line)["context"] for line in lab.questions_path("lab-hexes").read_text().splitlines()[:8]]
    batch = loaded.tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    resid = read_residual(loaded.model, sae.site, batch["input_ids"], batch["attention_mask"])
    rates = (load_encoder(sae, device="cpu")(resid[:, 5:10].flatten(0, 1)) > 0).float().mean(0)
    return rates.argsort(descending=True)[:4].tolist()


def plain_loop(loaded, sae, questions, indices, threshold):
    """One choice at a time, nothing shared with the package but sae-lens and transformers."""
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


def run(loaded, guardrails, tasks, batch_size=32, known=None, **settings):
    base = GuardedModel(loaded.model, loaded.tokenizer, bos=2, batch_size=batch_size)
    unlearned = replace(base, guardrails=guardrails)
    return evaluate(base, unlearned, tasks, EvalSection(**settings), known=known)


def test_accuracies_equal_a_plain_loop(loaded, sae, hot_features):
    benches, threshold = ["lab-hexes", "lab-near"], 0.2
    tasks = load_tasks(benches, split="dev")
    result = run(loaded, guards(loaded, sae, hot_features, threshold), tasks, batch_size=7, limit=24)
    for bench in benches:
        rows = [json.loads(line) for line in lab.questions_path(bench).read_text().splitlines()]
        asked = [row for row in rows if row["split"] == "dev"][:24]
        base, unlearned, rate = plain_loop(loaded, sae, asked, hot_features, threshold)
        assert result.results[bench]["base"]["acc"] == pytest.approx(base)
        assert result.results[bench]["unlearned"]["acc"] == pytest.approx(unlearned)
        assert result.results[bench]["base"]["n"] == 24
        assert result.gate[bench]["rate"] == pytest.approx(rate)
        metrics = {"acc", "acc_stderr", "n", "acc_count", "acc_low", "acc_high"}
        assert set(result.results[bench]["unlearned"]) == metrics
    assert result.results["lab-hexes"]["unlearned"]["acc"] < 0.7 and result.gate["lab-hexes"]["rate"] > 0.5
    assert len(result.rows) == 48 and not any("context" in row for row in result.rows)
    assert {row["id"] for row in result.rows if row["bench"] == "lab-hexes"} >= {"hexes/Rahurk/binder/seen"}


def test_no_answer_depends_on_the_batch_size(loaded, sae, hot_features):
    guardrail = guards(loaded, sae, hot_features, 0.5)
    benches = ["lab-hexes-terse", "lab-far"]
    single, batched = (
        run(loaded, guardrail, load_tasks(benches, split="dev"), batch_size=size, limit=30).rows for size in (1, 16)
    )
    for a, b in zip(single, batched, strict=True):
        assert (a["id"], a["gated"], a["length"], a["statistic"]) == (b["id"], b["gated"], b["length"], b["statistic"])
        assert a["unlearned"] == pytest.approx(b["unlearned"], abs=1e-3)
    assert len({row["length"] for row in single}) > 1 and len({row["gated"] for row in single}) == 2


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
    tasks = load_tasks(["all"], **options)
    result = run(loaded, guards(loaded, sae, hot_features, 0.2), tasks, samples=True)
    assert result.results["all"]["base"]["n"] == result.results["mine"]["base"]["n"] == 2
    assert result.gate["all"] == result.gate["mine"]
    assert result.rows[0]["context"] == rows[0]["q"] and len(result.rows[0]["base"]) == 2
    assert [question.answer for question in questions_of(tasks[0])] == [1, 0]


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
    for benches, words in ((["lab-far", "lab-far"], "named twice"), (["lab-hexs"], "Did you mean lab-hexes")):
        with pytest.raises(DsgError, match=words):
            load_tasks(benches, split="test")
    with pytest.raises(DsgError, match="There is no folder"):
        load_tasks(["lab-far"], split="test", include_path=str(tmp_path / "none"))


def test_evaluation_reads_what_calibration_reads(model, tokenizer):
    """One BOS policy: this tokenizer adds none itself; if the SAE was trained with one, every input begins with it."""
    assert bos_to_prepend(tokenizer, False) is None
    bos = bos_to_prepend(tokenizer, True)
    assert bos == 2 and encode(tokenizer, ["w1 w2"], bos=bos) == [[2, 5, 6]]
    assert encode_pair(tokenizer, "w1 w2", " w3", bos=bos).inputs(64) == (2, 5, 6)
    lm = ScoringLM(GuardedModel(model, tokenizer, bos, batch_size=1))
    with watched(model) as calls:
        lm._loglikelihood_tokens([(("w1 w2", " w3"), [5, 6], [7])])
    assert [call["input_ids"].tolist() for call in calls] == [[[2, 5, 6]]]


def test_a_broken_model_does_not_pass_for_an_unlearned_one(model, tokenizer):
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[:] = torch.nan
    with pytest.raises(DsgError, match="broken, not unlearned"):
        GuardedModel(broken, tokenizer).loglikelihoods([Request((2, 5), (6,))])


def test_what_was_kept_of_other_requests_is_not_taken(model, tokenizer, tmp_path):
    job = Job(checkpoint=Checkpoint(tmp_path / "kept"), name="scoring")
    guarded_model, first, second = GuardedModel(model, tokenizer), [Request((2, 5), (6,))], [Request((2, 7), (8,))]
    guarded_model.loglikelihoods(first, job)
    assert guarded_model.loglikelihoods(second, job) == guarded_model.loglikelihoods(second)


def test_tokenizers_without_bos_or_pad(model, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.bos_token = bare.pad_token = None
    assert special_ids(bare) == (1,)
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
    model = GuardedModel(loaded.model, loaded.tokenizer, bos=2, max_length=64)
    with watched(loaded.model) as calls:
        together = model.loglikelihoods(requests)
    assert [len(call["input_ids"]) for call in calls] == [3]
    alone = [model.loglikelihoods([request])[0] for request in requests]
    for a, b in zip(together, alone, strict=True):
        assert a.loglikelihood == pytest.approx(b.loglikelihood, abs=1e-4) and a.is_greedy == b.is_greedy


def test_inputs_that_are_too_long_are_cut_on_the_left():
    assert Request((1, 2, 3, 4), (5, 6)).inputs(3) == (3, 4, 5)
    assert Request((1, 2), (5,)).inputs(9) == (1, 2)


def test_expectations():
    results = {"lab-hexes": {"unlearned": {"acc": 0.3, "acc_stderr": 0.1}}}
    conditions = ["lab-hexes<=0.30", "lab-hexes.acc_stderr > 0.2", "lab-hexes>=0.31"]
    checked = check_expected([parse_expected(text, ["lab-hexes"]) for text in conditions], results, {})
    assert [condition["met"] for condition in checked] == [True, False, False]
    for text, words in (("lab-hexes", "not a condition"), ("lab-hexes<=x", "not a condition"), ("lab-x<1", "not run")):
        with pytest.raises(DsgError, match=words):
            parse_expected(text, ["lab-hexes"])
    with pytest.raises(DsgError, match="no metric"):
        check_expected([parse_expected("lab-hexes.f_one<1", ["lab-hexes"])], results, {})


def test_examples_in_front_of_questions(loaded, sae, tmp_path):
    """--num-fewshot reaches the task, and every answer of the base model can be taken from an earlier run."""
    rows = [{"q": f"Question {i}:", "c": [" home", " garlic"], "a": i % 2} for i in range(8)]
    tasks = load_tasks(["mine"], **write_task(tmp_path / "tasks", rows))
    options = {"num_fewshot": 2, "samples": True}
    first = run(loaded, guards(loaded, sae, [1, 2], 0.9), tasks, **options)
    assert all(row["context"].count("Question") == 3 for row in first.rows) and first.n_known == 0
    again = run(loaded, guards(loaded, sae, [1, 2], 0.9), tasks, known=first.answers, **options)
    assert again.n_known == 16 and again.results == first.results and again.answers == first.answers


def test_answers_survive_being_stored(tmp_path):
    requests = [Request((2, 5), (6,)), Request((2, 5, 6), (7,)), Request((2,), (5, 6))]
    answers = {request_key(request, 64): (-0.1 * i, bool(i % 2)) for i, request in enumerate(requests)}
    assert len(answers) == 3 and answers_from_tensors(answers_to_tensors(answers)) == answers
    assert answers_from_tensors(answers_to_tensors({})) == {}


BOS, BIO, MMLU = 2, "wmdp-bio-paper", "mmlu-paper"
SHARED = ["high school us history", "high school geography", "human aging"]
SUBJECTS = {
    BIO: ["biology"],
    "wmdp-cyber-paper": ["cyber security"],
    MMLU: [*SHARED, "college computer science"],
    "mmlu-paper-cyber": [*SHARED, "college biology"],
}
SUBJECT_OF = {"wmdp-bio": "biology", "wmdp-cyber": "cyber security"}
SUBJECT_OF |= {name.replace(" ", "_"): name for bench in (MMLU, "mmlu-paper-cyber") for name in SUBJECTS[bench]}
TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}[{{ turn['role'] }}]\n{{ turn['content'] }}[end]\n{% endfor %}"
    "{% if add_generation_prompt %}[model]\n{% endif %}"
)


def make_rows():
    """Questions of two benches by configuration, as a data set holds them; lengths differ."""
    rng, rows = random.Random(0), {}
    for n in range(24):
        subject = "biology" if n < 12 else SUBJECTS[MMLU][n % 4]
        options = [" ".join([f"o{4 * n + k}"] * rng.randint(1, 4)) for k in range(4)]
        question = f"What is q{n}{' of it' * rng.randint(0, 6)}?"
        config = next(name for name in SUBJECT_OF if SUBJECT_OF[name] == subject)
        rows.setdefault(config, []).append({"question": question, "choices": options, "answer": rng.randrange(4)})
    return rows


ROWS_PAPER = make_rows()
RIGHT = {row["choices"][row["answer"]].split()[0] for rows in ROWS_PAPER.values() for row in rows}


def content_of(subject, row, order):
    shown = "".join(f"\n{letter}. {row['choices'][i]}" for letter, i in zip("ABCD", order, strict=True))
    return f"The following are multiple choice questions (with answers) about {subject}.\n{row['question']}{shown}"


def make_tokenizer(template):
    """Words with the space before them; ` A` is a token beside `A`, but ` D` is two. BOS comes by itself."""
    split = pre_tokenizers.Split(Regex(r" ?(?!D\b)\w+|\n| |\w+|[^\w\s]"), "isolated")
    texts = [content_of(SUBJECT_OF[config], row, range(4)) for config in ROWS_PAPER for row in ROWS_PAPER[config]]
    pieces = split.pre_tokenize_str("\n".join([*texts, "Answer: [user] [model] [end] ( A B C"]))
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *sorted({piece for piece, _ in pieces})]
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    fast.pre_tokenizer = split
    fast.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=fast, chat_template=template, **names)


def oracle(text):
    """A letter as it is spelled, and how sure it is: right in every order, unless shown as D, or never."""
    n = int(re.search(r"\bq(\d+)", text)[1])
    place = [word in RIGHT for word in re.findall(r"\n[A-D]\. (\w+)", text)].index(True)
    if n % 5 == 4 or (n % 5 == 3 and place == 3):
        place = (place + 1) % 4
    return ("" if n % 2 or place == 3 else " ") + "ABCD"[place], 2.0 + n % 4


class OracleLM(LlamaForCausalLM):
    """A random model that listens to the oracle."""

    def forward(self, input_ids=None, attention_mask=None, logits_to_keep=0, **options):
        out = super().forward(input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep, **options)
        self.n_prompts += len(input_ids)
        for row, ids in enumerate(input_ids):
            ids = ids if attention_mask is None else ids[attention_mask[row].bool()]
            spelled, bonus = oracle("".join(self.tokenizer.convert_ids_to_tokens(ids)))
            out.logits[row, :, self.tokenizer.convert_tokens_to_ids(spelled)] += bonus
        return out


def is_right(answers, place):
    return answers.index(max(answers)) == place


class Case:
    """A model, its guardrail, and what the plain loop finds by bench and id."""

    def __init__(self, config, template, guardrail):
        """The head reads the letter C along the clamped direction, so that a clamp can change an answer."""
        torch.manual_seed(0)
        self.tokenizer, self.guardrail = make_tokenizer(template), guardrail
        config = LlamaConfig(**{**config.to_dict(), "vocab_size": len(self.tokenizer)})
        self.model = OracleLM(config).eval().requires_grad_(False)
        self.model.tokenizer, self.model.n_prompts = self.tokenizer, 0
        vocab, direction = self.tokenizer.get_vocab(), guardrail.slice.W_dec.sum(0)
        self.letters = [[vocab[text] for text in (x, f" {x}") if text in vocab] for x in "ABCD"]
        self.model.lm_head.weight[list(itertools.chain(*self.letters))] *= 0.3
        self.model.lm_head.weight[self.letters[2]] -= 1.5 * direction / direction.norm()
        self.plain = {BIO: {}, MMLU: {}}
        for config, rows in ROWS_PAPER.items():
            answers = {f"{config}/{n}": self.ask_plainly(SUBJECT_OF[config], row) for n, row in enumerate(rows)}
            self.plain[BIO if config == "wmdp-bio" else MMLU] |= answers

    def answer(self, subject, row, order):
        content = content_of(subject, row, order)
        text = f"[user]\n{content}[end]\n[model]\nAnswer: (" if self.tokenizer.chat_template else f"{content}\nAnswer:"
        ids = [BOS, *self.tokenizer(text, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            logs = self.model(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
        return [max(float(logs[i]) for i in spellings) for spellings in self.letters], len(ids)

    def ask_plainly(self, subject, row):
        orders = list(itertools.permutations(range(4)))
        base, length = self.answer(subject, row, orders[0])
        known = all(is_right(self.answer(subject, row, order)[0], order.index(row["answer"])) for order in orders)
        with guarded(self.model, [self.guardrail], allow_mismatch=True):
            unlearned, _ = self.answer(subject, row, orders[0])
        gate = {"gated": bool(self.guardrail.last_gated_B[0]), "statistic": float(self.guardrail.last_statistic_B[0])}
        asked = {"group": subject, "answer": row["answer"], "length": length, "known": known}
        return {**asked, **gate, "base": base, "unlearned": unlearned}

    def run(self, *benches, rows=ROWS_PAPER, batch_size=32, question_ids=None, known=None, **settings):
        """The package's evaluation."""
        questions = {bench: load_questions(bench, rows) for bench in benches or (BIO, MMLU)}
        self.model.n_prompts = 0
        base = GuardedModel(self.model, self.tokenizer, BOS, batch_size=batch_size)
        unlearned = replace(base, guardrails=[self.guardrail])
        settings = EvalSection(**settings)
        return evaluate_paper(base, unlearned, questions, settings, question_ids=question_ids, known=known)


def load_questions(bench, rows):
    """The package's questions, from a hub that holds the rows."""

    def load_rows(repo, config, split, **_options):
        assert (repo, split) == ("cais/wmdp" if config.startswith("wmdp") else "cais/mmlu", "test")
        return rows[config]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper, "load_rows", load_rows)
        return paper.load_paper_questions(bench)


@pytest.fixture(scope="module", params=[TEMPLATE, None], ids=["chat", "plain"])
def case(request, one_thread, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sae")
    make_sae(folder)
    guardrail = make_guardrail(read_sae(str(folder)), [14, 16], threshold=0.58, strength=40.0)
    return Case(model.config, request.param, guardrail)


def known_of(questions):
    return {name: q for name, q in questions.items() if q["known"]}


def n_right(questions, side):
    return sum(is_right(q[side], q["answer"]) for q in questions.values())


def wilson(k, n, z=1.959963984540054):
    centre, half = k / n + z * z / (2 * n), z * math.sqrt(k / n * (1 - k / n) / n + z * z / (4 * n * n))
    return [(centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)]


def check(result, bench, asked, kept):
    """An evaluation of a bench equals what the plain loop found of the questions asked and of those kept."""
    n, base = len(kept), result.results[bench]["base"]
    rows = [row for row in result.rows if row["bench"] == bench]
    assert sorted(result.question_ids[bench]) == sorted(row["id"] for row in rows) == sorted(kept)
    assert (base["n_asked"], base["acc_asked"]) == (len(asked), pytest.approx(n_right(asked, "base") / len(asked)))
    assert result.gate[bench]["rate"] == pytest.approx(sum(q["gated"] for q in kept.values()) / n)
    assert result.gate[bench]["n"] == n and (result.gate[bench]["edit"] > 0) == (result.gate[bench]["rate"] > 0)
    for side in ("base", "unlearned"):
        metrics, k = result.results[bench][side], n_right(kept, side)
        assert (metrics["acc"], metrics["acc_count"], metrics["n"]) == (pytest.approx(k / n), k, n)
        assert [metrics["acc_low"], metrics["acc_high"]] == pytest.approx(wilson(k, n), abs=1e-9)
    for row in rows:
        q = kept[row["id"]]
        assert all(row[key] == q[key] for key in ("group", "answer", "length", "gated"))
        for key in ("base", "unlearned", "statistic"):
            assert row[key] == pytest.approx(q[key], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_equals_the_plain_loop(case, batch_size):
    result = case.run(batch_size=batch_size)
    for bench, asked in case.plain.items():
        kept = known_of(asked)
        # Nothing is so for all questions or for none; some are right in their own order and not in others.
        assert 0 < len(kept) < n_right(asked, "base") < len(asked)
        assert 0 < n_right(kept, "unlearned") < len(kept) and {q["gated"] for q in kept.values()} == {True, False}
        check(result, bench, asked, kept)
        assert result.results[bench]["base"]["acc"] == 1.0
    assert not any("context" in row for row in result.rows)


def test_a_limit_and_named_questions(case):
    first = dict(list(case.plain[BIO].items())[:9])
    result = case.run(BIO, limit=9, samples=True)
    check(result, BIO, first, known_of(first))
    for row in result.rows:
        asked = ROWS_PAPER["wmdp-bio"][int(row["id"].split("/")[1])]
        assert (row["context"], row["choices"]) == (content_of("biology", asked, range(4)), asked["choices"])
    assert n_right(first, "base") < len(first)
    check(case.run(BIO, question_ids={BIO: [*first]}), BIO, first, first)  # Without a filter.
    with pytest.raises(DsgError, match="no question wmdp-bio/12"):
        case.run(BIO, question_ids={BIO: [*first, "wmdp-bio/12"]})
    never = [row for n, row in enumerate(ROWS_PAPER["wmdp-bio"]) if n % 5 == 4]
    with pytest.raises(DsgError, match="none of the 2 questions"):
        case.run(BIO, rows={"wmdp-bio": never})


def test_answers_of_an_earlier_run_are_not_asked_again(case):
    first = case.run(batch_size=7)
    n_kept = sum(map(len, first.question_ids.values()))
    again = case.run(batch_size=7, known=first.answers)
    assert (first.n_known, again.n_known, case.model.n_prompts) == (0, len(first.answers), n_kept)
    named = case.run(batch_size=7, known=first.answers, question_ids=first.question_ids)
    assert (named.n_known, case.model.n_prompts) == (7 * n_kept, n_kept)  # A, B and C are spelled in two ways.
    assert (again.results, again.answers) == (first.results, first.answers)
    for result in (again, named):
        assert (result.rows, result.gate, result.question_ids) == (first.rows, first.gate, first.question_ids)


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_prompts_word_for_word(template):
    content = "The following are multiple choice questions (with answers) about biology.\nWhat is q0?\n"
    content += "A. o1\nB. o0\nC. o3 o3\nD. o2"
    expected = f"<bos>[user]\n{content}[end]\n[model]\nAnswer: (" if template else f"<bos>{content}\nAnswer:"
    question = paper.PaperQuestion("x/0", "biology", "What is q0?", ("o0", "o1", "o2", "o3 o3"), 2)
    tokenizer = make_tokenizer(template)
    requests = paper.Letters(tokenizer, bos=BOS).requests(question, (1, 0, 3, 2))
    assert {"".join(tokenizer.convert_ids_to_tokens(list(r.context))) for r in requests} == {expected}
    asked = [tokenizer.convert_ids_to_tokens(list(r.continuation)) for r in requests]
    assert asked == [["A"], [" A"], ["B"], [" B"], ["C"], [" C"], ["D"]] and question.right((1, 0, 3, 2)) == 3


@pytest.mark.parametrize("bench", SUBJECTS)
def test_subjects_and_ids_of_a_bench(bench):
    row = {"question": "What?", "choices": ["a", "b", "c", "d"], "answer": 1}
    configs = [config for config, subject in SUBJECT_OF.items() if subject in SUBJECTS[bench]]
    questions = load_questions(bench, {config: [row, row] for config in configs})
    expected = sorted((SUBJECT_OF[config], f"{config}/{n}") for config in configs for n in range(2))
    assert sorted((q.subject, q.id) for q in questions) == expected
    with pytest.raises(DsgError, match="3 options"):
        load_questions(bench, {config: [row, row | {"choices": ["a", "b", "c"]}] for config in configs})


def test_question_ids_from_a_file(tmp_path):
    path, expected = tmp_path / "ids.json", {BIO: ["wmdp-bio/3", "wmdp-bio/1"]}
    ids = {**expected, "other": ["x/0"]}
    for content in (ids, {"kind": "eval", "question_ids": ids, "results": {}}):
        path.write_text(json.dumps(content))
        assert paper.read_question_ids(path, [BIO, MMLU]) == expected
    assert paper.read_question_ids(None, [BIO]) == {}
    wrong = [[], {BIO: "wmdp-bio/3"}, {"question_ids": []}, {"question_ids": {}}, {"other": ["x/0"]}, {}]
    for text in ("{", *map(json.dumps, wrong)):
        path.write_text(text)
        with pytest.raises(DsgError, match=re.escape(str(path))):
            paper.read_question_ids(path, [BIO, MMLU])
    with pytest.raises(DsgError, match="of the paper's protocol"):  # No bench takes them.
        paper.read_question_ids(path, [])


def test_a_tokenizer_without_letters_is_an_error(tokenizer):
    spelling = make_tokenizer(None)
    spelling.backend_tokenizer.normalizer = normalizers.Prepend("?")  # A letter is two tokens, however spelled.
    for without in (spelling, tokenizer):  # The other knows none of them: the unknown token is no letter.
        with pytest.raises(DsgError, match="letter A"):
            paper.Letters(without, bos=BOS)
