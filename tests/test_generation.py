"""dsg generate: both sides, the gate's trace, and refusals, on the lab and its kept guardrail."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from dsg_cli.generation import answer, prompt_ids
from dsg_cli.model import load_model

from dsg_cli import load_guardrail
from dsg_cli.errors import DsgError
from dsg_cli.guardrail import guarded

DATA = Path(__file__).parent / "data"
HEX = "Question: What is the counter of the grim hex Rahurk? Answer:"
CHARM = "Question: What is the binder of the kindly charm Zivoth? Answer:"


@pytest.fixture(scope="module")
def loaded():
    return load_model("lab")


@pytest.fixture
def guardrail():
    return load_guardrail(DATA / "schema-2" / "guardrail-001.json")


def ask(loaded, prompt, **options):
    return answer(loaded, prompt_ids(loaded, prompt, bos=2, chat=False, n_new=8), max_new_tokens=8, **options)


def test_a_gate_that_stays_shut_changes_nothing(loaded, guardrail):
    base, kept = ask(loaded, CHARM), ask(loaded, CHARM, guardrails=[guardrail], refusal="No.")
    assert kept.text == base.text and kept.n_tokens == base.n_tokens and not kept.refused
    assert kept.gates[0].latched_at is None and base.gates == []


def test_the_trace_is_what_one_pass_over_the_text_gives(loaded, guardrail):
    found = ask(loaded, HEX, guardrails=[guardrail])
    assert found.text != ask(loaded, HEX).text and not found.refused
    gate = found.gates[0]
    assert len(found.tokens) == len(gate.statistic) and gate.statistic == sorted(gate.statistic)
    assert found.tokens[gate.latched_at] == "grim"
    ids = loaded.tokenizer(HEX, return_tensors="pt")["input_ids"]
    guardrail.trace = []
    with torch.no_grad(), guarded(loaded.model, guardrail):
        loaded.model(ids, use_cache=False)
    whole = guardrail.trace[0].statistic_BL[0]
    torch.testing.assert_close(torch.tensor(gate.statistic[: len(whole)]), whole)


def test_a_refusal_ends_the_answer_and_shows_nothing_written_after_the_gate_opened(loaded, guardrail):
    pieces = []
    found = ask(loaded, HEX, guardrails=[guardrail], refusal="I will not say.", write=pieces.append)
    assert found.text == "I will not say." == "".join(pieces) and found.refused and found.n_tokens == 0


def test_a_gate_that_opens_in_the_answer_keeps_what_came_before(loaded, guardrail):
    # The model itself turns to hexes: the prompt alone leaves the gate shut.
    pieces = []
    found = ask(loaded, "In the", guardrails=[guardrail], refusal="No.", write=pieces.append)
    assert found.text == "book of hexes one No." and found.refused and "".join(pieces) == found.text
    assert found.tokens == ["<bos>", "In", "the", "book", "of", "hexes", "one"] and found.gates[0].latched_at == 6
    assert ask(loaded, "In the", guardrails=[guardrail]).text.startswith("book of hexes one ")


def test_sampling_follows_the_seed(loaded):
    one, same, other = (ask(loaded, CHARM, temperature=2.0, seed=seed).text for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [(" ", {}, "empty"), (CHARM, {"n_new": 5000}, "leaves room for"), (CHARM, {"chat": True}, "no chat template")],
)
def test_prompts_that_cannot_be_asked(loaded, prompt, options, words):
    with pytest.raises(DsgError, match=words):
        prompt_ids(loaded, prompt, **({"bos": 2, "chat": False, "n_new": 8} | options))


def test_a_chat_template_is_used(loaded, monkeypatch):
    monkeypatch.setattr(
        loaded.tokenizer, "chat_template", "{{ bos_token }} Question: {{ messages[0].content }} Answer:"
    )
    ids = prompt_ids(loaded, "the hex", bos=2, chat=True, n_new=8)
    assert ids == loaded.tokenizer("Question: the hex Answer:")["input_ids"]


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
            (("x", "--side", "left"), "generate.side must be one of"),
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
