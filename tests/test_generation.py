"""dsg generate: both sides, the gate's trace, and refusals, on the lab and its kept guardrail."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from dsg_cli.errors import DsgError
from dsg_cli.evals.free_text import FreeText, Item, _measure, check_room
from dsg_cli.guardrail.guarded import guarded
from dsg_cli.guardrail.loading import load_guardrail
from dsg_cli.inference.generation import Prompt, answer, generate, prompt_ids
from dsg_cli.inference.scoring import GuardedModel
from dsg_cli.job import Job
from dsg_cli.models.language_model import load_model
from dsg_cli.settings import GenerateSection
from dsg_cli.workspace.checkpoints import Checkpoint

DATA = Path(__file__).parent / "data"
HEX = "Question: What is the counter of the grim hex Rahurk? Answer:"
CHARM = "Question: What is the binder of the kindly charm Zivoth? Answer:"


@pytest.fixture(scope="module")
def base():
    loaded = load_model("lab")
    return GuardedModel(loaded.model, loaded.tokenizer, bos=2)


@pytest.fixture
def guardrail():
    return load_guardrail(DATA / "schema-2" / "guardrail-001.json")


def ask(base, prompt, *guardrails, refusal=None, temperature=0.0, **options):
    refuse = {"on_trigger": "refuse", "refusal": refusal} if refusal else {}
    settings = GenerateSection(max_new_tokens=8, temperature=temperature, **refuse)
    ids = prompt_ids(base, prompt, chat=False, n_new=8)
    return answer(dataclasses.replace(base, guardrails=guardrails), ids, settings, **options)


def test_a_gate_that_stays_shut_changes_nothing(base, guardrail):
    bare, kept = ask(base, CHARM), ask(base, CHARM, guardrail, refusal="No.")
    assert kept.text == bare.text and kept.n_tokens == bare.n_tokens and not kept.refused
    assert kept.gates[0].latched_at is None and bare.gates == []


def test_the_trace_is_what_one_pass_over_the_text_gives(base, guardrail):
    found = ask(base, HEX, guardrail)
    assert found.text != ask(base, HEX).text and not found.refused
    gate = found.gates[0]
    assert len(found.tokens) == len(gate.statistic) and gate.statistic == sorted(gate.statistic)
    assert found.tokens[gate.latched_at] == "grim"
    ids = base.tokenizer(HEX, return_tensors="pt")["input_ids"]
    guardrail.trace = []
    with torch.no_grad(), guarded(base.model, guardrail):
        base.model(ids, use_cache=False)
    whole = guardrail.trace[0].statistic_BL[0]
    torch.testing.assert_close(torch.tensor(gate.statistic[: len(whole)]), whole)


def test_a_refusal_ends_the_answer_and_shows_nothing_written_after_the_gate_opened(base, guardrail):
    pieces = []
    found = ask(base, HEX, guardrail, refusal="I will not say.", write=pieces.append)
    assert found.text == "I will not say." == "".join(pieces) and found.refused and found.n_tokens == 0


def test_a_gate_that_opens_in_the_answer_keeps_what_came_before(base, guardrail):
    # The model itself turns to hexes: the prompt alone leaves the gate shut.
    pieces = []
    found = ask(base, "In the", guardrail, refusal="No.", write=pieces.append)
    assert found.text == "book of hexes one No." and found.refused and "".join(pieces) == found.text
    assert found.tokens == ["<bos>", "In", "the", "book", "of", "hexes", "one"] and found.gates[0].latched_at == 6
    assert ask(base, "In the", guardrail).text.startswith("book of hexes one ")


def test_sampling_follows_the_seed(base):
    one, same, other = (ask(base, CHARM, temperature=2.0, seed=seed).text for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [(" ", {}, "empty"), (CHARM, {"n_new": 5000}, "leaves room for"), (CHARM, {"chat": True}, "no chat template")],
)
def test_prompts_that_cannot_be_asked(base, prompt, options, words):
    with pytest.raises(DsgError, match=words):
        prompt_ids(base, prompt, **({"chat": False, "n_new": 8} | options))


def test_a_chat_template_is_used(base, monkeypatch):
    monkeypatch.setattr(base.tokenizer, "chat_template", "{{ bos_token }} Question: {{ messages[0].content }} Answer:")
    ids = prompt_ids(base, "the hex", chat=True, n_new=8)
    assert ids == base.tokenizer("Question: the hex Answer:")["input_ids"]


@pytest.fixture
def workspace(tmp_path):
    shutil.copytree(DATA / "schema-2", tmp_path / "w")
    return tmp_path / "w"


class TestCommand:
    def test_both_sides_and_one(self, dsg, workspace, monkeypatch):
        code, out, err = dsg("generate", CHARM, HEX, "-w", workspace, "--max-new-tokens", 3)
        assert code == 0, err
        lines = out.splitlines()
        assert len(lines) == 4 and lines[0].removeprefix("base: ") == lines[1].removeprefix("guarded: ")
        Path("asked.jsonl").write_text(json.dumps({"prompt": HEX}) + "\n")
        code, out, _ = dsg(
            "generate", "--file", "asked.jsonl", "-w", workspace, "--side", "base", "--max-new-tokens", 3
        )
        assert (code, out) == (0, lines[2].removeprefix("base: ") + "\n")
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{HEX}\n\n{CHARM}\n"))
        refuse = ("--on-trigger", "refuse", "--refusal", "No.", "--json")
        code, out, _ = dsg("generate", "-w", workspace, "--max-new-tokens", 3, *refuse)
        first, second = json.loads(out)
        assert first["guarded"]["text"] == "No." and first["guarded"]["refused"] and not second["guarded"]["refused"]
        assert first["guarded"]["gates"][0]["guardrail"] == "guardrail-001"
        assert "gates" not in first["base"]

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("x", "--file", "y.txt"), "both on the command line"),
            (("--file", "missing.txt"), "No such file"),
            (("x", "--side", "left"), "generate.side is 'left'"),
            (("x", "--max-new-tokens", "0"), "at least 1"),
            (("x", "--from", "guardrail-009"), "no artifact guardrail-009"),
        ],
    )
    def test_refusals(self, dsg, workspace, arguments, words):
        code, out, err = dsg("generate", *arguments, "-w", workspace)
        assert code == 1 and words in err and not out

    def test_the_papers_gate_is_refused(self, dsg, tmp_path):
        shutil.copytree(DATA / "schema-1", tmp_path / "w1")
        code, _, err = dsg("generate", HEX, "--from", "guardrail-001", "-w", tmp_path / "w1")
        assert code == 1 and "needs whole sequences" in err and "another --gate" in err


PROMPTS = [
    HEX,
    CHARM,
    "In the",
    f"Every city has a keeper. {CHARM}",
    "The",
]


def prompt(base, text, n_new, stop=()):
    return Prompt(tuple(prompt_ids(base, text, chat=False, n_new=n_new)), n_new, stop)


@pytest.mark.parametrize("is_guarded", [False, True])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_batch_is_answered_like_one_prompt(base, guardrail, is_guarded, size):
    model = dataclasses.replace(base, guardrails=[guardrail] if is_guarded else [], batch_size=size)
    prompts = [prompt(base, text, n) for text, n in zip(PROMPTS, [8, 8, 8, 3, 8], strict=True)]
    completions = generate(model, prompts)
    for asked, completion in zip(prompts, completions, strict=True):
        alone = answer(model, asked.ids, GenerateSection(max_new_tokens=asked.n_new))
        assert completion.text == alone.text and len(completion.token_ids) == alone.n_tokens
        if not is_guarded:
            assert completion.decision is None
            continue
        gate, decision = alone.gates[0], completion.decision
        assert decision.gated == (gate.latched_at is not None) == (decision.edit > 0)
        assert decision.statistic == pytest.approx(max(gate.statistic), abs=1e-4)
    if is_guarded:
        assert [completion.decision.gated for completion in completions][:2] == [True, False]


def test_what_is_written_ends_before_a_stop(base):
    asked = prompt(base, CHARM, 30)
    whole = generate(base, [asked])[0].text
    stopped = [prompt(base, text, 30, (".", "?")) for text in (CHARM, HEX)]
    found = generate(dataclasses.replace(base, batch_size=4), [asked, *stopped])
    assert found[0].text == whole and "." in whole
    assert found[1].text == whole.split(".")[0] and "." not in found[2].text
    assert len(found[1].token_ids) < len(found[0].token_ids)  # It was not written on until 30 tokens.


def test_a_run_that_goes_on_writes_the_same(base, tmp_path):
    model = dataclasses.replace(base, batch_size=2)
    prompts = [prompt(base, text, 6) for text in PROMPTS]
    whole = generate(model, prompts)
    checkpoint = Checkpoint(tmp_path / "x.checkpoint")
    calls = []

    def stop(*call):
        calls.append(call)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, prompts, Job(checkpoint=checkpoint, progress=stop, name="writing"))
    checkpoint.write()
    # What was kept is what was reached; the rest is written now.
    seen = []
    job = Job(checkpoint=checkpoint, progress=lambda _what, done, _of: seen.append(done), name="writing")
    assert generate(model, prompts, job) == whole and seen[-1] == len(prompts)


def test_what_is_measured_of_tokens_by_hand():
    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [1.0, 0.0, 0.0]])
    target = torch.tensor([0, 0, 2, 0])
    found = _measure(p.log(), target)
    logs = [math.log(0.5), math.log(0.1), math.log(0.6), 0.0]
    assert found["n_tokens"] == 4 and found["loss"] == pytest.approx(-sum(logs) / 4)
    assert found["min_k_40"] == pytest.approx(logs[1]) and found["min_k_20"] == pytest.approx(logs[1])
    mean = 0.8 * math.log(0.8) + 0.2 * math.log(0.1)
    deviation = math.sqrt(0.8 * math.log(0.8) ** 2 + 0.2 * math.log(0.1) ** 2 - mean**2)
    assert found["min_k_plus_20"] == pytest.approx((logs[1] - mean) / deviation, rel=1e-4)
    assert found["exact_memorisation"] == 0.75 and found["extraction_strength"] == 0.5
    assert all(math.isfinite(value) for value in found.values())


class _Bench:
    name, metrics, relative = "own", (), ()

    def __init__(self, n_new):
        self.n_new = n_new

    def items(self):
        return [Item("0", "all", "word " * 40, "x", n_new=self.n_new)]


def test_what_does_not_fit_is_refused_before_anything_is_asked(base, guardrail):
    guarded_model = dataclasses.replace(base, guardrails=[guardrail])
    check_room(FreeText([_Bench(8)], 2), guarded_model)
    with pytest.raises(DsgError, match="are more than the 1024"):
        check_room(FreeText([_Bench(1000)], 2), guarded_model)
    guardrail.gate = dataclasses.replace(guardrail.gate, form="mean")
    with pytest.raises(DsgError, match="needs whole sequences"):
        check_room(FreeText([_Bench(8)], 2), guarded_model)
