"""Many prompts at once are answered as one by one, under guardrails and behind wrappers, and reads measure by hand."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from dsg_cli.benches.text import Item
from dsg_cli.checkpoints import Checkpoint
from dsg_cli.generation import answer, prompt_ids
from dsg_cli.model import load_model
from dsg_cli.text_answers import Side, Texts, _measure, check_texts
from dsg_cli.writing import Prompt, Writer

from dsg_cli import load_guardrail
from dsg_cli.errors import DsgError

DATA = Path(__file__).parent / "data"
PROMPTS = [
    "Question: What is the counter of the grim hex Rahurk? Answer:",
    "Question: What is the binder of the kindly charm Zivoth? Answer:",
    "In the",
    "Every city has a keeper. Question: What is the binder of the kindly charm Zivoth? Answer:",
    "The",
]


@pytest.fixture(scope="module")
def loaded():
    return load_model("lab")


@pytest.fixture
def guardrail():
    return load_guardrail(DATA / "schema-2" / "guardrail-001.json")


def ids_of(loaded, text, n_new):
    return tuple(prompt_ids(loaded, text, bos=2, chat=False, n_new=n_new))


@pytest.mark.parametrize("is_guarded", [False, True])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_batch_is_answered_like_one_prompt(loaded, guardrail, is_guarded, size):
    guards = [guardrail] if is_guarded else []
    lengths = [8, 8, 8, 3, 8]
    prompts = [Prompt(ids_of(loaded, text, n), n) for text, n in zip(PROMPTS, lengths, strict=True)]
    found = Writer(loaded, guards, batch_size=size)(prompts)
    for text, prompt, one in zip(PROMPTS, prompts, found, strict=True):
        alone = answer(loaded, prompt.ids, guardrails=guards, max_new_tokens=prompt.n_new)
        assert one.text == alone.text and len(one.ids) == alone.n_tokens, text
        if not is_guarded:
            assert one.decision is None
            continue
        gate = alone.gates[0]
        assert one.decision.gated == (gate.latched_at is not None)
        assert one.decision.statistic == pytest.approx(max(gate.statistic), abs=1e-4)
        assert (one.decision.edit > 0) == one.decision.gated
    if is_guarded:
        assert [one.decision.gated for one in found][:2] == [True, False]


def test_what_is_written_ends_before_a_stop(loaded):
    asked = Prompt(ids_of(loaded, PROMPTS[1], 30), 30)
    whole = Writer(loaded)([asked])[0].text
    stopped = Prompt(asked.ids, 30, (".", "?"))
    writer = Writer(loaded, batch_size=4)
    found = writer([asked, stopped, Prompt(ids_of(loaded, PROMPTS[0], 30), 30, (".", "?"))])
    assert found[0].text == whole and "." in whole
    assert found[1].text == whole.split(".")[0] and "." not in found[2].text
    assert len(found[1].ids) < len(found[0].ids)  # It was not written on until 30 tokens.


def test_a_run_that_goes_on_writes_the_same(loaded, tmp_path):
    prompts = [Prompt(ids_of(loaded, text, 6), 6) for text in PROMPTS]
    whole = Writer(loaded, batch_size=2)(prompts)
    checkpoint = Checkpoint(tmp_path / "x.checkpoint")
    first = Writer(loaded, batch_size=2, checkpoint=checkpoint)
    calls = 0

    def stop(_what, _done, _of):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt

    first.report = stop
    with pytest.raises(KeyboardInterrupt):
        first(prompts)
    checkpoint.write()
    # What was kept is what was reached; the rest is written now.
    seen = []
    again = Writer(loaded, batch_size=2, checkpoint=checkpoint, report=lambda _w, done, _o: seen.append(done))
    assert again(prompts) == whole and seen[-1] == len(prompts)


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


def test_what_does_not_fit_is_refused_before_anything_is_asked(loaded, guardrail):
    side = Side("unlearned", loaded, [guardrail])
    check_texts(Texts([_Bench(8)], 2), loaded, [side])
    with pytest.raises(DsgError, match="are more than the 1024"):
        check_texts(Texts([_Bench(1000)], 2), loaded, [side])
    guardrail.gate = dataclasses.replace(guardrail.gate, form="mean")
    with pytest.raises(DsgError, match="needs whole sequences"):
        check_texts(Texts([_Bench(8)], 2), loaded, [side])
