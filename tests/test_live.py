"""The live page on the lab: what it is told, and what a person sees of it in a browser."""

import threading
from pathlib import Path

import pytest
from browser import console_errors, open_browser
from dsg_cli.live.server import Server

from dsg_cli.errors import DsgError
from dsg_cli.recipe import load_recipe
from dsg_cli.stages import live
from dsg_cli.workspace import Workspace

GUARDRAIL = Path(__file__).parent / "data" / "schema-4" / "guardrail-001.json"


@pytest.fixture(scope="module")
def looked(tmp_path_factory):
    recipe = load_recipe(None, sets=["generate.max_new_tokens=6"])
    return live.load(recipe, Workspace(tmp_path_factory.mktemp("ws")), [str(GUARDRAIL)])


@pytest.fixture(scope="module")
def prompts(looked):
    return {example["label"]: example["prompt"] for example in looked.about()["examples"]}


def test_what_the_page_shows_at_first(looked, prompts):
    about = looked.about()
    assert about["model"] == "lab" and about["forget"] == ["lab-hexes"] and not about["has_chat"]
    assert [one["id"] for one in about["guardrails"]] == ["guardrail-001"]
    assert about["max_new_tokens"] == 6 and list(prompts) == ["to forget", "near", "far"]


def test_a_forget_question_latches_and_a_far_one_does_not(looked, prompts):
    found = {label: looked.ask({"prompt": prompt}) for label, prompt in prompts.items()}
    for label, one in found.items():
        (gate,) = one["guardrails"]
        n = len(one["tokens"])
        assert n > one["n_prompt"] > 5
        assert [len(gate[name]) for name in ("score", "statistic", "clamped")] == [n] * 3
        assert all(len(feature["activations"]) == n for feature in gate["features"])
        above = [t for t, value in enumerate(gate["statistic"]) if value > gate["threshold"]]
        assert gate["latched_at"] == (above[0] if above else None), label
        assert any(gate["clamped"]) == (label == "to forget")
    assert found["to forget"]["guardrails"][0]["latched_at"] is not None
    assert found["near"]["guardrails"][0]["latched_at"] is None is found["far"]["guardrails"][0]["latched_at"]
    assert found["to forget"]["base"]["text"] != found["to forget"]["guarded"]["text"]
    assert found["far"]["base"]["text"] == found["far"]["guarded"]["text"]


def test_a_refusal_is_shown_as_one(looked, prompts):
    found = looked.ask({"prompt": prompts["to forget"], "on_trigger": "refuse", "max_new_tokens": 4})
    assert found["guarded"]["refused"] and "cannot help" in found["guarded"]["text"] and not found["base"]["refused"]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"prompt": "  "}, "empty"),
        ({"prompt": "w" * 60_000}, None),
        ({"prompt": "the hex " * 3000}, "leaves room"),
        ({"prompt": "hex", "max_new_tokens": 0}, "from 1 to"),
        ({"prompt": "hex", "max_new_tokens": True}, "from 1 to"),
        ({"prompt": "hex", "max_new_tokens": 10**9}, "from 1 to"),
        ({"prompt": "hex", "on_trigger": "explode"}, "a setting that there is not"),
        ({"prompt": "hex", "chat": "yes"}, "a setting that there is not"),
        ({"prompt": "hex", "chat": True}, "no chat template"),
    ],
)
def test_what_the_page_may_not_ask(looked, wanted, said):
    if said is None:
        assert looked.ask(wanted)["tokens"]  # One long unknown word.
        return
    with pytest.raises(DsgError, match=said):
        looked.ask(wanted)


@pytest.mark.browser
def test_a_person_types_a_prompt(looked, prompts, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    server = Server(0)
    server.about, server.ask = looked.about(), looked.ask
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    with open_browser(tmp_path) as browser:
        browser.get(server.url)
        WebDriverWait(browser, 20).until(lambda b: "lab" in b.find_element(By.ID, "about").text)

        def ask(prompt):
            box = browser.find_element(By.ID, "prompt")
            box.clear()
            box.send_keys(prompt)
            browser.find_element(By.ID, "ask").click()
            WebDriverWait(browser, 30).until(lambda b: "opened" in said(b) or "closed" in said(b))
            return said(browser)

        def said(b):
            return b.find_element(By.ID, "status").text

        assert "stayed closed" in ask(prompts["far"])
        assert not browser.find_elements(By.CSS_SELECTOR, ".token.latch, .token.clamped")
        browser.execute_script("document.getElementById('status').textContent = ''")
        assert "opened at token" in ask(prompts["to forget"])
        assert len(browser.find_elements(By.CSS_SELECTOR, ".token.latch")) == 1
        assert browser.find_elements(By.CSS_SELECTOR, ".token.clamped")
        chart = browser.find_element(By.CSS_SELECTOR, "#chart svg")
        assert chart.size["height"] > 50 and "threshold" in chart.get_attribute("aria-label")
        base, guarded = (browser.find_element(By.ID, side).text for side in ("base", "guarded"))
        assert base and guarded and base != guarded
        browser.execute_script("document.getElementById('status').textContent = ''")
        ask("<script>document.title = 'broken'</script> <b>x</b> \u202e \"'&")
        assert browser.title == "dsg: what does the gate see?"
        assert not browser.find_elements(By.CSS_SELECTOR, "#tokens b, #tokens script")
        assert console_errors(browser) == []
    server.shutdown()
    server.server_close()
