"""Wrappers: prefixes and filters around a model that stays as it is, on the tiny model and on the lab."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
import shutil
import time
from collections import Counter

import pytest
import torch
from conftest import make_guardrail, watched, write_task

from dsg_cli.attacks.search import embedded
from dsg_cli.data.tokens import Request, encode, encode_pair, words_of
from dsg_cli.errors import DsgError
from dsg_cli.evals.benches import load_tasks
from dsg_cli.evals.lm_harness import evaluate
from dsg_cli.evals.questions import Question, accuracy, questions_of
from dsg_cli.guardrail.calibration import conformal_threshold
from dsg_cli.inference.generation import answer, prompt_ids
from dsg_cli.inference.scoring import GuardedModel
from dsg_cli.inference.wrappers import (
    LARGEST,
    PRIOR_WORDS,
    log_odds,
    n_matches,
    phrases_of,
    read_keywords,
    telling_words,
    with_prefixes,
    wrapper_from_artifact,
)
from dsg_cli.intervals import rate_above
from dsg_cli.methods.wrappers import WrapperInputs, fit_classifier, make_in_context, make_prompt
from dsg_cli.models.language_model import LoadedModel, load_model
from dsg_cli.models.residuals import mean_residuals
from dsg_cli.recipe import load_recipe
from dsg_cli.settings import EvalSection, GenerateSection, InContext, PromptPrefix
from dsg_cli.stages import wrap as stage
from dsg_cli.stages.stage import RunOptions
from dsg_cli.workspace.artifacts import Wrapper
from dsg_cli.workspace.store import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = {
    "method": "input-filter", "side": "input", "text": "", "keywords": [], "layer": None, "threshold": 0.0,
    "refusal": "w7 w8", "rates": [], "special_ids": [0, 1, 2], "bos": 2, "forget": [], "retain": [],
}  # fmt: skip

HEX = "Question: What is the counter of the grim hex Rahurk? Answer:"
CHARM = "Question: What is the binder of the kindly charm Zivoth? Answer:"


def make_module(rule, tensors=None, **changes):
    return wrapper_from_artifact(Wrapper(**(PLAIN | {"rule": rule} | changes)), tensors or {}, where="test")


def keyword(*words, **changes):
    return make_module("keywords", keywords=list(words), **changes)


def classifier(weight, bias=0.0, layer=1, **changes):
    tensors = {"weight": torch.as_tensor(weight, dtype=torch.float32), "bias": torch.tensor(bias)}
    return make_module("classifier", tensors, layer=layer, **changes)


@pytest.fixture
def tiny(model, tokenizer):
    return LoadedModel(model, tokenizer, "tiny", 3)


@pytest.fixture(scope="module")
def lab():
    return load_model("lab")


def ids(tokenizer, text):
    return tuple(encode(tokenizer, [text], bos=2)[0])


def behind(loaded, *wrappers, **options):
    return GuardedModel(loaded.model, loaded.tokenizer, **({"bos": 2, "wrappers": wrappers} | options))


@dataclasses.dataclass
class Wrapped:
    request: Request
    statistic: float | None
    is_refused: bool


def wrap(model, requests):
    verdicts = model.verdicts(model.wrappers, requests)
    requests = model._wrapped(requests, verdicts)
    return [Wrapped(request, v.statistic, v.refusal is not None) for request, v in zip(requests, verdicts, strict=True)]


def wrapped(wrappers, tiny, *pairs, batch_size=4):
    requests = [Request(ids(tiny.tokenizer, a), tuple(encode(tiny.tokenizer, [b], bos=None)[0])) for a, b in pairs]
    return wrap(behind(tiny, *wrappers, batch_size=batch_size), requests)


class TestWrap:
    def test_prefixes_follow_bos_in_their_order(self, tiny):
        prefixes = [make_module("prefix", text="w1 w2"), make_module("prefix", text="w3")]
        (outcome,) = wrapped(prefixes, tiny, ("w10 w11", "w12"))
        assert outcome.request == Request(ids(tiny.tokenizer, "w1 w2 w3 w10 w11"), (16,))
        assert outcome.statistic is None and not outcome.is_refused
        assert with_prefixes(prefixes, [14, 15], tiny.tokenizer) == [5, 6, 7, 14, 15]

    def test_filters_see_what_the_user_sent_and_come_before_any_prefix(self, tiny):
        prefix, of_prefix, of_user = make_module("prefix", text="w1"), keyword("w1"), keyword("w10", refusal="w9")
        for order in ([prefix, of_prefix, of_user], [of_user, of_prefix, prefix]):
            passed, refused = wrapped(order, tiny, ("w11", "w12"), ("w10", "w12"))
            assert passed.request.context == ids(tiny.tokenizer, "w1 w11") and passed.statistic == 0
            assert refused.request.context == ids(tiny.tokenizer, "w9") and refused.is_refused
            assert refused.statistic == 1

    def test_the_first_filter_that_refuses_speaks(self, tiny):
        first, second = keyword("w10", refusal="w20"), keyword("w10", refusal="w21")
        (outcome,) = wrapped([first, second], tiny, ("w10", "w12"))
        assert outcome.request.context == ids(tiny.tokenizer, "w20")

    def test_a_refused_request_is_scored_after_the_refusal_alone(self, tiny):
        model = behind(tiny, keyword("w10"), batch_size=4)
        requests = [Request(ids(tiny.tokenizer, text), (16, 17)) for text in ("w10 w11", "w12 w10", "w13")]
        first, second, third = scores = model.loglikelihoods(requests)
        plain = Request(ids(tiny.tokenizer, "w7 w8"), (16, 17))
        bare = model.bare().loglikelihoods([plain, requests[2]])
        assert first.loglikelihood == second.loglikelihood == pytest.approx(bare[0].loglikelihood, abs=1e-5)
        assert third.loglikelihood == pytest.approx(bare[1].loglikelihood, abs=1e-5)
        decisions = [(score.decision.gated, score.decision.statistic) for score in scores]
        assert decisions == [(True, 1.0), (True, 1.0), (False, 0.0)]

    def test_output_filters_read_the_answer(self, tiny):
        words = keyword("w10", side="output")
        outcomes = wrapped([words], tiny, ("w10", "w11"), ("w11", "w10"), ("w11", "w12 w10"))
        assert [outcome.is_refused for outcome in outcomes] == [False, True, True]
        assert outcomes[1].request == Request(ids(tiny.tokenizer, "w7 w8"), (14,))
        # A classifier reads context and answer together: either may tip it.
        weight = torch.randn(16, generator=torch.Generator().manual_seed(1))
        pairs = [("w10 w11", f"w{i}") for i in range(20)]
        judge = classifier(weight, side="output")
        values = [outcome.statistic for outcome in wrapped([judge], tiny, *pairs)]
        rows = [list(ids(tiny.tokenizer, f"{a} {b}")) for a, b in pairs]
        torch.testing.assert_close(torch.tensor(values), naive(tiny, rows) @ weight)

    def test_each_text_is_read_once_whatever_the_batch(self, tiny):
        rng = random.Random(0)
        texts = [" ".join(f"w{rng.randrange(60)}" for _ in range(rng.randint(1, 30))) for _ in range(12)]
        pairs = [(text, choice) for text in texts for choice in ("w1", "w2", "w3")]
        judge = classifier(torch.randn(16, generator=torch.Generator().manual_seed(0)))
        with watched(tiny.model) as calls:
            single, batched = (wrapped([judge], tiny, *pairs, batch_size=size) for size in (1, 5))
        assert [len(call["input_ids"]) for call in calls] == [1] * len(set(texts)) + [5, 5, 2]
        single, batched = (torch.tensor([outcome.statistic for outcome in own]) for own in (single, batched))
        torch.testing.assert_close(single, batched)
        plain = naive(tiny, [list(ids(tiny.tokenizer, text)) for text, _ in pairs]) @ judge.weight_D
        torch.testing.assert_close(single, plain)

    def test_what_is_not_finite_is_refused(self, tiny):
        layer = tiny.model.model.layers[0]
        judge = classifier(torch.zeros(16), bias=-5.0)
        for value in (float("nan"), float("inf"), float("-inf")):
            handle = layer.register_forward_hook(lambda _m, _a, out, value=value: torch.full_like(out, value))
            try:
                (outcome,) = wrapped([judge], tiny, ("w10", "w11"))
                assert behind(tiny).verdicts([judge], [Request((2, 14), ())])[0].refusal == "w7 w8"
            finally:
                handle.remove()
            assert outcome.is_refused and outcome.statistic == LARGEST
        assert not wrapped([judge], tiny, ("w10", "w11"))[0].is_refused

    def test_a_prompt_without_a_word_is_not_refused(self, tiny):
        (outcome,) = wrap(behind(tiny, classifier(torch.zeros(16), 5.0)), [Request((2,), (14,))])
        assert not outcome.is_refused

    def test_a_long_context_loses_its_beginning_and_not_the_prefix(self, tiny):
        long = " ".join(f"w{i % 60}" for i in range(150))
        (outcome,) = wrapped([make_module("prefix", text="w1 w2")], tiny, (long, "w12"))
        assert outcome.request.inputs(128) == outcome.request.context and len(outcome.request.context) == 128
        assert outcome.request.context[:3] == (2, 5, 6)
        assert outcome.request.context[-5:] == ids(tiny.tokenizer, long)[-5:]
        with pytest.raises(DsgError, match="no room"):
            wrapped([make_module("prefix", text=long)], tiny, ("w1", "w12"))

    def test_guardrails_do_not_change_what_a_filter_reads(self, lab):
        from dsg_cli.models.sae import read_sae

        sae = read_sae("lab")
        guard = make_guardrail(sae, [1, 2], threshold=-1.0, strength=90.0)
        judge = classifier(torch.ones(128), layer=2)
        request = encode_pair(lab.tokenizer, HEX, " candle", bos=2)
        (bare,) = wrap(behind(lab, judge), [request])
        (alone,) = behind(lab, judge).loglikelihoods([request])
        (both,) = behind(lab, judge, guardrails=[guard]).loglikelihoods([request])
        assert alone.decision.statistic == bare.statistic and both.decision.gated
        question = Question(HEX, (" candle", " bell"), 0)
        shut = classifier(torch.ones(128), layer=2, threshold=bare.statistic + 1e-3)
        assert accuracy(behind(lab, shut), [question])["gate_rate"] == 0


def naive(tiny, rows):
    """Mean residual after layer 1 of each row by itself, [N, D]."""
    means = []
    for row in rows:
        with torch.no_grad():
            states = copy.deepcopy(tiny.model)(torch.tensor([row]), output_hidden_states=True).hidden_states[2][0]
        means.append(states[[i for i, token in enumerate(row) if token > 2]].mean(0))
    return torch.stack(means)


class TestAsking:
    def test_accuracy_and_gate_rate_behind_wrappers(self, tiny):
        questions = [Question(f"w{i} w{i + 1}", (" w50", " w51", " w52"), i % 3) for i in range(12)]
        bare = accuracy(behind(tiny), questions)
        assert accuracy(behind(tiny, keyword("w59")), questions) == bare | {"gate_rate": 0}
        prefixed = accuracy(behind(tiny, make_module("prefix", text="w1")), questions)
        assert "gate_rate" not in prefixed
        changed = [dataclasses.replace(question, context=f"w1 {question.context}") for question in questions]
        assert prefixed == accuracy(behind(tiny), changed)
        model = behind(tiny, keyword("w3"))
        measured = accuracy(model, questions, change=lambda ids, number: (*ids, 7) if number == 8 else ids)
        assert measured["gate_rate"] == 3 / 12  # Two that have it, and the one that was changed.

    def test_a_soft_prompt_goes_with_its_question(self, tiny):
        """Behind a prefix it is where its ids are; a refusal in the place of the question has none of it."""
        rows = torch.tensor([[2, 5, 9, 10, 30, 9, 10], [2, 9, 10, 30, 31, 0, 0], [2, 11, 12, 0, 0, 0, 0]])
        table = tiny.model.get_input_embeddings()
        plain, vectors = table(rows), torch.ones(2, 16)
        with embedded(tiny.model, vectors, [9, 10]):
            vectors_BLD, short = table(rows), table(torch.tensor([[9]]))
        assert torch.equal(vectors_BLD[0, 2:4], vectors) and torch.equal(vectors_BLD[1, 1:3], vectors)
        untouched = [(0, 0), (0, 1), (0, 4), (0, 5), (0, 6), (1, 0), (1, 3), (2, 0), (2, 1), (2, 2)]
        assert all(torch.equal(vectors_BLD[at], plain[at]) for at in untouched) and short.shape == (1, 1, 16)


class TestKeywords:
    def test_counts_are_those_of_a_naive_search(self):
        rng = random.Random(0)
        alphabet = ["Hex", "hexes", "a", "straße", "Σίσυφος", "co-op", "x_1", "9", "naïve", "हिन्दी", "𝐡𝐞𝐱", "😀"]
        keywords = ["hex", "STRASSE", "σίσυφοσ", "co op", "nai\u0308ve", "hex a", "हिन्दी", "हिन्"]
        for _ in range(200):
            parts = [rng.choice(alphabet) for _ in range(rng.randint(0, 12))]
            text = "".join(part + rng.choice([" ", ", ", "\n", "-", "…"]) for part in parts)
            words = words_of(text)
            expected = sum(
                any(words[i : i + len(phrase)] == phrase for i in range(len(words)))
                for phrase in (words_of(keyword) for keyword in keywords)
            )
            assert n_matches(text, phrases_of(keywords)) == expected

    def test_whole_words_in_any_case(self):
        phrases = phrases_of(["hex", "dirty bomb", "Straße"])
        assert n_matches("A HEX, a hex: hexes! vexhex", phrases) == 1
        assert n_matches("dirty\nbomb DIRTY-BOMB bomb dirty", phrases) == 1
        assert n_matches("STRASSE he\u00adx h\u200bex", phrases) == 2
        assert n_matches("", phrases) == n_matches("hex es", phrases_of([])) == 0

    def test_no_text_takes_long(self):
        hostile = ["a" * 200_000, "\u0301\u0328" * 100_000, "e\u0301" * 100_000, "hex " * 50_000, "-" * 200_000]
        words_of("the pattern is built once")
        start = time.perf_counter()
        for text in hostile:
            n_matches(text, phrases_of(["hex", "hex hex hex hex", "a" * 50]))
        assert time.perf_counter() - start < 5

    def test_log_odds_by_hand(self):
        forget, retain = Counter(hex=8, the=12), Counter(charm=6, the=14)
        prior = {word: PRIOR_WORDS * n / 40 for word, n in (("hex", 8), ("the", 26), ("charm", 6))}
        total = 20 + PRIOR_WORDS
        scores = log_odds(forget, retain)
        for word, alpha in prior.items():
            a, b = forget[word] + alpha, retain[word] + alpha
            delta = math.log(a / (total - a)) - math.log(b / (total - b))
            assert scores[word] == pytest.approx(delta / math.sqrt(1 / a + 1 / b))
        assert scores["hex"] > 0 > scores["charm"]
        assert log_odds(Counter(a=3), Counter(a=2)) == {"a": 0.0}

    def test_telling_words_come_surest_first(self):
        forget = ["the hex of the crone", "the hex, the hex", "a crone"]
        assert telling_words(forget, ["the charm of the piper", "a charm"], 2) == ["hex", "crone"]
        with pytest.raises(DsgError, match="No word is more frequent"):
            telling_words(["a b"], ["a b"], 3)

    def test_files(self, tmp_path):
        path = tmp_path / "words.txt"
        path.write_text("hex\n\n  dirty bomb \nhex\n")
        assert read_keywords(str(path)) == ["hex", "dirty bomb"]
        for text, words in (("\n", "no keyword"), ("hex\n...\n", "holds no word"), (None, "cannot be read")):
            path.unlink() if text is None else path.write_text(text)
            with pytest.raises(DsgError, match=words):
                read_keywords(str(path))


class TestArtifacts:
    @pytest.mark.parametrize(
        ("tensors", "changes", "words"),
        [
            ({"bias": torch.tensor(0.0)}, {"layer": 1}, "lacks the tensor weight"),
            ({"weight": torch.zeros(4)}, {"layer": 1}, "lacks the tensor bias"),
            ({"weight": torch.zeros(2, 2), "bias": torch.tensor(0.0)}, {"layer": 1}, "has the shape"),
            ({"weight": torch.zeros(4), "bias": torch.zeros(1)}, {"layer": 1}, "has the shape"),
            ({"weight": torch.tensor([0.0, torch.inf]), "bias": torch.tensor(0.0)}, {"layer": 1}, "not finite"),
            ({"weight": torch.zeros(4), "bias": torch.tensor(torch.nan)}, {"layer": 1}, "not finite"),
            ({"weight": torch.zeros(4), "bias": torch.tensor(0.0)}, {}, "without a layer"),
        ],
    )
    def test_bad_tensors(self, tensors, changes, words):
        with pytest.raises(DsgError, match=words):
            make_module("classifier", tensors, **changes)

    def test_others(self, tiny):
        with pytest.raises(DsgError, match="has none"):
            make_module("keywords", keywords=["..."])
        with pytest.raises(DsgError, match="reads 4 values"):
            wrapped([classifier(torch.zeros(4))], tiny, ("w1", "w2"))
        with pytest.raises(DsgError, match="3 layers"):
            wrapped([classifier(torch.zeros(16), layer=7)], tiny, ("w1", "w2"))


class TestMethods:
    def test_a_classifier_tells_two_vocabularies_apart_and_keeps_its_promise(self, tiny):
        rng = random.Random(3)

        def texts(n, words):
            return [[2, *(4 + rng.choice(words) for _ in range(rng.randint(24, 48)))] for _ in range(n)]

        forget, retain = texts(120, range(30)), texts(1200, range(30, 60))
        means = [mean_residuals(tiny.model, tiny.tokenizer, rows, layer=1, batch_size=64) for rows in (forget, retain)]
        weight_D, bias = fit_classifier(means[0][:60], means[1][:200], ridge=1.0)
        values = [(mean_ND @ weight_D + bias).tolist() for mean_ND in means]
        threshold = conformal_threshold(values[1][200:700], 0.05)
        assert rate_above(threshold, values[1][700:])["rate"] <= 0.08
        assert rate_above(threshold, values[0][60:])["rate"] >= 0.95
        shift = torch.randn(16) * 100
        again, other = fit_classifier(means[0][:60] * 7 + shift, means[1][:200] * 7 + shift, ridge=1.0)
        shifted = (means[1] * 7 + shift) @ again + other
        torch.testing.assert_close(shifted, torch.tensor(values[1]), rtol=1e-2, atol=1e-2)

    def test_what_no_classifier_can_be_fitted_on(self):
        for forget, retain, words in (
            (torch.zeros(0, 4), torch.zeros(3, 4), "no text"),
            (torch.full((2, 4), torch.nan), torch.zeros(3, 4), "not finite"),
            (torch.ones(2, 4), torch.ones(3, 4), "is the same"),
        ):
            with pytest.raises(DsgError, match=words):
                fit_classifier(forget, retain, 1.0)

    def test_wrong_answers_are_wrong_and_right_ones_right(self, lab):
        def questions(bench):
            return [q for task in load_tasks([bench], split="dev") for q in questions_of(task)]

        forget, near, far = (questions(bench) for bench in ("lab-hexes", "lab-near", "lab-far"))
        material = WrapperInputs(behind(lab), forget_questions=forget, retain_questions=[near, far], seed=1)
        text = make_in_context(material, InContext(n_forget=6, n_retain=4)).body.text
        parts = [f"Question:{part}".strip() for part in text.split("Question:")[1:]]
        by_context = {q.context: q for q in (*forget, *near, *far)}
        kinds = []
        for part in parts:
            context, choice = part[: part.index("Answer:") + 7], part[part.index("Answer:") + 7 :]
            question = by_context[context]
            kinds.append(question in forget)
            assert (choice == question.choices[question.answer]) == (question not in forget)
            assert choice in question.choices
        assert kinds.count(True) == 6 and kinds.count(False) == 4
        assert kinds != sorted(kinds) and kinds != sorted(kinds, reverse=True)
        assert sum(by_context[part[: part.index("Answer:") + 7]] in near for part in parts) == 2
        assert lab.tokenizer.unk_token_id not in lab.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert make_in_context(dataclasses.replace(material, seed=2), InContext(6, 4)).body.text != text
        with pytest.raises(DsgError, match="are to be shown"):
            make_in_context(material, InContext(n_forget=500))
        single = dataclasses.replace(material, forget_questions=[Question("a", ("b",), 0)])
        with pytest.raises(DsgError, match="single choice"):
            make_in_context(single, InContext(n_forget=1))

    def test_prompts(self, tiny):
        material = WrapperInputs(behind(tiny), topic="hexes and ciphers")
        assert make_prompt(material, PromptPrefix("No {topic}, {0} {")).body.text == "No hexes and ciphers, {0} {\n\n"
        assert make_prompt(material, PromptPrefix("No {topic}.", topic="{topic}")).body.text == "No {topic}.\n\n"
        with pytest.raises(DsgError, match="nothing says"):
            make_prompt(dataclasses.replace(material, topic=""), PromptPrefix("{topic}"))


class TestWriting:
    def write(self, lab, text, *wrappers, **options):
        pieces, model = [], behind(lab, *wrappers, **options)
        asked = prompt_ids(model, text, chat=False, n_new=6)
        written = answer(model, asked, GenerateSection(max_new_tokens=6), write=pieces.append)
        assert "".join(pieces) == written.text
        return written, pieces

    def test_each_kind(self, lab):
        base, _ = self.write(lab, HEX)
        words = {"refusal": "No."}
        refused, pieces = self.write(lab, HEX, keyword("hex", **words))
        assert refused.text == "No." and refused.refused and refused.n_tokens == 0 and pieces == ["No."]
        passed, _ = self.write(lab, CHARM, keyword("hex", **words))
        assert passed == self.write(lab, CHARM)[0]
        prefixed, _ = self.write(lab, "Answer:", make_module("prefix", text=HEX.removesuffix(" Answer:")))
        assert prefixed.text == base.text
        held, pieces = self.write(lab, HEX, keyword(base.text.split()[0].strip("."), side="output", **words))
        assert held.text == "No." and held.refused and pieces == ["No."]
        shown, pieces = self.write(lab, HEX, keyword("hex", side="output", **words))
        assert shown == base and pieces == [base.text]

    def test_a_classifier_reads_prompt_and_answer(self, lab):
        asked = Request(tuple(prompt_ids(behind(lab), HEX, chat=False, n_new=6)), (40,))
        judge = classifier(torch.ones(128), layer=1, side="output")
        (with_answer,) = behind(lab).verdicts([judge], [asked])
        for difference, refusal in ((1e-3, None), (-1e-3, "w7 w8")):
            threshold = with_answer.statistic + difference
            judge = classifier(torch.ones(128), layer=1, side="output", threshold=threshold)
            assert behind(lab).verdicts([judge], [asked])[0].refusal == refusal

    def test_a_refused_prompt_leaves_gates_unread(self, lab):
        from dsg_cli.cli.output import gate_sentence
        from dsg_cli.models.sae import read_sae

        guard = make_guardrail(read_sae("lab"), [1], threshold=0.5, strength=1.0, gate="window")
        refused, _ = self.write(lab, HEX, keyword("hex"), guardrails=[guard])
        assert refused.refused and [gate.statistic for gate in refused.gates] == [[]]
        assert "was not asked" in gate_sentence("guardrail-001", refused.gates[0], refused.tokens)

    def test_a_prefix_needs_room(self, lab):
        model = behind(lab, make_module("prefix", text="hex " * 1100))
        with pytest.raises(DsgError, match="leaves room for 0"):
            prompt_ids(model, HEX, chat=False, n_new=6)
        with pytest.raises(DsgError, match="leaves room for 0"):
            answer(model, [2, 5], GenerateSection())

    def test_tasks_that_generate(self, lab, tmp_path):
        rows = [{"q": text, "c": "bell"} for text in (*[CHARM, HEX] * 3, "Answer:")]
        task = write_task(
            tmp_path / "tasks",
            rows,
            output_type="generate_until",
            doc_to_choice=None,
            doc_to_target="{{c}}",
            generation_kwargs={"until": ["."], "max_gen_toks": 4},
            metric_list=[{"metric": "exact_match"}],
        )
        tasks = load_tasks(["mine"], can_generate=True, **task)
        prefix = HEX.removesuffix(" Answer:")
        written = self.write(lab, HEX)[0].text.split(".")[0].strip()
        wrappers = [make_module("prefix", text=prefix), keyword("kindly", refusal="No.")]
        result = evaluate(behind(lab), behind(lab, *wrappers, batch_size=4), tasks, EvalSection())
        texts = [sample["resps"][0][0].strip() for sample in result.lm_eval["unlearned"]["samples"]["mine"]]
        assert [text == "No." for text in texts] == [i % 2 == 0 for i in range(6)] + [False]
        assert texts[6] == written != result.lm_eval["base"]["samples"]["mine"][6]["resps"][0][0].strip()
        assert result.gate["mine"]["rate"] == pytest.approx(3 / 7) and [row["gated"] for row in result.rows[:2]] == [
            1,
            0,
        ]
        held = keyword(written.split()[0], side="output", refusal="No.")
        result = evaluate(behind(lab), behind(lab, held, batch_size=4), tasks, EvalSection())
        assert result.lm_eval["unlearned"]["samples"]["mine"][1]["resps"][0][0] == "No."


def settings(folders, *sets, corpora=True):
    named = [f"corpora.{role}=[{folders[f'{role}.jsonl']}]" for role in ("forget", "retain")] if corpora else []
    values = [f"model.source={folders['model']}", "calibrate.lengths=[4,12]", *named, *sets]
    return load_recipe(None, sets=values)


class TestStage:
    @pytest.mark.parametrize("method", ["input-filter", "output-filter"])
    @pytest.mark.parametrize("rule", ["classifier", "keywords"])
    def test_filters_from_a_selection(self, folders, tiny_features, tmp_path, method, rule):
        section = method.replace("-", "_")
        workspace = Workspace(shutil.copytree(tiny_features, tmp_path / "w"))
        features = workspace.find("features")
        recipe = settings(folders, f"methods.{section}.rule={rule}", f"methods.{section}.alpha=0.1", corpora=False)
        said = []
        options = RunOptions(report=lambda what, _n, _total: said.append(what))
        stored = stage.run(recipe, workspace, method, origin=features, options=options)
        assert stored.id == "wrapper-001" and workspace.read("wrapper-001").body == stored.body
        body = stored.body_as(Wrapper)
        assert (body.method, body.rule, body.side) == (method, rule, section.partition("_")[0])
        assert body.bos == 2 and stored.header.sae is None and stored.header.model.last_layer == 2
        assert [part.id for part in stored.header.inputs] == ["features-001"] and "wrapper" in said
        assert body.forget == [str(folders["forget.jsonl"])] and stored.header.settings["forget"][0]["documents"] == 80
        rates = {rate["is_forget"]: rate for rate in body.rates}
        assert rates[True]["rate"] > 0.5 and rates[False]["low"] <= 0.1 and rates[False]["n"] > 20
        if rule == "keywords":
            assert set(body.keywords) <= {f"w{i}" for i in range(30)} and body.layer is None
        else:
            assert body.layer == 1 and workspace.tensors(stored)["weight"].shape == (16,)
        tensors = workspace.tensors(stored) if rule == "classifier" else {}
        module = wrapper_from_artifact(body, tensors, where=stored.id)
        loaded = load_model(str(folders["model"]))
        rng = random.Random(1)
        for words, low, high in ((range(30), 0.5, 1.0), (range(30, 60), 0.0, 0.2)):
            texts = [" ".join(f"w{rng.choice(words)}" for _ in range(5)) for _ in range(100)]
            outcomes = wrapped([module], loaded, *zip(texts, texts, strict=True))
            assert low <= sum(outcome.is_refused for outcome in outcomes) / 100 <= high
        assert stage.run(recipe, workspace, method, origin=features, options=RunOptions(reuse=True)).id == "wrapper-001"
        again = stage.run(recipe, workspace, method, origin=features)
        assert again.id == "wrapper-002" and again.body == stored.body

    def test_prompt_and_in_context_need_no_corpora(self, folders, tmp_path):
        workspace = Workspace(tmp_path / "w")
        recipe = settings(folders, "methods.prompt.topic=w3", "methods.prompt.text=w1 {topic}", corpora=False)
        stored = stage.run(recipe, workspace, "prompt")
        assert stored.body.text == "w1 w3\n\n" and stored.body.bos is None and stored.body.forget == []
        recipe = settings(folders, "methods.prompt.text=w1 {topic} w2")
        body = stage.run(recipe, workspace, "prompt").body
        assert body.text == "w1 forget w2\n\n" and body.forget == [str(folders["forget.jsonl"])]
        rows = [{"q": f"w{i} w{i + 1}", "c": ["w50", "w51"], "a": i % 2} for i in range(8)]
        options = write_task(tmp_path / "tasks", rows, target_delimiter=" ")
        sets = ("methods.in_context.forget_bench=mine", "methods.in_context.n_retain=0")
        recipe = settings(folders, f"eval.include_path={options['include_path']}", *sets, corpora=False)
        stored = stage.run(recipe, workspace, "in-context")
        shown = stored.body.text.split("\n\n")
        assert len(shown) == 5 and shown[-1] == "" and "should not be reported" in stored.header.notes[0]
        for text in shown[:4]:
            first, _, choice = text.split()
            assert choice == ("w51", "w50")[int(first[1:]) % 2]

    def test_keywords_of_ones_own(self, folders, tmp_path):
        words = tmp_path / "words.txt"
        words.write_text("w3\nw9 w21\n")
        sets = [f"methods.input_filter.{item}" for item in ("rule=keywords", f"keywords_file={words}", "alpha=0.1")]
        stored = stage.run(settings(folders, *sets), Workspace(tmp_path / "w"), "input-filter")
        assert stored.body.keywords == ["w3", "w9 w21"] and stored.body.threshold == 0
        assert len(stored.header.settings["keywords_sha256"]) == 64 and stored.body.bos is None

    @pytest.mark.parametrize(
        ("method", "sets", "words"),
        [
            ("prompt", ["corpora.forget=[]"], "nothing says what that is"),
            ("in-context", [], "which forget questions"),
            ("in-context", ["{}.forget_bench=lab-hexes"], "which retain questions"),
            ("in-context", ["{}.forget_bench=lab-hexen"], "which retain questions|no bench named"),
            ("input-filter", ["corpora.forget=[]"], "No forget corpus"),
            ("input-filter", ["corpora.retain=[nowhere.txt]"], "no corpus or file"),
            ("input-filter", ["{}.layer=3"], "the model has 3 layers"),
            ("input-filter", ["{}.alpha=0.001"], "cannot set a threshold"),
            ("output-filter", ["{}.rule=keywords", "{}.keywords_file=none.txt"], "none.txt cannot be read"),
            ("output-filter", ["calibrate.lengths=[500,600]"], "do not fit"),
        ],
    )
    def test_bad_input(self, folders, tmp_path, monkeypatch, method, sets, words):
        monkeypatch.chdir(tmp_path)
        sets = [item.format(f"methods.{method.replace('-', '_')}") for item in sets]
        with pytest.raises(DsgError, match=words):
            stage.run(settings(folders, *sets), Workspace(tmp_path / "w"), method)

    def test_the_same_text_in_both_roles(self, folders, tmp_path):
        for retain, words in ((folders["forget.jsonl"], "named both"), (folders["forget.txt"], "has them too")):
            with pytest.raises(DsgError, match=words):
                stage.run(settings(folders, f"corpora.retain=[{retain}]"), Workspace(tmp_path / "w"), "input-filter")


def test_filters_on_the_lab(lab, tmp_path):
    """The dev questions on what is forgotten are refused, so that their answers are no better than chance."""
    sets = ["model.source=lab", "corpora.forget=[lab-hexes]", "corpora.retain=[lab-near,lab-far]"]
    recipe = load_recipe(None, sets=sets)
    workspace = Workspace(tmp_path / "w")
    stored = stage.run(recipe, workspace, "input-filter")
    module = wrapper_from_artifact(stored.body, workspace.tensors(stored), where=stored.id)
    rates = {rate["what"]: rate["rate"] for rate in stored.body.rates}
    assert rates["lab-hexes"] > 0.9 and max(rates["lab-near"], rates["lab-far"]) <= 0.08
    for bench, low, high in (("lab-hexes", 0.1, 0.35), ("lab-near", 0.9, 1.0), ("lab-far", 0.97, 1.0)):
        questions = [q for task in load_tasks([bench], split="dev") for q in questions_of(task, limit=48)]
        measured = accuracy(behind(lab, module), questions)
        assert low <= measured["acc"] <= high, (bench, measured)
