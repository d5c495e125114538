"""The live page's server: what it answers, and to whom."""

import http.client
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from dsg_cli.live.server import HOST, LONGEST, Server

from dsg_cli.errors import DsgError

JSON = {"Content-Type": "application/json"}


def answer(asked):
    if asked["prompt"] == "bad":
        raise DsgError("The prompt is bad.", "Give another.")
    return {"said": asked["prompt"].upper()}


def serving(about, ask):
    made = Server(0)
    made.about, made.ask = about, ask
    return made


@pytest.fixture(scope="module")
def server():
    made = serving({"model": "a <b>"}, answer)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join(5)


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
        assert (
            got.status == 200
            and got.headers["Content-Type"].startswith(kind)
            and b"http:" not in part.replace(b"http://www.w3.org/2000/svg", b"")
        )
    assert b"innerHTML" not in part


def test_about_and_answers(ask):
    assert json.loads(ask("GET", "/api/about")[1]) == {"model": "a <b>"}
    got, found = ask("POST", "/api/ask", {"prompt": "why"}, JSON)
    assert got.status == 200 and json.loads(found) == {"said": "WHY"} and got.headers["Cache-Control"] == "no-store"


def test_what_is_wrong_with_a_prompt_is_said(ask):
    got, found = ask("POST", "/api/ask", {"prompt": "bad"}, JSON)
    assert got.status == 422 and json.loads(found) == {"error": "The prompt is bad. Give another."}


@pytest.mark.parametrize("body", ["", "no json", "[]", '{"prompt": 3}', "[" * 10_000])
def test_a_body_that_is_no_prompt(ask, body):
    got, found = ask("POST", "/api/ask", body, JSON)
    assert got.status == 400 and "prompt" in json.loads(found)["error"]


def test_a_body_that_is_too_long_is_not_read(ask):
    got, _ = ask("POST", "/api/ask", None, JSON | {"Content-Length": str(LONGEST + 1)})
    assert got.status == 413


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

    made = serving({}, slow)
    threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def send():
        connection = http.client.HTTPConnection(HOST, made.server_port, timeout=10)
        connection.request("POST", "/api/ask", '{"prompt": "a"}', JSON)
        assert connection.getresponse().status == 200

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    made.shutdown()
    made.server_close()
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
    command = [
        sys.executable,
        "-m",
        "dsg_cli",
        "inspect",
        str(guardrail),
        "--serve",
        "--port",
        "0",
        "-w",
        str(tmp_path),
    ]
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
