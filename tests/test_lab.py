"""The shipped lab: its world is balanced and honest, its model knows it, its SAEs explain it."""

from __future__ import annotations

import json
import random
import re

import pytest
import torch

from dsg_cli.guardrail.runtime.sites import HookSite
from dsg_cli.lab import data, world
from dsg_cli.lab import world as words
from dsg_cli.lab.data import LabSettings
from dsg_cli.lab.training import bench_accuracies, measure_sae, training_rows, write_texts
from dsg_cli.lab.world import DOMAINS_OF
from dsg_cli.models.language_model import load_model

WORLD = world.build_world()
WORD = re.compile(r"[A-Za-z]+")


@pytest.fixture(scope="module")
def loaded():
    return load_model("lab")


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_shipped_texts_are_what_the_code_writes(tmp_path):
    write_texts(WORLD, tmp_path, LabSettings())
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.jsonl"))
    assert len(written) == len(data.CORPORA) + len(data.bench_names())
    for path in written:
        assert (tmp_path / path).read_text() == (data.SHIPPED / path).read_text(), path


def test_weights_are_small_and_safe():
    weights = list(data.SHIPPED.rglob("*.safetensors"))
    assert len(weights) == 6 and sum(path.stat().st_size for path in weights) <= 8e6
    assert {path.suffix for path in data.SHIPPED.rglob("*") if path.is_file()} == {".json", ".jsonl", ".safetensors"}


def test_corpora_tell_of_dev_entities_only():
    for name in data.CORPORA:
        text = data.corpus_path(name).read_text()
        said = set(WORD.findall(text))
        for domain in words.DOMAINS:
            entities = WORLD.entities(domain.name)
            is_told = domain.name in DOMAINS_OF[name]
            assert (set(entities[: words.N_DEV_ENTITIES]) <= said) is is_told, (name, domain.name)
            assert not said & set(entities[words.N_DEV_ENTITIES :])


@pytest.mark.parametrize("bench", data.BENCHES)
def test_questions_are_split_by_entity_and_balanced(bench):
    for phrasing in data.PHRASINGS:
        rows = read(data.questions_path(bench if phrasing == "seen" else f"{bench}-{phrasing}"))
        entities = {
            split: {row["id"].split("/")[1] for row in rows if row["split"] == split} for split in ("dev", "test")
        }
        assert not entities["dev"] & entities["test"]
        for split in ("dev", "test"):
            asked = [row for row in rows if row["split"] == split]
            assert len(asked) == (96 if phrasing == "terse" else 48) * len(DOMAINS_OF[bench])
            # Whatever value one always prefers, one question in four is right.
            for seed in range(3):
                values = sorted({choice for row in asked for choice in row["choices"]})
                order = random.Random(seed).sample(values, len(values))
                right = [
                    min(range(4), key=lambda i, row=row: order.index(row["choices"][i])) == row["answer"]
                    for row in asked
                ]
                assert sum(right) / len(right) == 0.25


def test_terse_questions_have_no_word_that_only_their_domain_uses():
    words_of = {d.name: set() for d in words.DOMAINS}
    rng = random.Random(0)
    for domain in words.DOMAINS:
        for _ in range(60):
            words_of[domain.name] |= set(WORD.findall(world.prose(WORLD, domain.name, rng, 10)))
        for by_entity in WORLD.facts[domain.name].values():
            for fact in by_entity:
                for _ in range(5):
                    words_of[domain.name] |= set(WORD.findall(world.trained_question(fact, rng)))
    for domain in words.DOMAINS:
        elsewhere = set().union(*(words for name, words in words_of.items() if name != domain.name))
        for question in world.questions(WORLD, [domain.name], "terse"):
            said = set(WORD.findall(question.context)) - {question.id.split("/")[1]}
            assert said <= elsewhere, said - elsewhere


def test_held_and_novel_phrasings_are_not_in_the_training_text(loaded):
    rng = random.Random(1)
    text = " ".join(world.training_document(WORLD, rng, 500) for _ in range(3000))
    novel_words = set(WORD.findall(" ".join(q.context for q in world.questions(WORLD, ["hexes"], "novel"))))
    assert novel_words <= set(WORD.findall(text))
    assert "Many ask about the" not in text
    for domain in words.DOMAINS:
        for i, relation in enumerate(domain.relations):
            template = re.escape(words.QUESTIONS["held"][i])
            for field, value in (("n", domain.noun), ("p", domain.plural), ("r", relation)):
                template = template.replace(rf"\{{{field}\}}", value)
            pattern = template.replace(r"\{a\}", r"\w+").replace(r"\{E\}", r"\w+")
            assert not re.search(pattern, text), relation
            other = template.replace(relation, next(r for r in domain.relations if r != relation))
            assert re.search(other.replace(r"\{a\}", r"\w+").replace(r"\{E\}", r"\w+"), text)


def test_tokenizer_is_exact_and_knows_every_word(loaded):
    tokenizer = loaded.tokenizer
    for name in data.CORPORA:
        for row in read(data.corpus_path(name))[:50]:
            ids = tokenizer(row["text"])["input_ids"]
            assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == row["text"]
    for bench in data.bench_names():
        for row in read(data.questions_path(bench)):
            ids = [tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in row["choices"]]
            assert all(len(one) == 1 and one[0] != tokenizer.unk_token_id for one in ids)


def test_the_model_knows_its_world(loaded):
    assert loaded.model.config.model_type == "gemma2" and loaded.model.config.max_position_embeddings >= 1024
    accuracies = bench_accuracies(loaded.model, loaded.tokenizer, WORLD)
    assert len(accuracies) == 20
    assert min(accuracies.values()) >= 0.97, accuracies


def test_nothing_is_lost_to_bfloat16(loaded):
    for parameter in loaded.model.parameters():
        assert torch.equal(parameter, parameter.to(torch.bfloat16).float())


@pytest.mark.parametrize("name", data.SAE_DIRS)
def test_saes_explain_the_residual_stream(loaded, name):
    from sae_lens import SAE

    sae = SAE.load_from_disk(data.SAE_DIRS[name])
    assert sae.cfg.architecture() == "jumprelu" and sae.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    rows = next(training_rows(WORLD, loaded.tokenizer, seed=99, n_rows=64, seq_len=128))
    found = measure_sae(sae, loaded.model, loaded.tokenizer, HookSite(1, "resid_post"), rows)
    assert found["variance_explained"] >= 0.90
    assert found["dead"] < 0.5
    assert 10 <= found["l0"] <= 25
    assert found["cross_entropy_with_sae"] - found["cross_entropy"] < 0.05


def test_training_documents_are_long_enough(loaded):
    rng = random.Random(2)
    lengths = [len(loaded.tokenizer(world.training_document(WORLD, rng, 544))["input_ids"]) for _ in range(500)]
    assert max(lengths) > 512


@pytest.mark.train
def test_training_again_from_the_seed_gives_the_same_accuracies(tmp_path):
    """About eight minutes on two cores."""
    from dsg_cli.lab.export import train_and_export

    measured = train_and_export(tmp_path / "lab", seed=0, report=lambda *_: None)
    shipped = json.loads((data.SHIPPED / "training.json").read_text())
    assert min(measured["accuracy"].values()) >= 0.97
    assert measured["accuracy"] == pytest.approx(shipped["accuracy"], abs=0.03)
    for sae, shipped_sae in zip(measured["saes"], shipped["saes"], strict=True):
        assert sae["variance_explained"] == pytest.approx(shipped_sae["variance_explained"], abs=0.02)
        assert sae["variance_explained"] >= 0.90 and sae["dead"] < 0.5
    assert measured["seconds"] <= 480
