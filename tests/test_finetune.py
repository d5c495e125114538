"""Plain training: what is read of a corpus, what a model knows afterwards, and what is unlearned from it then."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from functools import partial

import pytest
import torch
from papers import BOS, SPECIAL, Watched, nll, run, token_logs
from transformers import AutoModelForCausalLM

from dsg_cli.data.corpora import Corpus, part_of
from dsg_cli.errors import DsgError
from dsg_cli.methods.losses import n_steps, unlearn_finetune
from dsg_cli.methods.text import TrainingRows, finetune_rows
from dsg_cli.methods.training import TrainingInputs
from dsg_cli.models.language_model import load_model, model_digest
from dsg_cli.recipe import load_recipe
from dsg_cli.report.evaluations import composed
from dsg_cli.report.summary import chain_summary
from dsg_cli.report.tables import model_rows
from dsg_cli.settings import CompareSection, Finetune
from dsg_cli.stages import apply as method
from dsg_cli.stages import compare, evaluate
from dsg_cli.stages import run as run_recipe
from dsg_cli.stages.compare import compared_methods
from dsg_cli.stages.composition import find_composition
from dsg_cli.stages.run import plan
from dsg_cli.workspace.artifacts import FeatureSet, ModelWeights
from dsg_cli.workspace.results import EvalReport
from dsg_cli.workspace.store import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")

EOS = 1


def rows_of(tokenizer, texts, bos=BOS, max_tokens=2048, weights=(None,), **settings):
    corpora = [Corpus(f"c{i}", list(texts), "", weight=weight) for i, weight in enumerate(weights)]
    return finetune_rows(tokenizer, corpora, Finetune(**settings), bos=bos, max_tokens=max_tokens, device="cpu")


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


TEXTS = [" ".join(f"w{(7 * i + j) % 60}" for j in range(3 + i % 9)) for i in range(40)]


@pytest.mark.parametrize("rows", ["documents", "packed"])
@pytest.mark.parametrize("bos", [BOS, None])
def test_every_document_is_read_whole_whatever_its_part(tokenizer, rows, bos):
    assert {part_of(text) for text in TEXTS} == {"select", "calibrate", "fresh"}
    found = rows_of(tokenizer, TEXTS, bos=bos, max_tokens=5, rows=rows)
    head = [] if bos is None else [bos]
    assert all(row[: len(head)] == head and len(row) <= 5 for row in found.rows)
    documents = [[*ids_of(tokenizer, text), EOS] for text in TEXTS]
    if rows == "packed":
        documents = [[i for ids in documents for i in ids]]
    step = 5 - len(head)
    pieces = [ids[i : i + step] for ids in documents for i in range(0, len(ids), step)]
    # What would be a row of one token has nothing before it to follow from.
    assert found.rows == [head + piece for piece in pieces if len(head + piece) > 1]
    assert set(found.first) == {0} and found.weights == [1.0]
    if rows == "packed":
        assert {len(row) for row in found.rows[:-1]} == {5}


def test_each_row_counts_alike_unless_a_corpus_has_a_weight(tokenizer):
    plain, weighted = rows_of(tokenizer, TEXTS, weights=(None, None)), rows_of(tokenizer, TEXTS, weights=(2.0, None))
    assert plain.corpus == [0] * 80 and sorted(plain.draws(80, 0)) == list(range(80))
    assert weighted.corpus == [0] * 40 + [1] * 40 and weighted.weights == [2.0, 1.0]


def test_only_answers_count_where_that_is_wanted(tokenizer):
    texts = ["w1 w2 w3 Answer: w4 w5", "w6 w7", "Answer: w8"]
    found = rows_of(tokenizer, texts, answer_after="Answer:")
    assert [row[first:] for row, first in zip(found.rows, found.first, strict=True)] == [
        [*ids_of(tokenizer, "w4 w5"), EOS],
        [BOS, *ids_of(tokenizer, "w6 w7"), EOS],
        [*ids_of(tokenizer, "w8"), EOS],
    ]
    cut = rows_of(tokenizer, texts[:1], max_tokens=4, answer_after="Answer:")  # The first row is all question.
    assert [row[first:] for row, first in zip(cut.rows, cut.first, strict=True)] == [
        [*ids_of(tokenizer, "w4 w5")],
        [BOS, EOS],
    ]
    with pytest.raises(DsgError, match="No document of c0 holds 'Reply:'"):
        rows_of(tokenizer, texts, answer_after="Reply:")


def test_the_loss_is_that_of_the_tokens_that_count(model):
    rows, first = [[BOS, 9, 8, 7, 6], [BOS, 5, 4], [BOS, 11, 12, 13]], [3, 0, 1]
    text = Watched(rows, [0] * 3, [1.0], 0, SPECIAL, "cpu", first)
    options = {"steps": 1, "batch_size": 3, "accumulation": 1, "learning_rate": 1e-3}
    changed, *_ = run(model, "finetune", options, text, text)
    logs = [one for row, start in zip(rows, first, strict=True) for one in token_logs(model, row)[max(start, 1) - 1 :]]
    assert len(logs) == 2 + 2 + 3
    assert changed.losses[0]["loss"] == pytest.approx(-sum(logs).item() / len(logs), rel=1e-5)


@pytest.mark.parametrize(("epochs", "expected"), [(1.0, 2), (3.0, 6), (0.1, 1), (2.5, 5)])
def test_an_epoch_is_every_row_once(model, epochs, expected):
    text = Watched([[BOS, 4 + i, 5 + i] for i in range(8)], [0] * 8, [1.0], 0, SPECIAL, "cpu")
    changed, *_ = run(model, "finetune", {"epochs": epochs, "batch_size": 2, "accumulation": 2}, text, text)
    assert len(changed.losses) == expected == max(1, math.ceil(epochs * 2))
    counts = Counter(text.drawn[0])
    assert sum(counts.values()) == 4 * expected and max(counts.values()) - min(counts.values()) <= 1
    assert n_steps(Finetune(steps=7, epochs=epochs), 8) == 7


def test_a_trained_model_knows_the_text_word_for_word(model):
    """Each row begins with a word of its own, from which the rest follows: only that one cannot be known."""
    generator = torch.Generator().manual_seed(0)
    rows = [[BOS, 40 + i, *torch.randint(4, 40, (6,), generator=generator).tolist(), EOS] for i in range(4)]
    own = copy.deepcopy(model)
    text = TrainingRows(rows, [0] * 4, [1.0], 0, SPECIAL, "cpu")
    settings = Finetune(epochs=200, batch_size=4, accumulation=1, learning_rate=1e-2)
    changed = unlearn_finetune(TrainingInputs(own, text, text), settings)
    losses = [one["loss"] for one in changed.losses]
    assert losses[0] == pytest.approx(nll(model, rows).item(), rel=1e-5) and losses[0] > 2
    assert losses[-1] == pytest.approx(math.log(4) / 8, rel=0.05)
    for row in rows:
        written = own.generate(torch.tensor([row[:2]]), max_new_tokens=7, do_sample=False)
        assert written[0].tolist() == row
        before = model.generate(torch.tensor([row[:2]]), max_new_tokens=7, do_sample=False)
        assert before[0].tolist() != row


@pytest.fixture(scope="module")
def recipe(tiny_recipe):
    sets = ["methods.npo.steps=2", "methods.npo.learning_rate=1e-3"]
    return partial(tiny_recipe, *sets, "methods.finetune.steps=4", "methods.finetune.learning_rate=1e-3")


@pytest.fixture(scope="module")
def made(recipe, tmp_path_factory):
    """A target (model-001), another method on it (model-002), and what `dsg` makes on it."""
    workspace = Workspace(tmp_path_factory.mktemp("made"))
    method.run_method(recipe(), workspace, "finetune")
    method.run_method(recipe("model.source=model-001"), workspace, "npo")
    method.run_method(recipe(), workspace, "dsg", source="model-001")
    return workspace


def test_an_artifact_says_what_it_was_trained_on(made, recipe, folders):
    stored = made.find("model", "model-001")
    body, settings = stored.body_as(ModelWeights), stored.header.settings
    names = [str(folders[name]) for name in ("forget.jsonl", "retain.jsonl")]
    assert body.trained["corpora"] == names == [one["name"] for one in settings["train"]]
    assert [one["documents"] for one in settings["train"]] == [80, 80] and all(
        one["sha256"] for one in settings["train"]
    )
    assert body.forget == body.retain == settings["forget"] == settings["retain"] == []
    assert settings["limit"] is None and settings["epochs"] == 5.0 and settings["method"] == "finetune"
    rows = dict(model_rows(body))
    assert "taught" in rows["method"] and rows["trained on"] == ", ".join(names)
    assert composed(find_composition(made, ["model-001"]).described()) == "model-001 (finetune, taught)"
    assert body.losses[-1]["loss"] < body.losses[0]["loss"]


def test_what_was_finetuned_is_what_is_unlearned_from(made, recipe, folders):
    taught = str(made.folder / "model-001")
    alone, npo, guard = (find_composition(made, [name]) for name in ("model-001", "model-002", "guardrail-001"))
    assert alone.base == str(folders["model"].resolve()) and alone.model == taught
    assert [one["method"] for one in npo.described()] == ["npo"]
    assert npo.base == taught and npo.model == str(made.folder / "model-002")
    assert [one["method"] for one in guard.described()] == ["dsg"] and guard.weights == []
    assert guard.base == guard.model == taught
    learnt, unlearned, guarded = (
        evaluate.run(recipe(), made, sources=[name]) for name in ("model-001", "model-002", "guardrail-001")
    )
    results = [stored.body_as(EvalReport).results["mine"] for stored in (learnt, unlearned)]
    assert results[0]["unlearned"] == results[1]["base"]
    digests = [stored.header.settings["model_digest"] for stored in (learnt, unlearned, guarded)]
    assert digests[0] != digests[1] == digests[2]
    features = made.find("features").header
    assert [one.id for one in features.inputs] == ["model-001"] or features.model.source == taught


def test_adapters_make_a_target_too(recipe, tmp_path, folders):
    workspace = Workspace(tmp_path)
    stored = method.run_method(recipe("methods.finetune.lora=true"), workspace, "finetune")
    assert stored.body_as(ModelWeights).form == "adapter"
    method.run_method(recipe("model.source=model-001"), workspace, "npo")
    composition = find_composition(workspace, ["model-002"])
    assert composition.base == str(tmp_path / "model-001") and len(composition.weights) == 1
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model-002")


def test_a_limit_and_a_weight_are_its_own(recipe, tmp_path, folders):
    sets = ["methods.finetune.limit=12", f"methods.finetune.corpora=[{folders['forget.jsonl']}=3]", "corpora.limit=20"]
    settings = method.run_method(recipe(*sets), Workspace(tmp_path), "finetune").header.settings
    assert settings["limit"] == 12 and settings["train"][0]["documents"] == 12 and settings["train"][0]["weight"] == 3.0


def test_it_is_compared_with_nothing(made, recipe):
    assert "finetune" not in compared_methods(CompareSection()) and "npo" in compared_methods(CompareSection())
    for sets in ("compare.methods=[npo, finetune]", "compare.grids={finetune: {epochs: [1]}}"):
        with pytest.raises(DsgError, match="is .finetune.; it teaches, and is compared with nothing"):
            load_recipe(sets=[sets])
    with pytest.raises(DsgError, match="model-001 was taught"):
        compare.run(recipe("compare.forget=mine"), made, sources=["model-001"])


def test_a_recipe_that_finetunes_does_so_first(recipe, tmp_path, folders):
    workspace = Workspace(tmp_path)
    chain = run_recipe.run(recipe(), workspace)
    assert [stored.id for stored in chain] == [
        "model-001",
        "features-001",
        "threshold-001",
        "guardrail-001",
        "eval-001",
    ]
    assert chain[1].header.model.source == str(tmp_path / "model-001") and isinstance(chain[1].body, FeatureSet)
    assert [one.id for one in chain[1].header.inputs] == ["model-001"]
    own = load_model(str(tmp_path / "model-001"))
    assert chain[-1].header.settings["model_digest"] == model_digest(own.model)
    names = [str(folders[name]) for name in ("forget.jsonl", "retain.jsonl")]
    assert chain_summary(chain)["trained_on"] == names
    steps = plan(recipe())
    assert [step.stage for step in steps[:5]] == ["finetune"] * 5 and steps[5].stage == "select"
    assert [step.verb for step in steps[:5]] == ["read", "read", "read", "compute", "write"]
    with pytest.raises(DsgError, match="No forget corpus"):
        run_recipe.run(recipe("corpora.forget=[]"), Workspace(tmp_path / "other"))
    assert not Workspace(tmp_path / "other").ids()


def test_the_command_line(dsg, folders):
    model, small = ["--model", folders["model"]], ["--set", "methods.finetune.steps=2", "-w", "ws"]
    small += ["--set", "methods.finetune.accumulation=1"]
    both = ["--train", folders["forget.jsonl"], "--train", folders["retain.jsonl"]]
    code, out, err = dsg("apply", "--method", "finetune", *model, *both, *small, "--limit", "9", "--json")
    assert code == 0, err
    said = json.loads(out)
    assert [one["documents"] for one in said["settings"]["train"]] == [9, 9] and said["form"] == "whole"
    code, out, err = dsg("apply", "--method", "finetune", "--lora", "--from", "model-001", *both[:2], *small)
    assert (code, out) == (0, "model-002\n"), err
    code, out, _ = dsg("show", "model-001", "-w", "ws")
    assert code == 0 and "which taught it" in out and "trained on" in out
    forget = ["--forget", folders["forget.jsonl"]]
    for arguments, words in (
        (["--method", "finetune", *model], "No train corpus is named. Give one with --train"),
        (["--method", "finetune", *model, *forget], "finetune teaches"),
        (["--method", "npo", *model, *forget, *both], "--train is for finetune, and npo unlearns"),
        (["--method", "finetune", *model, "--train", "tofu-ful"], "Did you mean tofu-full"),
        (["--method", "finetune", "--train", "lab-hexes"], "Add --model lab"),
        (["--method", "finetune", "--export", "out", *model, *both], "finetune makes none"),
        (["--method", "npo", "--from", "model-001"], "No forget corpus is named"),
    ):
        code, out, err = dsg("apply", *arguments, "-w", "ws")
        assert code == 1 and words in " ".join(err.split()) and not out, err
