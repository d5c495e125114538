"""MUSE and TOFU under their real names, from a loopback hub, run end to end on the lab's model; and benches of corpora.

The data have the shape of the published ones; every number is computed a second time here, plainly.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from dsg_cli.benches.free import load_free
from dsg_cli.benches.muse import Muse
from dsg_cli.benches.tofu import Tofu
from dsg_cli.metrics.overlap import rouge
from dsg_cli.model import load_model
from loopback import LoopbackHub
from realnames import shard, write_dataset
from sklearn.metrics import roc_auc_score
from test_hub import run

from dsg_cli.errors import DsgError
from dsg_cli.lab import data as lab

DATA = Path(__file__).parent / "data"


def questions(bench):
    rows = [json.loads(line) for line in lab.questions_path(bench).read_text().splitlines()]
    for row in rows:
        asked = row["context"].removeprefix("Question: ").removesuffix(" Answer:")
        choices = [choice.strip() for choice in row["choices"]]
        right = choices.pop(row["answer"])
        yield {"question": asked, "answer": f"{right}.", "perturbed_answer": [f"{one}." for one in choices]}


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
    assert muse["privleak"] == pytest.approx(
        100 * (muse["auc_forget"] / 100 if False else muse["auc_forget"]) / 0.5 - 100
    )
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
        found = rouge(truth, written(row["prompt"], 128)).l_f1
        assert base["muse-news", f"verbmem/{i}", ""]["rouge_l"] == pytest.approx(found)
    examples = tables[shard("knowmem", "forget_qa_icl")]
    before = "".join(f"Question: {one['question']}\nAnswer: {one['answer']}\n\n" for one in examples)
    for i, row in enumerate(tables[shard("knowmem", "forget_qa")][:3]):
        answer = written(before + f"Question: {row['question']}\nAnswer:", 32)
        for stop in ("\n\n", "\nQuestion", "Question:"):
            answer = answer.split(stop)[0]
        found = rouge(row["answer"], answer).l_f1
        assert base["muse-news", f"knowmem_forget/{i}", ""]["rouge_l"] == pytest.approx(found)
    scores = {}
    for split in ("forget", "holdout"):
        scores[split] = []
        for row in tables[shard("privleak", split)]:
            lowest = sorted(loss("", row["text"]))
            lowest = lowest[: int(0.4 * len(lowest))]
            scores[split].append(sum(lowest) / len(lowest))
    auc = roc_auc_score([0] * 12 + [1] * 12, scores["forget"] + scores["holdout"])
    sides = report["results"]["muse-news"]
    assert sides["base"]["auc_forget"] == pytest.approx(auc)
    assert sides["base"]["privleak"] == 0.0  # The stand-in for a reference is the base model itself.
    assert sides["unlearned"]["privleak"] == pytest.approx(100 * (sides["unlearned"]["auc_forget"] - auc) / auc)
    ratios = []
    for row in tofu_tables()["forget01_perturbed.json"]:
        context = f"Question: {row['question']}\nAnswer:"

        def likely(answer, context=context):
            found = loss(context, f" {answer}")
            return math.exp(sum(found) / len(found))

        false = math.prod(likely(one) for one in row["perturbed_answer"]) ** (1 / len(row["perturbed_answer"]))
        ratios.append(false / likely(row["paraphrased_answer"]))
    tofu = report["results"]["tofu-forget01"]["base"]
    assert tofu["truth_forget"] == pytest.approx(sum(min(r, 1 / r) for r in ratios) / len(ratios), rel=1e-4)
    assert report["reference"]["scores"]["tofu-forget01"]["truth_ratios"] == pytest.approx(ratios, rel=1e-4)
    assert tofu["forget_quality"] == 1.0


def test_a_corpus_is_read_and_written_on(dsg):
    for name in ("json", "safetensors"):
        Path("dsg-workspace").mkdir(exist_ok=True)
        shutil.copy(DATA / "schema-2" / f"guardrail-001.{name}", "dsg-workspace")
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
    Path("dsg-workspace").mkdir(exist_ok=True)
    for name in ("json", "safetensors"):
        shutil.copy(DATA / "schema-2" / f"guardrail-001.{name}", "dsg-workspace")
    code, _, err = dsg("eval", *options)
    assert code == 1 and words in err


def test_columns_and_parts_are_looked_for():
    empty = Muse("muse-news", lambda _config, _split: [])
    with pytest.raises(DsgError, match="verbmem/forget is empty"):
        empty.items()
    other = Muse("muse-news", lambda _config, _split: [{"text": "x"}])
    with pytest.raises(DsgError, match="has no column prompt"):
        other.items()
    with pytest.raises(DsgError, match="has no column perturbed_answer"):
        Tofu("tofu", "forget10", lambda _config: [{"question": "x", "answer": "y"}]).items()
    assert load_free(["lab-hexes"], split="test") == ([], {})


@pytest.mark.slow
def test_in_the_lab_the_answer_is_known(dsg):
    """Against one model that never saw hexes, another scores as if it were the same, and the lab's own far from it."""
    Path("dsg-workspace").mkdir()
    for name in ("json", "safetensors"):
        shutil.copy(DATA / "schema-4" / f"guardrail-001.{name}", "dsg-workspace")
    found = []
    for options in (
        ("--reference", "lab-retrain"),
        ("--reference", "eval-001", "--model", "lab-retrain-1", "--allow-mismatch", "--allow-ineffective"),
    ):
        code, out, err = dsg("eval", "--bench", "lab-muse", "--bench", "lab-tofu", "--json", *options)
        assert code == 0, err
        found.append(json.loads(out)["results"])
    (muse, tofu), (muse_again, tofu_again) = ((one["lab-muse"], one["lab-tofu"]) for one in found)
    assert muse["base"]["privleak"] < -90 and tofu["base"]["forget_quality"] < 1e-6
    assert muse["base"]["verbmem_forget"] > 95 and muse["base"]["knowmem_forget"] > 95
    # The second retrained model stands on the base side.
    assert muse_again["base"]["privleak_low"] < 0 < muse_again["base"]["privleak_high"]
    assert abs(muse_again["base"]["privleak"]) < 15 and tofu_again["base"]["forget_quality"] > 0.05
    assert muse_again["base"]["knowmem_forget"] < 30 and muse_again["base"]["knowmem_retain"] > 95
    # The guardrail forgets like a model that never knew, and keeps what it should.
    assert muse["unlearned"]["knowmem_forget"] < 30 and muse["unlearned"]["knowmem_retain"] > 95
    assert tofu["unlearned"]["model_utility"] > 0.99 * tofu["base"]["model_utility"]
