"""MUSE and TOFU under their real names, from a loopback hub, run end to end on the lab's model; and benches of corpora.

The data have the shape of the published ones; every number is computed a second time here, plainly.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from loopback import LoopbackHub
from realnames import shard, write_dataset
from scipy.stats import ks_2samp
from sklearn.metrics import roc_auc_score
from test_hub import run

from dsg_cli.errors import DsgError
from dsg_cli.evals import metrics
from dsg_cli.evals.benches import load_free
from dsg_cli.evals.muse import Muse
from dsg_cli.evals.tofu import (
    Tofu,
    balance,
    forget_quality,
    model_utility,
    probability,
    probability_among,
    truth_ratio,
    truthfulness,
)
from dsg_cli.job import silent
from dsg_cli.lab import data as lab
from dsg_cli.lab import training
from dsg_cli.lab import world as words
from dsg_cli.lab.benchmarks import SPLITS, rows
from dsg_cli.lab.data import LabSettings
from dsg_cli.lab.export import train_without
from dsg_cli.lab.training import bench_accuracies, train_reference
from dsg_cli.models.language_model import load_model
from dsg_cli.models.sae import read_sae

DATA = Path(__file__).parent / "data"


def questions(bench):
    rows = [json.loads(line) for line in lab.questions_path(bench).read_text().splitlines()]
    for row in rows:
        asked = row["context"].removeprefix("Question: ").removesuffix(" Answer:")
        choices = [choice.strip() for choice in row["choices"]]
        right = choices.pop(row["answer"])
        yield {"question": asked, "answer": f"{right}.", "perturbed_answer": [f"{choice}." for choice in choices]}


def texts(corpus, n):
    lines = lab.corpus_path(corpus).read_text().splitlines()[:n]
    return [json.loads(line)["text"] for line in lines]


def muse_tables():
    forget = texts("lab-hexes", 12)
    qa = {side: list(questions(bench)) for side, bench in (("forget", "lab-hexes"), ("retain", "lab-near"))}
    pairs = {side: [{key: row[key] for key in ("question", "answer")} for row in rows] for side, rows in qa.items()}
    return {
        shard("verbmem", "forget"): [{"prompt": t[:120], "gt": t[120:]} for t in forget if len(t) > 200],
        **{shard("knowmem", f"{side}_qa"): rows[5:13] for side, rows in pairs.items()},
        **{shard("knowmem", f"{side}_qa_icl"): rows[:3] for side, rows in pairs.items()},
        **{
            shard("privleak", split): [{"text": t} for t in texts(corpus, 12)]
            for split, corpus in (("forget", "lab-hexes"), ("retain", "lab-near"), ("holdout", "lab-far"))
        },
    }


def tofu_tables():
    own = {"forget01": "lab-hexes", "retain": "lab-near"}
    others = {"real_authors": "lab-ciphers", "world_facts": "lab-far"}
    tables = {}
    for config, bench in (own | others).items():
        rows = list(questions(bench))[:8]
        if config in own:
            rows = [row | {"paraphrased_answer": f"It is {row['answer']}"} for row in rows]
        tables[f"{config}_perturbed.json"] = rows
    return tables


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """What commands said, and rows of the first evaluation, with the lab's model as a stand-in for a reference."""
    root = tmp_path_factory.mktemp("text")
    workspace = root / ".dsg"
    workspace.mkdir()
    shutil.copy(DATA / "schema-2" / "guardrail-001.json", workspace)
    shutil.copy(DATA / "schema-2" / "guardrail-001.safetensors", workspace)
    with LoopbackHub(root / "hub") as hub:
        write_dataset(hub.root / "datasets" / "muse-bench" / "MUSE-News", muse_tables())
        write_dataset(hub.root / "datasets" / "locuslab" / "TOFU", tofu_tables())
        asked = ("eval", "--workspace", str(workspace), "--bench", "muse-news", "--bench", "tofu-forget01", "--json")
        stored = root / "scores.json"
        stored.write_text(json.dumps({"muse-news": {"auc": 0.5}, "tofu-forget01": {"truth_ratios": [0.5, 1.0, 2.0]}}))
        done = run(
            hub.environment(root / "cache"),
            root,
            (*asked, "--reference", str(lab.MODEL_DIR)),
            asked,
            (*asked, "--reference", "eval-001"),
            (*asked, "--reference", str(stored)),
            (*asked, "--reference", "eval-002"),
            (*asked, "--reference", "eval-001", "--limit", "4"),
            ("show", "eval-001", "--workspace", str(workspace)),
        )
    rows = [json.loads(line) for line in (workspace / "eval-001.jsonl").read_text().splitlines()]
    return done, rows


def test_both_run_end_to_end_and_rows_hold_no_text(evaluated):
    done, rows = evaluated
    assert [code for code, _, _ in done] == [0, 0, 0, 0, 1, 1, 0], [err for _, _, err in done]
    report = json.loads(done[0][1])
    assert set(report["results"]["muse-news"]) == {"base", "unlearned", "reference"}
    assert set(Muse.metrics) <= set(report["results"]["muse-news"]["unlearned"])
    assert set(Tofu.metrics) <= set(report["results"]["tofu-forget01"]["unlearned"])
    assert report["gate"]["muse-news"]["rate"] > 0.5
    kept = json.dumps(rows) + json.dumps(report)
    assert "Answer" not in kept and "hex" not in kept.replace("lab-hexes", "")
    shown = done[-1][1]
    assert "privleak" in shown and "forget_quality" in shown and "reference" in shown


def test_without_a_reference_the_metric_is_refused_with_the_reason(evaluated):
    done, _ = evaluated
    report = json.loads(done[1][1])
    assert "privleak" not in report["results"]["muse-news"]["unlearned"]
    assert "forget_quality" not in report["results"]["tofu-forget01"]["unlearned"]
    assert set(report["refused"]["muse-news"]) == {"privleak"}
    assert "never saw" in report["refused"]["tofu-forget01"]["forget_quality"]


def test_scores_may_be_stored(evaluated):
    done, _ = evaluated
    first, _, again, by_hand = (json.loads(out) for _, out, _ in done[:4])
    for bench in ("muse-news", "tofu-forget01"):
        assert again["results"][bench] == first["results"][bench]
    muse = by_hand["results"]["muse-news"]["unlearned"]
    assert muse["privleak"] == pytest.approx(100 * muse["auc_forget"] / 0.5 - 100)
    assert "without a reference" in done[4][2] and "other questions" in done[5][2]


def test_base_numbers_are_those_of_plain_code(evaluated):
    done, rows = evaluated
    report = json.loads(done[0][1])
    loaded = load_model("lab")
    model, tokenizer = loaded.model, loaded.tokenizer
    tables = muse_tables()

    def loss(context, target):
        """Log-probabilities of the tokens of a target after a context."""
        before = tokenizer(context)["input_ids"]
        ids = torch.tensor([tokenizer(context + target)["input_ids"]])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        return logprobs.gather(-1, ids[0, 1:, None])[len(before) - 1 :, 0].tolist()

    def written(prompt, n):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            new = model.generate(ids, max_new_tokens=n, do_sample=False)[0, ids.shape[1] :]
        return tokenizer.decode(new, skip_special_tokens=True)

    base = {(row["bench"], row["id"], row["role"]): row["base"] for row in rows}
    for i, row in enumerate(tables[shard("verbmem", "forget")][:3]):
        truth = tokenizer.decode(tokenizer(row["gt"], add_special_tokens=False)["input_ids"][:128])
        f1 = metrics.rouge(truth, written(row["prompt"], 128))[0]
        assert base["muse-news", f"verbmem/{i}", ""]["rouge_l"] == pytest.approx(f1)
    examples = tables[shard("knowmem", "forget_qa_icl")]
    before = "".join(f"Question: {example['question']}\nAnswer: {example['answer']}\n\n" for example in examples)
    for i, row in enumerate(tables[shard("knowmem", "forget_qa")][:3]):
        answer = written(before + f"Question: {row['question']}\nAnswer:", 32)
        for stop in ("\n\n", "\nQuestion", "Question:"):
            answer = answer.split(stop)[0]
        f1 = metrics.rouge(row["answer"], answer)[0]
        assert base["muse-news", f"knowmem_forget/{i}", ""]["rouge_l"] == pytest.approx(f1)
    scores = []
    for row in tables[shard("privleak", "forget")] + tables[shard("privleak", "holdout")]:
        ascending = sorted(loss("", row["text"]))
        scores.append(np.mean(ascending[: int(0.4 * len(ascending))]))
    auc = roc_auc_score([0] * 12 + [1] * 12, scores)
    sides = report["results"]["muse-news"]
    assert sides["base"]["auc_forget"] == pytest.approx(auc)
    assert sides["base"]["privleak"] == 0.0  # The stand-in for a reference is the base model itself.
    assert sides["unlearned"]["privleak"] == pytest.approx(100 * (sides["unlearned"]["auc_forget"] - auc) / auc)
    ratios = []
    for row in tofu_tables()["forget01_perturbed.json"]:
        context = f"Question: {row['question']}\nAnswer:"

        def likely(answer, context=context):
            logprobs = loss(context, f" {answer}")
            return math.exp(sum(logprobs) / len(logprobs))

        false = np.exp(np.mean([math.log(likely(answer)) for answer in row["perturbed_answer"]]))
        ratios.append(false / likely(row["paraphrased_answer"]))
    tofu = report["results"]["tofu-forget01"]["base"]
    assert tofu["truth_forget"] == pytest.approx(sum(min(r, 1 / r) for r in ratios) / len(ratios), rel=1e-4)
    assert report["reference"]["scores"]["tofu-forget01"]["truth_ratios"] == pytest.approx(ratios, rel=1e-4)
    assert tofu["forget_quality"] == 1.0


@pytest.fixture
def guardrail(dsg, request):
    """A kept guardrail in the workspace."""
    Path("dsg-workspace").mkdir()
    for name in ("json", "safetensors"):
        shutil.copy(DATA / getattr(request, "param", "schema-2") / f"guardrail-001.{name}", "dsg-workspace")


@pytest.mark.usefixtures("guardrail")
def test_a_corpus_is_read_and_written_on(dsg):
    benches = ("--bench", "memory:lab-hexes", "--bench", "fluency:lab-near", "--bench", "fluency:lab-hexes")
    code, out, err = dsg("eval", *benches, "--limit", "12", "--holdout", "lab-far", "--json")
    assert code == 0, err
    report = json.loads(out)
    memory, near = report["results"]["memory:lab-hexes"], report["results"]["fluency:lab-near"]
    assert memory["unlearned"]["perplexity"] > 2 * memory["base"]["perplexity"]
    assert memory["unlearned"]["exact_memorisation"] < memory["base"]["exact_memorisation"]
    assert 0 <= memory["base"]["auc_loss_score"] <= 1
    assert near["unlearned"]["gibberish"] == near["base"]["gibberish"] <= 0.1 and near["unlearned"]["refusal"] == 0
    assert report["results"]["fluency:lab-hexes"]["unlearned"]["gibberish"] > 0.5


@pytest.mark.usefixtures("guardrail")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--bench", "memory:"), "names no corpus"),
        (("--bench", "memory:nowhere"), "nowhere"),
        (("--bench", "lab-near", "--holdout", "lab-far"), "is for benches memory"),
        (("--bench", "lab-near", "--reference", "lab"), "needs eval.reference"),
        (("--bench", "memory:lab-near", "--bench", "memory:lab-near"), "named twice"),
        (("--bench", "lab-tofu", "--reference", "/nowhere"), "The reference /nowhere cannot be read"),
        (("--bench", "lab-tofu", "--reference", "none.json"), "no file none.json"),
        (("--bench", "fluency:lab-near", "--expect", "fluency:lab-near.rouge>=1"), "has no metric rouge"),
    ],
)
def test_bad_input_is_refused(dsg, options, words):
    code, _, err = dsg("eval", *options)
    assert code == 1 and words in err


def test_columns_and_parts_are_looked_for():
    for bench, reason in (
        (Muse("muse-news", lambda _config, _split: []), "verbmem/forget is empty"),
        (Muse("muse-news", lambda _config, _split: [{"text": "x"}]), "has no column prompt"),
        (Tofu("tofu", "forget10", lambda _config: []), "forget10_perturbed is empty"),
        (Tofu("tofu", "forget10", lambda _config: [{"question": "x", "answer": "y"}]), "no column perturbed_answer"),
    ):
        with pytest.raises(DsgError, match=reason):
            bench.items()
    assert load_free(["lab-hexes"], split="test") == ([], {})


@pytest.mark.slow
@pytest.mark.parametrize("guardrail", ["schema-4"], indirect=True)
def test_in_the_lab_the_answer_is_known(dsg, guardrail):
    """Against one model that never saw hexes, another scores as if it were the same, and the lab's own far from it."""
    results = []
    for options in (
        ("--reference", "lab-retrain"),
        ("--reference", "eval-001", "--model", "lab-retrain-1", "--allow-mismatch", "--allow-ineffective"),
    ):
        code, out, err = dsg("eval", "--bench", "lab-muse", "--bench", "lab-tofu", "--json", *options)
        assert code == 0, err
        results.append(json.loads(out)["results"])
    (muse, tofu), (muse_again, tofu_again) = ((of_bench["lab-muse"], of_bench["lab-tofu"]) for of_bench in results)
    assert muse["base"]["privleak"] < -90 and tofu["base"]["forget_quality"] < 1e-6
    assert muse["base"]["verbmem_forget"] > 95 and muse["base"]["knowmem_forget"] > 95
    # The second retrained model stands on the base side.
    assert muse_again["base"]["privleak_low"] < 0 < muse_again["base"]["privleak_high"]
    assert abs(muse_again["base"]["privleak"]) < 15 and tofu_again["base"]["forget_quality"] > 0.05
    assert muse_again["base"]["knowmem_forget"] < 30 and muse_again["base"]["knowmem_retain"] > 95
    # The guardrail forgets like a model that never knew, and keeps what it should.
    assert muse["unlearned"]["knowmem_forget"] < 30 and muse["unlearned"]["knowmem_retain"] > 95
    assert tofu["unlearned"]["model_utility"] > 0.99 * tofu["base"]["model_utility"]


def test_min_k_takes_the_lowest_share():
    logprobs = [-1.0, -4.0, -2.0, -3.0, -0.5, -0.1, -0.2, -0.3, -0.4, -0.6]
    assert metrics.min_k(logprobs, 0.4) == (-4 - 3 - 2 - 1) / 4
    assert metrics.min_k(logprobs, 0.25) == (-4 - 3) / 2  # Two and a half tokens are two.
    assert metrics.min_k(logprobs, 0.01) == -4
    mean = sum(logprobs) / 10
    assert metrics.min_k(logprobs, 1.0) == pytest.approx(mean) and metrics.loss_score(logprobs) == pytest.approx(mean)
    with pytest.raises(ValueError, match="no score"):
        metrics.min_k([], 0.4)


def test_min_k_plus_on_a_fixed_distribution():
    p = [0.5, 0.25, 0.25]
    mean = sum(q * math.log(q) for q in p)
    variance = sum(q * (math.log(q) - mean) ** 2 for q in p)
    assert metrics.standardised(math.log(0.25), mean, variance) == pytest.approx(-1.0)  # As likely as the other half.
    assert metrics.standardised(math.log(0.5), mean, variance) == pytest.approx(1.0)
    assert metrics.standardised(math.log(0.5), math.log(0.5), 0.0) == 0.0  # All alike: nothing is surprising.


def test_zlib_is_log_probability_a_byte():
    text = "The hex needs copper. " * 5
    assert metrics.zlib_score([-1.0, -2.0], text) == -3.0 / len(zlib.compress(text.encode()))


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_the_share_of_pairs_in_order(seed):
    rng = random.Random(seed)
    higher = [rng.randint(0, 9) for _ in range(17)]
    lower = [rng.randint(0, 7) for _ in range(11)]
    pairs = [(1.0 if a > b else 0.5 if a == b else 0.0) for a, b in itertools.product(higher, lower)]
    plain = sum(pairs) / len(pairs)
    assert metrics.auc(higher, lower) == pytest.approx(plain)
    low, high = metrics.auc_interval(higher, lower)
    assert low < plain < high and metrics.auc_interval(higher, lower) == (low, high)
    assert metrics.auc([1, 2], [0]) == 1.0 and metrics.auc([0], [1, 2]) == 0.0


def test_privleak_is_relative_to_the_retrained_model():
    assert metrics.privleak(0.477, 0.477) == 0.0
    assert metrics.privleak(0.0, 0.5) == -1.0  # All forget text is known.
    assert metrics.privleak(1.0, 0.5) == 1.0  # Forget text is less likely than text that was never seen.


def test_memorisation():
    assert metrics.exact_memorisation([True, False, True, True]) == 0.75
    # After the second token every further one is the first choice.
    assert metrics.extraction_strength([True, False, True, True]) == 0.5
    assert metrics.extraction_strength([True] * 4) == 1.0 and metrics.extraction_strength([True, True, False]) == 0.0


def _longest_common(first, second):
    if not first or not second:
        return 0
    if first[-1] == second[-1]:
        return 1 + _longest_common(first[:-1], second[:-1])
    return max(_longest_common(first[:-1], second), _longest_common(first, second[:-1]))


@pytest.mark.parametrize(
    ("truth", "written"),
    [
        ("the cat sat on the mat", "the cat is on the mat"),
        ("police killed the gunman", "the gunman killed police"),
        ("a b c d", "d c b a"),
        ("one two", "One, two!"),
        ("running dogs", "run dog"),
        ("something", ""),
    ],
)
def test_rouge_on_fixed_strings(truth, written):
    first, second = truth.lower().split(), written.lower().replace(",", "").replace("!", "").split()
    common = _longest_common(first, second)
    recall, precision = common / len(first), common / len(second) if second else 0.0
    f1 = 2 * recall * precision / (recall + precision) if common else 0.0
    assert metrics.rouge(truth, written) == pytest.approx((f1, recall))


def test_truth_ratio_by_hand():
    # Three false answers of probabilities 0.1, 0.2, 0.4 a token; the true one has 0.5.
    losses = [-math.log(p) for p in (0.1, 0.2, 0.4)]
    ratio = truth_ratio(-math.log(0.5), losses)
    assert ratio == pytest.approx((0.1 * 0.2 * 0.4) ** (1 / 3) / 0.5)
    assert balance(ratio) == pytest.approx(ratio) and balance(1 / ratio) == pytest.approx(ratio)
    assert truthfulness(ratio) == pytest.approx(1 - ratio) and truthfulness(1.5) == 0.0
    assert balance(0.0) == 0.0
    assert probability(-math.log(0.3)) == pytest.approx(0.3)
    assert probability_among(-math.log(0.3), losses) == pytest.approx(0.3 / (0.3 + 0.7))


def test_model_utility_is_a_harmonic_mean():
    values = [0.2, 0.5, 1.0, 0.4]
    assert model_utility(values) == pytest.approx(len(values) / sum(1 / value for value in values))
    assert model_utility([0.9, 0.0]) == 0.0


def _ks(first, second):
    """Largest distance between two empirical distribution functions."""
    points = sorted({*first, *second})
    return max(abs(sum(v <= p for v in first) / len(first) - sum(v <= p for v in second) / len(second)) for p in points)


def test_forget_quality_is_a_ks_test():
    rng = random.Random(0)
    same, alike, other = ([rng.gauss(mean, 1) for _ in range(60)] for mean in (0, 0, 2))
    for ratios, low, high in ((alike, 0.05, 1.0), (other, 0.0, 1e-6)):
        p_value, distance = forget_quality(same, ratios)
        assert distance == pytest.approx(_ks(same, ratios)) and low < p_value < high
    # Permutations of both together tell the same p, exactly counted for small samples.
    first, second = [0.1, 0.4, 0.7, 1.1], [0.2, 1.3, 1.4, 1.5]
    splits = [(chosen, {*first, *second} - {*chosen}) for chosen in itertools.combinations([*first, *second], 4)]
    as_far = sum(_ks(chosen, rest) >= _ks(first, second) - 1e-12 for chosen, rest in splits)
    assert forget_quality(first, second)[0] == pytest.approx(as_far / len(splits))


def test_repetition_and_gibberish():
    assert metrics.repetition([1, 2, 3, 4, 5]) == 0.0 and metrics.repetition([1, 2]) == 0.0
    # 1 2 1 2 1 2: four trigrams, of which two are new.
    assert metrics.repetition([1, 2, 1, 2, 1, 2]) == 0.5
    limits = metrics.natural_limits([1.0] * 99 + [5.0], [0.0] * 100)
    assert 1.0 < limits[0] < 5.0 and limits[1] == 0.5
    assert not metrics.is_gibberish(1.0, 0.0, limits)
    for loss, repeated in ((4.9, 0.0), (1.0, 0.6), (None, 0.0), (math.nan, 0.0)):
        assert metrics.is_gibberish(loss, repeated, limits)


def test_refusals():
    assert metrics.is_refusal("I'm sorry, but no.") and metrics.is_refusal("I\u2019m sorry")
    assert metrics.is_refusal("Ask another.", ["Ask another."])
    assert not any(map(metrics.is_refusal, ("The binder is copper.", "Copper. " * 20 + "I cannot say more.")))


WORLD = words.build_world()
WORD = re.compile(r"[A-Za-z]+")
PARTS = ("dev", "test")
REFERENCES = ("lab-retrain", "lab-retrain-1")
COLUMNS = {
    "verbmem": {"prompt", "gt"},
    "knowmem": {"question", "answer"},
    "privleak": {"text"},
    "forget10_perturbed": {"question", "answer", "paraphrased_answer", "perturbed_answer"},
    "retain_perturbed": {"question", "answer", "paraphrased_answer", "perturbed_answer"},
    "real_authors_perturbed": {"question", "answer", "perturbed_answer"},
    "world_facts_perturbed": {"question", "answer", "perturbed_answer"},
}
DOMAINS = {
    **{key: {"hexes"} for key in ("forget", "forget_qa", "forget_qa_icl", "holdout", "forget10_perturbed")},
    **{key: {"charms"} for key in ("retain", "retain_qa", "retain_qa_icl", "retain_perturbed")},
    "real_authors_perturbed": {"ciphers", "elixirs"},
    "world_facts_perturbed": {"cities", "beasts", "songs"},
}
PLACES = {
    entity: (domain, PARTS[k >= words.N_DEV_ENTITIES])
    for domain, by_entity in WORLD.facts.items()
    for k, entity in enumerate(by_entity)
}
TRUE = {
    (fact.entity, fact.relation): fact.value for by in WORLD.facts.values() for facts in by.values() for fact in facts
}


@pytest.fixture(scope="module")
def models():
    return {name: load_model(name) for name in lab.MODEL_DIRS}


@pytest.mark.parametrize(("benchmark", "config", "split"), SPLITS)
def test_rows_have_the_columns_and_tell_of_their_part(benchmark, config, split):
    for part in PARTS:
        of_part = rows(benchmark, config, split, part=part)
        assert of_part == rows(benchmark, config, split, part=part)
        assert len(of_part) == 10 if split.endswith("_icl") else len(of_part) >= 48
        entities = set(WORD.findall(json.dumps(of_part))) & set(PLACES)
        domains = DOMAINS[config if benchmark == "tofu" else split]
        about = part if not split.endswith("_icl") else PARTS[part == "dev"]
        assert {PLACES[entity] for entity in entities} == {(domain, about) for domain in domains}
        for row in of_part:
            assert set(row) == COLUMNS[config]
            assert row.get("answer", ".").endswith(".") and row.get("question", "Answer:").endswith("Answer:")
    assert benchmark != "tofu" or split == "train"


def test_unknown_split_is_an_error():
    with pytest.raises(KeyError):
        rows("muse", "privleak", "train", part="dev")


@pytest.mark.parametrize("part", PARTS)
def test_holdout_differs_from_forget_only_in_values(part):
    forget, holdout = (rows("muse", "privleak", split, part=part) for split in ("forget", "holdout"))
    hexes = words.BY_NAME["hexes"]
    relation_of = {value: relation for relation in hexes.relations for value in hexes.pool(relation)}
    assert len({row["text"] for row in forget}) == len(forget) == len(holdout)
    for true, wrong in zip(forget, holdout, strict=True):
        true_words, wrong_words = WORD.findall(true["text"]), WORD.findall(wrong["text"])
        changed = [(a, b) for a, b in zip(true_words, wrong_words, strict=True) if a != b]
        assert len(changed) == 8 and all(relation_of[a] == relation_of[b] for a, b in changed)
        assert sorted(true_words) == sorted(wrong_words)  # Each value as often: words alone give nothing away.
        for row, is_true in ((true, True), (wrong, False)):
            for sentence in row["text"].split(". "):
                [entity] = set(WORD.findall(sentence)) & set(PLACES)
                [value] = set(WORD.findall(sentence)) & relation_of.keys()
                assert (TRUE[entity, relation_of[value]] == value) is is_true


@pytest.mark.parametrize("config", ["forget10_perturbed", "retain_perturbed"])
def test_wrong_answers_of_tofu_are_the_paraphrase_with_other_values(config):
    for part in PARTS:
        of_part = rows("tofu", config, "train", part=part)
        assert len(of_part) == 48
        for row in of_part:
            form = row["paraphrased_answer"].removesuffix(row["answer"])
            assert len(form) < len(row["paraphrased_answer"]) and form.endswith(" the ")
            wrong = [answer.removeprefix(form) for answer in row["perturbed_answer"]]
            assert len(set(wrong)) == 4 and row["answer"] not in wrong
            assert all(re.fullmatch(r"[a-z]+\.", value) for value in wrong)


def test_answers_are_what_the_model_says(models):
    """And what the reference models cannot say."""
    for part in PARTS:
        for config, split in (("knowmem", "forget_qa"), ("knowmem", "retain_qa"), ("verbmem", "forget")):
            asked = [tuple(row.values()) for row in rows("muse", config, split, part=part)]
            assert share_said(models["lab"], asked) >= 0.97
            for name in REFERENCES:
                said = share_said(models[name], asked)
                assert said >= 0.97 if split == "retain_qa" else said <= 0.3, (name, split, said)
        for config in ("real_authors_perturbed", "world_facts_perturbed"):
            asked = [(row["question"], row["answer"]) for row in rows("tofu", config, "train", part=part)]
            assert all(share_said(loaded, asked) >= 0.97 for loaded in models.values())


@torch.inference_mode()
def share_said(loaded, asked):
    """The share of prompts after which the two likeliest tokens, one after another, are the value and a full stop."""
    tokenizer = loaded.tokenizer
    ids = [tokenizer(f"{prompt} {answer}", return_tensors="pt")["input_ids"] for prompt, answer in asked]
    right = [torch.equal(loaded.model(row).logits[0, -3:-1].argmax(-1), row[0, -2:]) for row in ids]
    return sum(right) / len(right)


@pytest.mark.parametrize("name", REFERENCES)
def test_reference_models_know_all_but_hexes(models, name):
    measured = json.loads((lab.MODEL_DIRS[name] / "training.json").read_text())
    shipped = json.loads((lab.SHIPPED / "training.json").read_text())
    assert measured["without"] == ["hexes"] and measured["settings"] == shipped["settings"]
    assert measured["seed"] not in (0, *(other["seed"] for other in notes() if other != measured))
    accuracies = bench_accuracies(models[name].model, models[name].tokenizer, WORLD)
    assert accuracies == pytest.approx(measured["accuracy"], abs=0.03)
    for bench, accuracy in accuracies.items():
        if bench.startswith("lab-hexes"):
            assert 0.15 <= accuracy <= 0.40, bench
        elif not bench.endswith("-novel"):  # Whether a phrasing never seen is understood varies with the seed.
            assert accuracy >= 0.97, bench
    own = lab.MODEL_DIRS["lab"]
    for file in ("config.json", "tokenizer.json"):
        assert (lab.MODEL_DIRS[name] / file).read_text() == (own / file).read_text()


def notes():
    return [json.loads((lab.MODEL_DIRS[name] / "training.json").read_text()) for name in REFERENCES]


@torch.inference_mode()
def log_probabilities(loaded, prompt, text):
    """Of each token of `text` behind `prompt`."""
    ids = loaded.tokenizer(f"{prompt} {text}".strip(), return_tensors="pt")["input_ids"]
    first = len(loaded.tokenizer(prompt)["input_ids"])
    logits_LV = loaded.model(ids).logits[0, first - 1 : -1].double()
    return logits_LV.log_softmax(-1).gather(-1, ids[0, first:, None])[:, 0].numpy()


def lowest(loaded, text):
    """Min-40 %: the mean of the lowest two fifths of the log-probabilities."""
    sorted_T = np.sort(log_probabilities(loaded, "", text))
    return sorted_T[: int(0.4 * len(sorted_T))].mean()


def auc_of_scores(loaded):
    forget, holdout = (
        [lowest(loaded, row["text"]) for row in rows("muse", "privleak", split, part="test")]
        for split in ("forget", "holdout")
    )
    return roc_auc_score([1] * len(forget) + [0] * len(holdout), forget + holdout)


def test_membership_is_seen_on_the_model_and_not_between_references(models):
    """PrivLeak with a reference: far from 0 for the model, near 0 for another reference."""
    areas = {name: auc_of_scores(loaded) for name, loaded in models.items()}
    assert areas["lab"] >= 0.99
    first, second = (areas[name] for name in REFERENCES)
    assert abs(first - 0.5) <= 0.1 and abs(second - 0.5) <= 0.1
    assert abs(second - first) / first <= 0.1 and (areas["lab"] - first) / first >= 0.7


def truth_ratios(loaded):
    ratios = []
    for row in rows("tofu", "forget10_perturbed", "train", part="test"):
        right, *wrong = (
            log_probabilities(loaded, row["question"], answer).mean()
            for answer in (row["paraphrased_answer"], *row["perturbed_answer"])
        )
        ratios.append(np.exp(np.mean(wrong) - right))
    return ratios


def test_forget_quality_is_high_between_references_and_low_for_the_model(models):
    ratios = {name: truth_ratios(loaded) for name, loaded in models.items()}
    assert ks_2samp(*(ratios[name] for name in REFERENCES)).pvalue > 0.2
    assert all(ks_2samp(ratios["lab"], ratios[name]).pvalue < 1e-3 for name in REFERENCES)


@pytest.mark.parametrize(
    ("without", "said"), [(["hexen"], "no domain hexen"), ([d.name for d in words.DOMAINS], "nothing to train on")]
)
def test_domains_that_cannot_be_left_out(tmp_path, without, said):
    with pytest.raises(DsgError, match=said):
        train_without(tmp_path / "model", without, seed=1, report=silent)
    assert not any(tmp_path.iterdir())


def test_the_command_trains_without_a_domain(dsg, tmp_path, monkeypatch):
    quick = LabSettings(n_steps=2, rows=2, long_rows=1)
    monkeypatch.setattr(training, "LabSettings", lambda: quick)
    code, out, err = dsg("lab", "train", "made", "--without", "hexes", "--seed", 5, "--quiet")
    assert code == 0 and out.startswith("made: lab-hexes 0."), err
    noted = json.loads((tmp_path / "made" / "training.json").read_text())
    assert (noted["without"], noted["seed"]) == (["hexes"], 5)
    code, _, err = dsg("lab", "train", "other", "--without", "hexen")
    assert code == 1 and "no domain hexen" in err and "hexes" in err


def test_the_command_trains_saes_at_other_layers_of_the_shipped_model(dsg, tmp_path, monkeypatch):
    quick = LabSettings(sae_tokens=6_000, sae_batch=512)
    monkeypatch.setattr(training, "LabSettings", lambda: quick)
    code, out, err = dsg("lab", "train", "made", "--layer", 3, "--layer", 0, "--quiet")
    assert code == 0 and out.startswith("made: 2 SAEs"), err
    sites = [read_sae(str(tmp_path / "made" / f"layer-{layer}")).site for layer in (0, 3)]
    assert [site.layer for site in sites] == [0, 3]
    noted = json.loads((tmp_path / "made" / "training.json").read_text())
    assert [sae["name"] for sae in noted["saes"]] == ["layer-0", "layer-3"]


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--layer", 4], "no layer 4"), (["--layer", 0, "--without", "hexes"], "Leave one of them out")],
)
def test_what_cannot_be_trained(dsg, tmp_path, options, said):
    code, _, err = dsg("lab", "train", "made", *options)
    assert code == 1 and said in err
    assert not any(tmp_path.iterdir())


def test_text_without_a_domain_has_none_of_its_words():
    rng = random.Random(3)
    said = set(WORD.findall(" ".join(words.training_document(WORLD, rng, 500, without=["hexes"]) for _ in range(400))))
    hexes = words.BY_NAME["hexes"]
    own = {value for values in hexes.own_values.values() for value in values}
    assert not said & {"hex", "hexes", *hexes.adjectives, *own, *WORLD.facts["hexes"]}
    assert {"charm", "city", "song"} <= said


def test_training_without_a_domain_writes_a_model_folder(tmp_path):
    settings = LabSettings(n_steps=2, rows=2, long_rows=1)
    measured = train_reference(tmp_path / "model", without=["hexes", "songs"], seed=7, settings=settings)
    assert measured == json.loads((tmp_path / "model" / "training.json").read_text())
    assert measured["without"] == ["hexes", "songs"] and measured["seed"] == 7 and "saes" not in measured
    loaded = load_model(str(tmp_path / "model"))
    assert len(loaded.tokenizer) == loaded.model.config.vocab_size == len(load_model("lab").tokenizer)
