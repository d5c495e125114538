"""dsg inspect --prompt: what a gate sees of a prompt, against its own decisions and what dsg generate traces."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_guardrail, make_sae
from dsg_cli.model import LoadedModel
from dsg_cli.residuals import read_residual
from dsg_cli.roles import Chosen
from dsg_cli.runtime.gates import FORMS
from dsg_cli.sae import read_sae
from dsg_cli.slicing import chosen_columns
from dsg_cli.tokens import token_texts
from dsg_cli.tracing import trace

from dsg_cli.errors import DsgError

DATA = Path(__file__).parent / "data"
HEX = "Question: What is the counter of the grim hex Rahurk? Answer:"
CHARM = "Question: What is the binder of the kindly charm Zivoth? Answer:"
CLAMPED, WATCHED = [3, 11, 20, 31], [11, 5, 40]
IDS = [2, *range(4, 44)]


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sae")
    make_sae(folder, bias=4.0)
    return read_sae(str(folder))


@pytest.fixture(scope="module")
def loaded(model, tokenizer):
    return LoadedModel(model, tokenizer, "fake", 3)


def guard_of(sae, form, threshold):
    detecting = {
        "probe": {"weights": [0.3, -0.2, 0.5], "bias": -0.5, "clip": 3.0},
        "window": {},
        "cusum": {"clip": 9.0},
    }
    more = {"detectors": WATCHED, **detecting[form]} if form in detecting else {}
    return make_guardrail(sae, CLAMPED, gate=form, threshold=threshold, strength=7.0, **more)


def seen(loaded, guard, ids=IDS):
    features = [Chosen(index, []) for index in chosen_columns(CLAMPED, WATCHED)][: len(guard.detect)]
    return trace(loaded, ids, site=guard.read, encode=lambda x: guard.slice(x).acts, features=features, guard=guard)


@pytest.mark.parametrize("form", FORMS)
def test_each_gate_is_shown_as_it_decides(loaded, sae, form):
    open_ = seen(loaded, guard_of(sae, form, 0.0)).gate
    # A threshold that is crossed on the way, so that tokens on either side are compared.
    values = sorted(set(open_.statistic))
    threshold = values[len(values) // 2] - 1e-6 if form != "mean" else 0.0
    guard = guard_of(sae, form, threshold)
    found = seen(loaded, guard)
    ids = torch.tensor([IDS])
    resid = read_residual(loaded.model, guard.read, ids, torch.ones_like(ids))
    decision = guard.decide(resid, ~torch.isin(ids, torch.tensor([0, 1, 2])))
    gate = found.gate
    assert gate.statistic == decision.statistic_BL[0].tolist() and gate.gated == decision.gated_BL[0].tolist()
    edited = guard.edit(resid, decision)[0] - resid[0]
    torch.testing.assert_close(
        torch.tensor(gate.edit), edited.norm(dim=-1) / resid[0].norm(dim=-1), atol=1e-4, rtol=1e-3
    )
    assert gate.clamped == (edited.abs().amax(-1) > 0).tolist() and any(gate.clamped)
    assert not found.counted[0] and gate.score[0] == 0 and all(found.counted[1:])
    if form == "mean":
        assert gate.latched_at is None and len(set(gate.statistic)) == 1
        assert gate.statistic[0] == pytest.approx(sum(gate.score) / (len(IDS) - 1))
    else:
        first = gate.latched_at
        assert not any(gate.gated[:first]) and all(gate.gated[first:])
        assert form == "token" or first > 0


def test_the_score_is_that_of_the_activations_shown(loaded, sae):
    guard = guard_of(sae, "probe", 2.0)
    found = seen(loaded, guard)
    acts = {one.index: values for one, values in zip(found.features, found.activations, strict=True)}
    for i, score in enumerate(found.gate.score[1:], start=1):
        logit = 0.3 * acts[11][i] - 0.2 * acts[5][i] + 0.5 * acts[40][i] - 0.5
        assert score == pytest.approx(min(max(logit, -3), 3) + 3, abs=1e-4)
    assert found.gate.floor == 2.5  # Of a token on which nothing is active: clip and bias.


def test_a_gate_that_stays_shut_clamps_nothing(loaded, sae):
    gate = seen(loaded, guard_of(sae, "window", 1e9)).gate
    assert gate.latched_at is None and not any(gate.gated) and not any(gate.clamped) and not any(gate.edit)


def test_a_residual_that_is_not_finite_is_refused(loaded, sae, monkeypatch):
    guard = guard_of(sae, "window", 1.0)
    monkeypatch.setattr("dsg_cli.tracing.read_residual", lambda *_: torch.full((1, len(IDS), 16), math.nan))
    with pytest.raises(DsgError, match="not finite"):
        seen(loaded, guard)


def test_the_texts_of_tokens_make_up_the_text(loaded):
    ids = loaded.tokenizer("w1 w2 w30", add_special_tokens=False)["input_ids"]
    assert token_texts(loaded.tokenizer, ids) == ["w1", " w2", " w30"] and token_texts(loaded.tokenizer, []) == []


class TestCommand:
    @pytest.fixture
    def workspaces(self, tmp_path):
        for schema in (1, 2):
            shutil.copytree(DATA / f"schema-{schema}", tmp_path / f"w{schema}")
        return tmp_path

    def test_as_generate_traces_the_same_prompt(self, dsg, workspaces):
        code, out, err = dsg("inspect", "-w", workspaces / "w2", "--prompt", HEX, "--prompt", CHARM, "--json")
        assert code == 0, err
        found = json.loads(out)
        code, out, _ = dsg("generate", HEX, CHARM, "-w", workspaces / "w2", "--max-new-tokens", 2, "--json")
        for one, answer in zip(found, json.loads(out), strict=True):
            of_generate = answer["guarded"]["gates"][0]
            n = len(one["tokens"])
            assert one["prompt"] == answer["prompt"] and one["inspected"] == of_generate["guardrail"]
            assert [token.strip() for token in one["tokens"]] == answer["guarded"]["tokens"][:n]
            assert one["gate"]["statistic"] == pytest.approx(of_generate["statistic"][:n], abs=1e-5)
            assert one["gate"]["threshold"] == of_generate["threshold"]
        hex_, charm = (one["gate"]["latched_at"] for one in found)
        assert found[0]["tokens"][hex_] == " grim" and charm is None
        assert "".join(found[0]["tokens"][1:]).startswith(" Question: What is the counter")
        roles = {one["index"]: (one["roles"], one["weight"]) for one in found[0]["features"]}
        assert roles[331] == (["clamped", "watched"], 1.0) and roles[25] == (["clamped"], None)

    def test_a_table_beside_the_colours(self, dsg, workspaces):
        code, out, _ = dsg("inspect", "-w", workspaces / "w2", "--prompt", HEX)
        assert code == 0 and "«grim»" in out and max(map(len, out.splitlines())) <= 80
        (row,) = (line for line in out.splitlines() if " grim " in line and line[0].isdigit())
        assert row.split()[:2] == ["10", "grim"] and "opens" in row and "331* 8.55" in row

    def test_the_papers_gate_and_a_selection(self, dsg, workspaces):
        code, out, _ = dsg("inspect", "guardrail-001", "-w", workspaces / "w1", "--prompt", HEX)
        assert code == 0 and "gated the whole text" in out and "opens" not in out
        code, out, _ = dsg("inspect", "features-001", "-w", workspaces / "w1", "--prompt", HEX, "--json")
        (found,) = json.loads(out)
        assert found["gate"] is None and [one["index"] for one in found["features"]][:2] == [331, 468]
        assert max(found["features"][0]["activations"]) == pytest.approx(9.56, abs=0.01)
        code, out, _ = dsg(
            "inspect", "-w", workspaces / "w1", "--prompt", HEX, "--feature", 25, "--feature", 3, "--json"
        )
        (found,) = json.loads(out)
        shown = [(one["index"], one["roles"]) for one in found["features"]]
        assert shown == [(25, ["clamped", "watched"]), (3, [])] and found["gate"]["form"] == "mean"

    def test_what_is_in_a_prompt_does_not_reach_the_terminal(self, dsg, workspaces):
        code, out, _ = dsg("inspect", "-w", workspaces / "w2", "--prompt", "the \x1b[31mgrim\x07 hex \u202e?")
        assert code == 0 and "\x1b" not in out and "\x07" not in out and "\u202e" not in out

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("--prompt", " "), "empty"),
            (("--prompt", "x", "--chat"), "no chat template"),
            (("--prompt", "hex " * 3000), "leaves room for 0"),
            (("--prompt", "x", "--feature", "99999"), "there is no 99999"),
            (("--prompt", "x", "--feature", "-1"), "there is no -1"),
            (("threshold-001", "--prompt", "x"), "takes a guardrail or features"),
            (("guardrail-009", "--prompt", "x"), "no artifact guardrail-009"),
        ],
    )
    def test_refusals(self, dsg, workspaces, arguments, words):
        code, out, err = dsg("inspect", *arguments, "-w", workspaces / "w2")
        assert code == 1 and words in err and not out, err

    def test_an_empty_workspace(self, dsg, tmp_path):
        code, _, err = dsg("inspect", "--prompt", "x", "-w", tmp_path / "none")
        assert code == 1 and "dsg select" in err
