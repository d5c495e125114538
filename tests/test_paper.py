"""The paper's protocol against a plain loop over questions and orders, one prompt a forward pass."""

import itertools
import json
import math
import random
import re

import pytest
import torch
from conftest import make_guardrail, make_sae
from dsg_cli.benches import paper
from dsg_cli.model import LoadedModel
from dsg_cli.paper_evaluation import evaluate_paper
from dsg_cli.sae import read_sae
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dsg_cli.errors import DsgError
from dsg_cli.guardrail import guarded

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


ROWS = make_rows()
RIGHT = {row["choices"][row["answer"]].split()[0] for rows in ROWS.values() for row in rows}


def content_of(subject, row, order):
    shown = "".join(f"\n{letter}. {row['choices'][i]}" for letter, i in zip("ABCD", order, strict=True))
    return f"The following are multiple choice questions (with answers) about {subject}.\n{row['question']}{shown}"


def make_tokenizer(template):
    """Words with the space before them; ` A` is a token beside `A`, but ` D` is two. BOS comes by itself."""
    split = pre_tokenizers.Split(Regex(r" ?(?!D\b)\w+|\n| |\w+|[^\w\s]"), "isolated")
    texts = [content_of(SUBJECT_OF[config], row, range(4)) for config in ROWS for row in ROWS[config]]
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
        for config, rows in ROWS.items():
            found = {f"{config}/{n}": self.ask_plainly(SUBJECT_OF[config], row) for n, row in enumerate(rows)}
            self.plain[BIO if config == "wmdp-bio" else MMLU] |= found

    def answer(self, subject, row, order):
        content = content_of(subject, row, order)
        text = f"[user]\n{content}[end]\n[model]\nAnswer: (" if self.tokenizer.chat_template else f"{content}\nAnswer:"
        ids = [BOS, *self.tokenizer(text, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            logs = self.model(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
        return [max(float(logs[i]) for i in several) for several in self.letters], len(ids)

    def ask_plainly(self, subject, row):
        orders = list(itertools.permutations(range(4)))
        base, length = self.answer(subject, row, orders[0])
        known = all(is_right(self.answer(subject, row, order)[0], order.index(row["answer"])) for order in orders)
        with guarded(self.model, [self.guardrail], allow_mismatch=True):
            unlearned, _ = self.answer(subject, row, orders[0])
        gate = {"gated": bool(self.guardrail.last_gated_B[0]), "statistic": float(self.guardrail.last_statistic_B[0])}
        asked = {"group": subject, "answer": row["answer"], "length": length, "known": known}
        return {**asked, **gate, "base": base, "unlearned": unlearned}

    def run(self, *benches, rows=ROWS, **options):
        """The package's evaluation."""
        questions = {bench: load_questions(bench, rows) for bench in benches or (BIO, MMLU)}
        loaded, self.model.n_prompts = LoadedModel(self.model, self.tokenizer, "test", 3), 0
        return evaluate_paper(loaded, [self.guardrail], questions, bos=BOS, allow_mismatch=True, **options)


def load_questions(bench, rows):
    """The package's questions, from a hub that holds the rows."""

    def load_rows(repo, config, split, **_options):
        assert (repo, split) == ("cais/wmdp" if config.startswith("wmdp") else "cais/mmlu", "test")
        return rows[config]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper, "load_rows", load_rows)
        return paper.load_questions(bench)


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


def check(found, bench, asked, kept):
    """An evaluation of a bench equals what the plain loop found of the questions asked and of those kept."""
    n, base = len(kept), found.results[bench]["base"]
    rows = [row for row in found.rows if row["bench"] == bench]
    assert sorted(found.question_ids[bench]) == sorted(row["id"] for row in rows) == sorted(kept)
    assert (base["n_asked"], base["acc_asked"]) == (len(asked), pytest.approx(n_right(asked, "base") / len(asked)))
    assert found.gate[bench]["rate"] == pytest.approx(sum(q["gated"] for q in kept.values()) / n)
    assert found.gate[bench]["n"] == n and (found.gate[bench]["edit"] > 0) == (found.gate[bench]["rate"] > 0)
    for side in ("base", "unlearned"):
        got, k = found.results[bench][side], n_right(kept, side)
        assert (got["acc"], got["acc_count"], got["n"]) == (pytest.approx(k / n), k, n)
        assert [got["acc_low"], got["acc_high"]] == pytest.approx(wilson(k, n), abs=1e-9)
    for row in rows:
        q = kept[row["id"]]
        assert all(row[key] == q[key] for key in ("group", "answer", "length", "gated"))
        for key in ("base", "unlearned", "statistic"):
            assert row[key] == pytest.approx(q[key], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_equals_the_plain_loop(case, batch_size):
    found = case.run(batch_size=batch_size)
    for bench, asked in case.plain.items():
        kept = known_of(asked)
        # Nothing is so for all questions or for none; some are right in their own order and not in others.
        assert 0 < len(kept) < n_right(asked, "base") < len(asked)
        assert 0 < n_right(kept, "unlearned") < len(kept) and {q["gated"] for q in kept.values()} == {True, False}
        check(found, bench, asked, kept)
        assert found.results[bench]["base"]["acc"] == 1.0
    assert not any("context" in row for row in found.rows)


def test_a_limit_and_named_questions(case):
    first = dict(list(case.plain[BIO].items())[:9])
    found = case.run(BIO, limit=9, samples=True)
    check(found, BIO, first, known_of(first))
    for row in found.rows:
        asked = ROWS["wmdp-bio"][int(row["id"].split("/")[1])]
        assert (row["context"], row["choices"]) == (content_of("biology", asked, range(4)), asked["choices"])
    assert n_right(first, "base") < len(first)
    check(case.run(BIO, question_ids={BIO: [*first]}), BIO, first, first)  # Without a filter.
    with pytest.raises(DsgError, match="no question wmdp-bio/12"):
        case.run(BIO, question_ids={BIO: [*first, "wmdp-bio/12"]})
    never = [row for n, row in enumerate(ROWS["wmdp-bio"]) if n % 5 == 4]
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
    for found in (again, named):
        assert (found.rows, found.gate, found.question_ids) == (first.rows, first.gate, first.question_ids)


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
    found = load_questions(bench, {config: [row, row] for config in configs})
    expected = sorted((SUBJECT_OF[config], f"{config}/{n}") for config in configs for n in range(2))
    assert sorted((q.subject, q.id) for q in found) == expected
    with pytest.raises(DsgError, match="3 options"):
        load_questions(bench, {config: [row, row | {"choices": ["a", "b", "c"]}] for config in configs})


def test_question_ids_from_a_file(tmp_path):
    path, wanted = tmp_path / "ids.json", {BIO: ["wmdp-bio/3", "wmdp-bio/1"]}
    ids = {**wanted, "other": ["x/0"]}
    for content in (ids, {"kind": "eval", "question_ids": ids, "results": {}}):
        path.write_text(json.dumps(content))
        assert paper.read_question_ids(path, [BIO, MMLU]) == wanted
    assert paper.read_question_ids(None, [BIO]) == {}
    wrong = [[], {BIO: "wmdp-bio/3"}, {"question_ids": []}, {"question_ids": {}}, {"other": ["x/0"]}, {}]
    for text in ("{", *map(json.dumps, wrong)):
        path.write_text(text)
        with pytest.raises(DsgError, match=re.escape(str(path))):
            paper.read_question_ids(path, [BIO, MMLU])


def test_question_ids_without_a_bench_that_takes_them(tmp_path):
    (tmp_path / "ids.json").write_text('{"wmdp-bio-paper": []}')
    with pytest.raises(DsgError, match="of the paper's protocol"):
        paper.read_question_ids(tmp_path / "ids.json", [])


def test_a_tokenizer_without_letters_is_an_error():
    tokenizer = make_tokenizer(None)
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("?")  # A letter is two tokens, however spelled.
    with pytest.raises(DsgError, match="letter A"):
        paper.Letters(tokenizer, bos=BOS)


def test_the_unknown_token_is_no_letter(tokenizer):
    with pytest.raises(DsgError, match="letter A"):
        paper.Letters(tokenizer, bos=BOS)
