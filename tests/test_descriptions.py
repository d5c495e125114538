"""Descriptions of features: files of any kind and quality, Neuronpedia's export, and how they are ranked."""

import gzip
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import parse_qs, urlsplit

import pytest
import torch
from dsg_cli.descriptions import read_descriptions
from dsg_cli.embedding import rank_by_embedding
from dsg_cli.ranking import K1, B, Match, rank_by_terms, terms_of, unmatched

from dsg_cli import descriptions, neuronpedia_export
from dsg_cli.errors import DsgError

SAID = {0: "viruses in bats", 3: "code; loops", 7: "a virus"}
ROWS = [
    {"index": 0, "description": "viruses in bats", "modelId": "m"},
    {"index": "3", "description": "code"},
    {"index": 3, "explanations": [{"description": "loops"}, {"description": "code"}]},
    {"index": "7", "description": "a virus"},
    {"index": 8, "description": None},
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
FORMS = {
    "lines.jsonl": LINES.encode(),
    "blank.jsonl": b"\n" + LINES.replace("\n", "\r\n\n").encode(),
    "lines.jsonl.gz": gzip.compress(LINES.encode()),
    "several.gz": b"".join(gzip.compress(f"{line}\n".encode()) for line in LINES.splitlines()),
    "array.json": json.dumps(ROWS).encode(),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "table.csv": b'score,index,description\n1,0,viruses in bats\n2,3,code\n3,3,"loops"\n4,7,"a\nvirus"\n5,8,\n',
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_read(tmp_path, name):
    (tmp_path / name).write_bytes(FORMS[name])
    found = read_descriptions(tmp_path / name, 10)
    assert found.texts == SAID and found.source == name and len(found.sha256) == 64


BAD = {
    b"": "of no form",
    b"\x00\xff": "not UTF-8",
    b"just text\n": "of no form",
    b"index,about\n1,x\n": "of no form",
    b'index,description\n1,"open\n': "no CSV",
    b"{\n": "entry 1 is no JSON",
    b"[" * 100_000: "no JSON",
    b"[1]": "no index",
    b"[[]]": "no index",
    b'{"index": 1}\n': "no description",
    b'{"description": "x"}\n': "no index",
    b'{"index": 10, "description": "x"}\n': "describes feature 10; the SAE has 10",
    b'{"index": -1, "description": "x"}\n': "no whole number",
    b'{"index": 1.0, "description": "x"}\n': "no whole number",
    b'{"index": true, "description": "x"}\n': "no whole number",
    b'{"index": "0x1", "description": "x"}\n': "no whole number",
    '{"index": "²", "description": "x"}\n'.encode(): "no whole number",
    b'{"index": ' + b"9" * 5000 + b', "description": "x"}\n': "is no JSON",
    b'{"index": 1, "description": 5}\n': "no text",
    b'{"index": 1, "description": {"a": "b"}}\n': "describes no feature",
    b'{"index": 1, "explanations": [{"description": []}]}\n': "no text",
    b'{"index": 1, "description": " \\u0007 "}\n': "describes no feature",
    gzip.compress(LINES.encode())[:-9]: "no whole gzip",
    b"\x1f\x8bnothing": "no whole gzip",
}


@pytest.mark.parametrize("content", BAD, ids=range(len(BAD)))
def test_a_bad_file_is_one_clear_error(tmp_path, content):
    path = tmp_path / "bad"
    path.write_bytes(content)
    with pytest.raises(DsgError, match=BAD[content]) as found:
        read_descriptions(path, 10)
    assert str(path) in found.value.message and len(found.value.message) < 400


def test_files_are_bounded_packed_and_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(descriptions, "LARGEST", 10_000)
    (tmp_path / "large").write_bytes(b"{" + b" " * 10_000)
    with pytest.raises(DsgError, match="larger than"):
        read_descriptions(tmp_path / "large", 10)
    (tmp_path / "bomb").write_bytes(gzip.compress(b" " * 10_000_000))
    with pytest.raises(DsgError, match="once unpacked"):
        read_descriptions(tmp_path / "bomb", 10)
    with pytest.raises(DsgError, match="cannot be read"):
        read_descriptions(tmp_path / "missing", 10)


def test_control_characters_and_broken_ones_go(tmp_path):
    said = "a\\u001b[31m\\ud800b\\u0000 c\\u202e\\u2028d\\u00ade"
    (tmp_path / "odd").write_text(
        f'{{"index": 1, "description": "{said}"}}\n{{"index": 2, "description": "{"x" * 9000}"}}'
    )
    found = read_descriptions(tmp_path / "odd", 10).texts
    assert found[1] == "a [31m b c de" and found[2] == "x" * descriptions.LONGEST


def test_terms_meet_in_singular_and_plural():
    assert terms_of("The hexes of a hex; HEX!") == ["hex", "hex", "hex"]
    for one, many in (("virus", "viruses"), ("disease", "diseases"), ("study", "studies"), ("glass", "glasses")):
        assert terms_of(one) == terms_of(many)
    assert terms_of("is on the") == [] and terms_of("gas bus analysis") == ["gas", "bus", "analysis"]


DOCUMENTS = {5: "hex", 2: "hex hex curse", 9: "the curse of old towns", 4: "river", 7: "hexes"}


def test_scores_are_those_of_bm25():
    lengths = {j: len(terms_of(text)) for j, text in DOCUMENTS.items()}
    mean = sum(lengths.values()) / len(lengths)

    def score(j, query):
        total = 0.0
        for term in query:
            n_t = sum(term in terms_of(text) for text in DOCUMENTS.values())
            f_t = terms_of(DOCUMENTS[j]).count(term)
            total += math.log(1 + (5 - n_t + 0.5) / (n_t + 0.5)) * f_t / (f_t + K1 * (1 - B + B * lengths[j] / mean))
        return total

    found = rank_by_terms("Hex, a curse (hexes)", DOCUMENTS)
    expected = {j: score(j, ["hex", "curs"]) for j in DOCUMENTS}
    assert {one.index: one.score for one in found} == pytest.approx({j: s for j, s in expected.items() if s}, rel=1e-6)
    assert [one.index for one in found] == sorted((j for j in DOCUMENTS if j != 4), key=lambda j: (-expected[j], j))
    assert [one.index for one in found if one.index in (5, 7)] == [5, 7] and found[0].index == 2


def test_ties_go_to_the_smaller_index_and_order_does_not_matter():
    assert [one.index for one in rank_by_terms("hex", {9: "hex", 3: "hex", 4: "hex"})] == [3, 4, 9]
    backwards = dict(reversed(DOCUMENTS.items()))
    assert rank_by_terms("curse hex", backwards) == rank_by_terms("hex curse", DOCUMENTS)


def test_a_query_that_matches_nothing():
    with pytest.raises(DsgError, match="No description matches 'dragons'"):
        rank_by_terms("dragons", DOCUMENTS)
    for empty in ("", "of the", "!!"):
        with pytest.raises(DsgError, match="holds no word"):
            rank_by_terms(empty, DOCUMENTS)
    assert unmatched("the dragon hexes towns", DOCUMENTS.values()) == ["dragon"]
    assert rank_by_terms("dragon hex", DOCUMENTS) == rank_by_terms("hex", DOCUMENTS)


def test_an_embedding_model_ranks_by_cosine(folders, model, tokenizer):
    said = {4: "w1 w2", 2: "w7 w8 w9 w10", 6: "w1 w2", 8: "w3"}

    def vector(text):
        batch = tokenizer(text, return_tensors="pt")
        states = model.model(batch["input_ids"]).last_hidden_state[0]
        return torch.nn.functional.normalize(states.mean(0), dim=0)

    with torch.no_grad():
        cosines = {j: float(vector(text) @ vector("w1 w2")) for j, text in said.items()}
    found = rank_by_embedding("w1 w2", said, str(folders["model"]))
    assert [one.index for one in found] == sorted(said, key=lambda j: (-round(cosines[j], 5), j))
    assert {one.index: one.score for one in found} == pytest.approx(cosines, abs=1e-5)
    assert found[0] == Match(4, pytest.approx(1.0, abs=1e-5)) and found[1].index == 6
    with pytest.raises(DsgError, match="No model folder"):
        rank_by_embedding("w1", said, "/nowhere/at all")


NAME = "gemma-2-2b/3-gemmascope-res-16k"
L0_59 = "gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_59"


class Export(BaseHTTPRequestHandler):
    """An export of two pages: the second is listed by a token."""

    asked: ClassVar[list[str]] = []
    prefix = f"v1/{NAME}/explanations/"
    files: ClassVar[dict[str, bytes]] = {
        f"{prefix}batch-1.jsonl.gz": gzip.compress(b'{"index": "3", "description": "b\\u0007acteria"}\n'),
        f"{prefix}batch-0.jsonl.gz": gzip.compress(b'{"index": "2", "description": "viruses"}\n'),
    }

    def do_GET(self):
        self.asked.append(self.path)
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        content = self.files.get(url.path[1:])
        if query.get("prefix") == [self.prefix]:
            keys = [f"{self.prefix}batch-1.jsonl.gz", f"{self.prefix}../secret"]
            more = "<NextContinuationToken>a&amp;b</NextContinuationToken>"
            if query.get("continuation-token") == ["a&b"]:
                keys, more = [f"{self.prefix}batch-0.jsonl.gz"], ""
            content = ("<R>" + "".join(f"<Key>{key}</Key>" for key in keys) + more + "</R>").encode()
        elif query:
            content = b"<R></R>"
        self.send_response(200 if content is not None else 404)
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, *_):
        pass


@pytest.fixture
def export(monkeypatch, tmp_path):
    monkeypatch.setenv("DSG_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    Export.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Export)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("DSG_NEURONPEDIA_EXPORT", f"http://127.0.0.1:{server.server_port}")
    yield Export
    server.shutdown()
    server.server_close()


def test_the_export_is_downloaded_once(export, monkeypatch):
    path = neuronpedia_export.fetch_descriptions(NAME, 16384)
    assert read_descriptions(path, 16384).texts == {2: "viruses", 3: "b acteria"}
    assert len(export.asked) == 4 and not any("secret" in one for one in export.asked)
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    monkeypatch.setenv("DSG_NEURONPEDIA_EXPORT", "http://127.0.0.1:1")
    assert neuronpedia_export.fetch_descriptions(NAME, 16384) == path


def test_what_to_do_where_there_is_no_export(export, monkeypatch, tmp_path):
    with pytest.raises(DsgError, match="no descriptions of gemma-2-2b/other") as found:
        neuronpedia_export.fetch_descriptions("gemma-2-2b/other", 16384)
    assert "--descriptions" in found.value.hint and "dsg describe" in found.value.hint
    with pytest.raises(DsgError, match="the SAE has 3"):  # Another SAE's: nothing is kept.
        neuronpedia_export.fetch_descriptions(NAME, 3)
    asked = len(export.asked)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DsgError, match="not in the cache"):
        neuronpedia_export.fetch_descriptions(NAME, 16384)
    assert len(export.asked) == asked and not [one for one in (tmp_path / "cache").rglob("*") if one.is_file()]
    monkeypatch.delenv("HF_HUB_OFFLINE")
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patched, pytest.raises(DsgError, match="cannot be kept"):
        patched.setenv("DSG_CACHE", str(tmp_path / "file"))
        neuronpedia_export.fetch_descriptions(NAME, 16384)
    for address, words in (("http://127.0.0.1:1", "cannot be reached"), ("file:///etc", "no address")):
        monkeypatch.setenv("DSG_NEURONPEDIA_EXPORT", address)
        with pytest.raises(DsgError, match=words):
            neuronpedia_export.fetch_descriptions(NAME, 16384)
