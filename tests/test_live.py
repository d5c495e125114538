"""The live page on the lab: what it is told, and what a person sees of it in a browser."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from browser import console_errors, open_browser

from dsg_cli.errors import DsgError
from dsg_cli.inspection.live.server import HOST, LONGEST, Server
from dsg_cli.recipe import load_recipe
from dsg_cli.stages import prompts as live
from dsg_cli.workspace.store import Workspace

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

    with serving(looked.about(), looked.ask) as server, open_browser(tmp_path) as browser:
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


JSON = {"Content-Type": "application/json"}


def answer(asked):
    if asked["prompt"] == "bad":
        raise DsgError("The prompt is bad.", "Give another.")
    return {"said": asked["prompt"].upper()}


@contextlib.contextmanager
def serving(about, ask):
    server = Server(0)
    server.about, server.ask = about, ask
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(5)


@pytest.fixture(scope="module")
def server():
    with serving({"model": "a <b>"}, answer) as server:
        yield server


@pytest.fixture
def ask(server):
    def send(method, path, body=None, headers=None):
        connection = http.client.HTTPConnection(HOST, server.server_port, timeout=10)
        text = body if isinstance(body, str | bytes | None) else json.dumps(body)
        connection.request(method, path, text, headers or {})
        got = connection.getresponse()
        data = got.read()
        connection.close()
        return got, data

    return send


def test_only_this_machine_can_reach_it(server):
    assert server.server_address[0] == "127.0.0.1" and server.url == f"http://127.0.0.1:{server.server_port}/"


def test_the_page_needs_nothing_but_its_own_parts(ask):
    got, page = ask("GET", "/")
    assert got.status == 200 and b"http" not in page
    policy = got.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert b"<script>" not in page and b"style=" not in page and b" on" + b"click" not in page
    for name, kind in (("page.css", "text/css"), ("page.js", "text/javascript")):
        assert name.encode() in page
        got, part = ask("GET", f"/{name}")
        assert got.status == 200 and got.headers["Content-Type"].startswith(kind)
        assert b"http:" not in part.replace(b"http://www.w3.org/2000/svg", b"")
    assert b"innerHTML" not in part


def test_about_and_answers(ask):
    assert json.loads(ask("GET", "/api/about")[1]) == {"model": "a <b>"}
    got, found = ask("POST", "/api/ask", {"prompt": "why"}, JSON)
    assert got.status == 200 and json.loads(found) == {"said": "WHY"} and got.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize(
    ("body", "headers", "status", "words"),
    [
        ({"prompt": "bad"}, {}, 422, "The prompt is bad. Give another."),
        *((body, {}, 400, "prompt") for body in ("", "no json", "[]", '{"prompt": 3}', "[" * 10_000)),
        (None, {"Content-Length": str(LONGEST + 1)}, 413, "more than"),  # It is not read.
    ],
)
def test_what_is_wrong_with_a_prompt_is_said(ask, body, headers, status, words):
    got, found = ask("POST", "/api/ask", body, JSON | headers)
    assert got.status == status and words in json.loads(found)["error"]


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/", {"Host": "evil.example"}, 403),  # A name that somebody made to point here.
        ("POST", "/api/ask", JSON | {"Host": "evil.example"}, 403),
        ("POST", "/api/ask", JSON | {"Origin": "http://evil.example"}, 403),
        ("POST", "/api/ask", JSON | {"Origin": "null"}, 403),
        ("POST", "/api/ask", {"Content-Type": "text/plain"}, 415),  # What a form of another site may send.
        ("GET", "/api/ask?prompt=why", {}, 404),
        ("GET", "/../server.py", {}, 404),
        ("GET", "/page.html", {}, 404),
        ("PUT", "/api/ask", JSON, 501),
    ],
)
def test_who_and_what_is_refused(ask, method, path, headers, status):
    got, found = ask(method, path, {"prompt": "why"} if method != "GET" else None, headers)
    assert got.status == status and b"WHY" not in found


def test_its_own_origin_may_ask(ask, server):
    for name in (HOST, "localhost"):
        own = {"Host": f"{name}:{server.server_port}", "Origin": f"http://{name}:{server.server_port}"}
        assert ask("POST", "/api/ask", {"prompt": "why"}, JSON | own)[0].status == 200


def test_one_prompt_is_answered_at_a_time():
    inside, most = [], []

    def slow(_asked):
        inside.append(1)
        most.append(len(inside))
        threading.Event().wait(0.05)
        inside.pop()
        return {}

    def send(port):
        connection = http.client.HTTPConnection(HOST, port, timeout=10)
        connection.request("POST", "/api/ask", '{"prompt": "a"}', JSON)
        return connection.getresponse().status

    with serving({}, slow) as server, ThreadPoolExecutor(4) as pool:
        assert list(pool.map(send, [server.server_port] * 4)) == [200] * 4
    assert most == [1, 1, 1, 1]


def test_nothing_is_logged(ask, capfd):
    ask("POST", "/api/ask", {"prompt": "a secret"}, JSON)
    assert capfd.readouterr() == ("", "")


def test_a_port_that_is_taken_is_refused(server):
    with pytest.raises(DsgError, match=f"Port {server.server_port} of 127.0.0.1 cannot be used") as caught:
        Server(server.server_port)
    assert "--port" in caught.value.hint
    with pytest.raises(DsgError, match="cannot be used"):
        Server(99_999)


def test_the_command_says_where_it_is_and_ends_by_a_signal(tmp_path):
    guardrail = Path(__file__).parent / "data" / "schema-4" / "guardrail-001.json"
    command = [*f"{sys.executable} -m dsg_cli inspect".split(), guardrail, *["--serve", "--port", "0", "-w"], tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        url = process.stdout.readline().strip()
        connection = http.client.HTTPConnection(url.removeprefix("http://").rstrip("/"), timeout=60)
        connection.request("POST", "/api/ask", '{"prompt": "the hex", "max_new_tokens": 2}', JSON)
        assert "base" in json.loads(connection.getresponse().read())
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130 and "stopped" in process.stderr.read()


def test_nothing_is_loaded_for_a_port_that_is_taken(dsg, server):
    code, out, err = dsg("inspect", "--serve", "--port", server.server_port)
    assert code == 1 and not out and "--port" in err
