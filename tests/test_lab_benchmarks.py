"""The lab's MUSE and TOFU: their columns and parts, and known answers from models that never saw hexes."""

import json
import random
import re

import numpy as np
import pytest
import torch
from dsg_cli.lab.language_model import bench_accuracies
from dsg_cli.lab.settings import LabSettings
from dsg_cli.model import load_model
from dsg_cli.progress import silent
from dsg_cli.sae import read_sae
from scipy.stats import ks_2samp
from sklearn.metrics import roc_auc_score

from dsg_cli.errors import DsgError
from dsg_cli.lab import data, training, words, world
from dsg_cli.lab.benchmarks import SPLITS, rows
from dsg_cli.lab.export import train_without
from dsg_cli.lab.training import train_reference

WORLD = world.build_world()
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
    return {name: load_model(name) for name in data.MODEL_DIRS}


@pytest.mark.parametrize(("benchmark", "config", "split"), SPLITS)
def test_rows_have_the_columns_and_tell_of_their_part(benchmark, config, split):
    for part in PARTS:
        found = rows(benchmark, config, split, part=part)
        assert found == rows(benchmark, config, split, part=part)
        assert len(found) == 10 if split.endswith("_icl") else len(found) >= 48
        told = set(WORD.findall(json.dumps(found))) & set(PLACES)
        domains = DOMAINS[config if benchmark == "tofu" else split]
        about = part if not split.endswith("_icl") else PARTS[part == "dev"]
        assert {PLACES[entity] for entity in told} == {(domain, about) for domain in domains}
        for row in found:
            assert set(row) == COLUMNS[config]
            assert row.get("answer", ".").endswith(".") and row.get("question", "Answer:").endswith("Answer:")
    assert benchmark != "tofu" or split == "train"


def test_unknown_split_is_an_error():
    with pytest.raises(KeyError):
        rows("muse", "privleak", "train", part="dev")


@pytest.mark.parametrize("part", PARTS)
def test_holdout_differs_from_forget_only_in_values(part):
    forget, holdout = (rows("muse", "privleak", split, part=part) for split in ("forget", "holdout"))
    values = {value for relation in words.MAGIC_RELATIONS for value in words.BY_NAME["hexes"].pool(relation)}
    relation_of = {value: r for r in words.MAGIC_RELATIONS for value in words.BY_NAME["hexes"].pool(r)}
    assert len({row["text"] for row in forget}) == len(forget) == len(holdout)
    for true, wrong in zip(forget, holdout, strict=True):
        true_words, wrong_words = WORD.findall(true["text"]), WORD.findall(wrong["text"])
        changed = [(a, b) for a, b in zip(true_words, wrong_words, strict=True) if a != b]
        assert len(changed) == 8 and all({a, b} <= values and relation_of[a] == relation_of[b] for a, b in changed)
        assert sorted(true_words) == sorted(wrong_words)  # Each value as often: words alone give nothing away.
        for sentence, is_true in [(s, True) for s in true["text"].split(". ")] + [
            (s, False) for s in wrong["text"].split(". ")
        ]:
            [entity] = set(WORD.findall(sentence)) & set(PLACES)
            [value] = set(WORD.findall(sentence)) & values
            assert (TRUE[entity, relation_of[value]] == value) is is_true


@pytest.mark.parametrize(("config", "n"), [("forget10_perturbed", 48), ("retain_perturbed", 48)])
def test_wrong_answers_of_tofu_are_the_paraphrase_with_other_values(config, n):
    for part in PARTS:
        found = rows("tofu", config, "train", part=part)
        assert len(found) == n
        for row in found:
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
    right = [torch.equal(loaded.model(one).logits[0, -3:-1].argmax(-1), one[0, -2:]) for one in ids]
    return sum(right) / len(right)


@pytest.mark.parametrize("name", REFERENCES)
def test_reference_models_know_all_but_hexes(models, name):
    measured = json.loads((data.MODEL_DIRS[name] / "training.json").read_text())
    shipped = json.loads((data.SHIPPED / "training.json").read_text())
    assert measured["without"] == ["hexes"] and measured["settings"] == shipped["settings"]
    assert measured["seed"] not in (0, *(other["seed"] for other in notes() if other != measured))
    accuracies = bench_accuracies(models[name].model, models[name].tokenizer, WORLD)
    assert accuracies == pytest.approx(measured["accuracy"], abs=0.03)
    for bench, accuracy in accuracies.items():
        if bench.startswith("lab-hexes"):
            assert 0.15 <= accuracy <= 0.40, bench
        elif not bench.endswith("-novel"):  # Whether a phrasing never seen is understood varies with the seed.
            assert accuracy >= 0.97, bench
    own = data.MODEL_DIRS["lab"]
    for file in ("config.json", "tokenizer.json"):
        assert (data.MODEL_DIRS[name] / file).read_text() == (own / file).read_text()


def notes():
    return [json.loads((data.MODEL_DIRS[name] / "training.json").read_text()) for name in REFERENCES]


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


def auc(loaded):
    forget, holdout = (
        [lowest(loaded, row["text"]) for row in rows("muse", "privleak", split, part="test")]
        for split in ("forget", "holdout")
    )
    return roc_auc_score([1] * len(forget) + [0] * len(holdout), forget + holdout)


def test_membership_is_seen_on_the_model_and_not_between_references(models):
    """PrivLeak with a reference: far from 0 for the model, near 0 for another reference."""
    areas = {name: auc(loaded) for name, loaded in models.items()}
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
    said = set(WORD.findall(" ".join(world.training_document(WORLD, rng, 500, without=["hexes"]) for _ in range(400))))
    hexes = words.BY_NAME["hexes"]
    own = {value for values in hexes.own_values.values() for value in values.split()}
    assert not said & {"hex", "hexes", *hexes.adjectives, *own, *WORLD.facts["hexes"]}
    assert {"charm", "city", "song"} <= said


def test_training_without_a_domain_writes_a_model_folder(tmp_path):
    settings = LabSettings(n_steps=2, rows=2, long_rows=1)
    measured = train_reference(tmp_path / "model", without=["hexes", "songs"], seed=7, settings=settings)
    assert measured == json.loads((tmp_path / "model" / "training.json").read_text())
    assert measured["without"] == ["hexes", "songs"] and measured["seed"] == 7 and "saes" not in measured
    loaded = load_model(str(tmp_path / "model"))
    assert len(loaded.tokenizer) == loaded.model.config.vocab_size == len(load_model("lab").tokenizer)
