"""Descriptions of features from a stand-in for Neuronpedia on 127.0.0.1, whose answers are not to be trusted."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from dsg_cli.neuronpedia import LONGEST, described, page_of, place_of

PLACE = "gemma-2-2b/3-gemmascope-res-16k"


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Answers by feature: what is in `answers`, else 404; `asked` are the paths."""
    answers: dict[int, bytes | int] = {}
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            answer = answers.get(int(self.path.rsplit("/", 1)[1]), 404)
            if answer == 0:
                time.sleep(1)
            status = answer if isinstance(answer, int) and answer else 200
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer if isinstance(answer, bytes) else b"{}")

        def log_message(self, *arguments):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    monkeypatch.setenv("DSG_NEURONPEDIA", f"http://127.0.0.1:{running.server_port}/")
    monkeypatch.setenv("DSG_CACHE", str(tmp_path / "cache"))
    running.answers, running.asked = answers, asked
    yield running
    running.shutdown()
    running.server_close()


def said(*texts):
    return json.dumps({"explanations": [{"description": text} for text in texts]}).encode()


def test_places_of_sae_lens():
    assert place_of("gemma-scope-2b-pt-res-canonical/layer_3/width_16k/canonical") == PLACE
    assert place_of("gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_59") == PLACE  # Listed under another name, too.
    assert place_of("gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_142") is None
    assert place_of("lab") is None and place_of("no/such") is None and place_of("/some/folder") is None
    assert page_of(PLACE, 7) == "https://www.neuronpedia.org/gemma-2-2b/3-gemmascope-res-16k/7"


def test_the_first_description_is_kept_and_not_asked_for_again(server):
    server.answers.update({1: said("", "words about spells", "more"), 2: said()})
    first = described(PLACE, [1, 2, 3])
    assert first.texts == {1: "words about spells"} and first.note == ""
    assert server.asked == [f"/api/feature/{PLACE}/{j}" for j in (1, 2, 3)]
    assert described(PLACE, [1, 2, 3]) == first and len(server.asked) == 3


def test_nothing_in_an_answer_reaches_a_terminal_or_fills_a_page(server):
    server.answers.update({1: said("a\x1b[31mb\x07\n\u202ec"), 2: said("x" * 100_000)})
    texts = described(PLACE, [1, 2]).texts
    assert texts[1] == "a[31mb c" and len(texts[2]) == LONGEST and texts[2].endswith("...")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"<html>", "Expecting value"),
        (b"[1]", "another form"),
        (b'{"explanations": {"description": "x"}}', "another form"),
        (b"[" * 200_000, "nested too deeply"),
        (b" " * (5 * 2**20), "more than"),
        (500, "500"),
        (0, "no answer in 0.2 seconds"),
    ],
)
def test_a_bad_answer_is_a_note_and_the_server_is_left_alone(server, monkeypatch, answer, words):
    monkeypatch.setattr("dsg_cli.neuronpedia.SECONDS", 0.2)
    server.answers.update({1: answer, 2: said("fine")})
    found = described(PLACE, [1, 2])
    assert found.texts == {} and words in found.note and len(server.asked) == 1


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "file:///etc", "nowhere"])
def test_no_server_is_a_note(server, monkeypatch, address):
    monkeypatch.setenv("DSG_NEURONPEDIA", address)
    found = described(PLACE, [1])
    assert found.texts == {} and found.note.startswith("Neuronpedia gave no description of feature 1: ")


def test_a_broken_cache_is_asked_again(server, tmp_path):
    server.answers[1] = said("fine")
    kept = tmp_path / "cache" / "neuronpedia" / PLACE / "1.json"
    kept.parent.mkdir(parents=True)
    for content in (b"{", b"[]", b'{"description": 3}', b"\xff"):
        kept.write_bytes(content)
        assert described(PLACE, [1]).texts == {1: "fine"}
