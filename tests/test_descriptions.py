"""Descriptions of features: files of any kind and quality, Neuronpedia's export, and how they are ranked."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import math
import random
import shutil
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
import torch

from dsg_cli.errors import DsgError
from dsg_cli.guardrail.runtime.sites import HookSite
from dsg_cli.inspection import contexts, descriptions
from dsg_cli.inspection.contexts import AFTER, BEFORE, NOTHING, Contexts, describe_features, read_contexts
from dsg_cli.inspection.descriptions import (
    Match,
    rank_by_embedding,
    rank_by_terms,
    read_descriptions,
    terms_of,
    unmatched,
)
from dsg_cli.inspection.neuronpedia import LONGEST_ANSWER, described, fetch_descriptions, page_of, place_of
from dsg_cli.recipe import load_recipe
from dsg_cli.report.gather import gather
from dsg_cli.report.page import report_of
from dsg_cli.report.tables import artifact_table, candidates_table
from dsg_cli.stages import apply, calibrate, describe, evaluate, inspect, select
from dsg_cli.stages import run as run_recipe
from dsg_cli.stages.stage import RunOptions
from dsg_cli.workspace.artifacts import FeatureSet, Guardrail, Threshold
from dsg_cli.workspace.results import Inspection
from dsg_cli.workspace.store import Workspace

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
    (tmp_path / "bomb").write_bytes(gzip.compress(b" " * 10_000_000))
    for name, words in (("large", "larger than"), ("bomb", "once unpacked"), ("missing", "cannot be read")):
        with pytest.raises(DsgError, match=words):
            read_descriptions(tmp_path / name, 10)


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
    k1, b = descriptions.K1, descriptions.B
    lengths = {j: len(terms_of(text)) for j, text in DOCUMENTS.items()}
    mean = sum(lengths.values()) / len(lengths)

    def score(j, query):
        total = 0.0
        for term in query:
            n_t = sum(term in terms_of(text) for text in DOCUMENTS.values())
            f_t = terms_of(DOCUMENTS[j]).count(term)
            total += math.log(1 + (5 - n_t + 0.5) / (n_t + 0.5)) * f_t / (f_t + k1 * (1 - b + b * lengths[j] / mean))
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


@contextmanager
def serving(answer):
    """A server on which GET of a path brings `answer(path)`, a status and a body; its `asked` are the paths."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            status, body = answer(self.path)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.asked, server.url = asked, f"http://127.0.0.1:{server.server_port}"
        yield server
        server.shutdown()


@pytest.fixture
def export(monkeypatch, tmp_path):
    """An export of two pages: the second is listed by a token."""
    prefix = f"v1/{NAME}/explanations/"
    files = {
        f"/{prefix}batch-1.jsonl.gz": gzip.compress(b'{"index": "3", "description": "b\\u0007acteria"}\n'),
        f"/{prefix}batch-0.jsonl.gz": gzip.compress(b'{"index": "2", "description": "viruses"}\n'),
    }

    def answer(path):
        query = parse_qs(urlsplit(path).query)
        if not query:
            return (200, files[path]) if path in files else (404, b"")
        keys, more = [], ""
        if query["prefix"] == [prefix] and query.get("continuation-token") == ["a&b"]:
            keys = ["batch-0.jsonl.gz"]
        elif query["prefix"] == [prefix]:
            keys, more = ["batch-1.jsonl.gz", "../secret"], "<NextContinuationToken>a&amp;b</NextContinuationToken>"
        return 200, ("<R>" + "".join(f"<Key>{prefix}{key}</Key>" for key in keys) + more + "</R>").encode()

    monkeypatch.setenv("DSG_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with serving(answer) as server:
        monkeypatch.setenv("DSG_NEURONPEDIA_EXPORT", server.url)
        yield server


def test_the_export_is_downloaded_once(export, monkeypatch):
    path = fetch_descriptions(NAME, 16384)
    assert read_descriptions(path, 16384).texts == {2: "viruses", 3: "b acteria"}
    assert len(export.asked) == 4 and not any("secret" in one for one in export.asked)
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    monkeypatch.setenv("DSG_NEURONPEDIA_EXPORT", "http://127.0.0.1:1")
    assert fetch_descriptions(NAME, 16384) == path


def test_what_to_do_where_there_is_no_export(export, monkeypatch, tmp_path):
    with pytest.raises(DsgError, match="no descriptions of gemma-2-2b/other") as found:
        fetch_descriptions("gemma-2-2b/other", 16384)
    assert "--descriptions" in found.value.hint and "dsg describe" in found.value.hint
    with pytest.raises(DsgError, match="the SAE has 3"):  # Another SAE's: nothing is kept.
        fetch_descriptions(NAME, 3)
    asked = len(export.asked)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DsgError, match="not in the cache"):
        fetch_descriptions(NAME, 16384)
    assert len(export.asked) == asked and not [one for one in (tmp_path / "cache").rglob("*") if one.is_file()]
    monkeypatch.delenv("HF_HUB_OFFLINE")
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patched, pytest.raises(DsgError, match="cannot be kept"):
        patched.setenv("DSG_CACHE", str(tmp_path / "file"))
        fetch_descriptions(NAME, 16384)
    for address, words in (("http://127.0.0.1:1", "cannot be reached"), ("file:///etc", "no address")):
        monkeypatch.setenv("DSG_NEURONPEDIA_EXPORT", address)
        with pytest.raises(DsgError, match=words):
            fetch_descriptions(NAME, 16384)


FIRES_ON = [{"w5": 1.0}, {"w6": 2.0, "w7": 1.0}, {}, {"w8": -3.0}, {"w5": 1.0, "w9": 1.0}]
"""Feature -> words and its activation on them."""


@pytest.fixture(scope="module")
def rows(tokenizer):
    rng = random.Random(3)
    texts = [" ".join(f"w{rng.randrange(40)}" for _ in range(30)) for _ in range(60)]
    return [[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]


@pytest.fixture(scope="module")
def found(model, tokenizer, rows):
    """Of features that see which word a token is: the embedding that is the nearest to the residual."""
    embedding_VD = model.get_input_embeddings().weight.detach()
    acts_VF = torch.zeros(len(embedding_VD), len(FIRES_ON))
    for j, words in enumerate(FIRES_ON):
        for word, act in words.items():
            acts_VF[tokenizer.convert_tokens_to_ids(word), j] = act

    def encode(resid_TD):
        return acts_VF[torch.cdist(resid_TD, embedding_VD).argmin(-1)]

    embedded = read_contexts(model, HookSite(0, "resid_pre"), encode, rows, tokenizer, n_contexts=8)
    return {one.index: one for one in describe_features(embedded, tokenizer)}


def test_a_feature_is_described_by_the_word_on_which_it_fires(found):
    assert found[0].description.split(", ")[0] == "w5"
    assert found[3].description.split(", ")[0] == "w8"
    assert found[1].description.split(", ")[0] == "w6"  # The peak weighs most.
    assert set(found) == {0, 1, 3, 4}  # A dead one is not described.
    assert found[4].description.split(", ")[:2] in (["w9", "w5"], ["w5", "w9"])


def test_counts_are_those_of_the_text(found, rows, tokenizer):
    w5, w6, w7 = (tokenizer.convert_tokens_to_ids(word) for word in ("w5", "w6", "w7"))
    n_tokens = sum(len(row) - 1 for row in rows)
    assert found[0].n == sum(row.count(w5) for row in rows)
    assert found[1].n == sum(row.count(w6) + row.count(w7) for row in rows)
    assert found[1].rate == pytest.approx(found[1].n / n_tokens)


class Pieces:
    """A tokenizer of word pieces; 9 is special."""

    pieces = ("vir", "us", " spreads", " the", " air", ", 12 ", "Böse\x1b", " ñandú", "-", "<s>")

    def decode(self, ids, skip_special_tokens):
        return "".join(self.pieces[i] for i in ids if i != 9)


def contexts_of(*features):
    """From the tokens of contexts, `(ids before, peak and after, activations)`, a list a feature."""
    n, width = max(map(len, features)), BEFORE + 1 + AFTER
    ids = torch.full((len(features), n, width), NOTHING)
    acts = torch.zeros(len(features), n, width)
    peaks, row = torch.zeros(len(features), n), torch.full((len(features), n), NOTHING)
    for j, several in enumerate(features):
        for k, (tokens, values) in enumerate(several):
            start = BEFORE - max(range(len(values)), key=lambda i: abs(values[i]))
            ids[j, k, start : start + len(tokens)] = torch.tensor(tokens)
            acts[j, k, start : start + len(tokens)] = torch.tensor(values)
            peaks[j, k], row[j, k] = max(values, key=abs), k
    rate = torch.full((len(features),), 0.25, dtype=torch.float64)
    return Contexts(100, rate, rate, peaks, row, row, ids, acts)


def words(*features):
    return {one.index: one.description.split(", ") for one in describe_features(contexts_of(*features), Pieces())}


def test_pieces_are_put_together_to_words():
    alone = [([9, 0, 1, 2, 3], [0.0, 0.2, 1.0, 0.0, 0.0])]
    other = [([4, 7, 8], [0.0, 1.0, 0.0])]
    assert words(alone, other) == {0: ["virus"], 1: ["ñandú", "air"]}
    # Numbers and stop words describe nothing; case and what no terminal should see go.
    assert words([([3, 5, 6], [1.0, 2.0, 3.0])], other)[0] == ["böse"]


class Bytes:
    """A tokenizer of bytes: a letter may take several tokens."""

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode("utf-8", "replace")


def test_letters_of_several_tokens_are_put_together():
    ids = list("a мир".encode())
    context = (ids, [0.0] * (len(ids) - 1) + [1.0])
    found = describe_features(contexts_of([context], [([98], [1.0])]), Bytes())
    assert found[0].description == "мир"


def test_words_before_the_peak_count_and_later_ones_only_by_their_activation():
    assert contexts.BEFORE_PEAK >= contexts.SHARE_OF_BEST
    found = words([([4, 2, 7], [0.0, 1.0, 0.0])], [([0, 1], [1.0, 1.0])])
    assert found[0] == ["spreads", "air"]
    assert words([([4, 2, 7], [0.0, 1.0, 0.5])], [([0, 1], [1.0, 1.0])])[0] == ["spreads", "ñandú", "air"]


def test_what_describes_every_feature_describes_none_well():
    shared = [([2, 0, 1], [0.0, 1.0, 1.0])]
    found = words(*[[*shared, ([2, 7], [0.0, 0.9])]] + [[*shared, *shared]] * 3)
    assert found[0][0] == "ñandú" and all(found[j][0] != "ñandú" for j in (1, 2, 3))


def test_descriptions_are_short_and_the_same_each_time(found, model, tokenizer):
    assert all(0 < len(one.description.split(", ")) <= contexts.N_WORDS for one in found.values())
    many = [([0, 1], [1.0, 1.0])]
    assert words(many, many) == words(many, many)


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Answers by feature: what is in `answers`, else 404; `asked` are the paths."""
    answers: dict[int, bytes | int] = {}

    def answer(path):
        content = answers.get(int(path.rsplit("/", 1)[1]), 404)
        if content == 0:
            time.sleep(1)
        return (200, content) if isinstance(content, bytes) else (content or 200, b"{}")

    monkeypatch.setenv("DSG_CACHE", str(tmp_path / "cache"))
    with serving(answer) as running:
        monkeypatch.setenv("DSG_NEURONPEDIA", f"{running.url}/")
        running.answers = answers
        yield running


def said(*texts):
    return json.dumps({"explanations": [{"description": text} for text in texts]}).encode()


def test_places_of_sae_lens():
    assert place_of("gemma-scope-2b-pt-res-canonical/layer_3/width_16k/canonical") == NAME
    assert place_of("gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_59") == NAME  # Listed under another name, too.
    assert place_of("gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_142") is None
    assert place_of("lab") is None and place_of("no/such") is None and place_of("/some/folder") is None
    assert page_of(NAME, 7) == "https://www.neuronpedia.org/gemma-2-2b/3-gemmascope-res-16k/7"


def test_the_first_description_is_kept_and_not_asked_for_again(server):
    server.answers.update({1: said("", "words about spells", "more"), 2: said()})
    first = described(NAME, [1, 2, 3])
    assert first.texts == {1: "words about spells"} and first.note == ""
    assert server.asked == [f"/api/feature/{NAME}/{j}" for j in (1, 2, 3)]
    assert described(NAME, [1, 2, 3]) == first and len(server.asked) == 3


def test_nothing_in_an_answer_reaches_a_terminal_or_fills_a_page(server):
    server.answers.update({1: said("a\x1b[31mb\x07\n\u202ec"), 2: said("x" * 100_000)})
    texts = described(NAME, [1, 2]).texts
    assert texts[1] == "a[31mb c" and len(texts[2]) == LONGEST_ANSWER and texts[2].endswith("...")


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
    monkeypatch.setattr("dsg_cli.inspection.neuronpedia.SECONDS", 0.2)
    server.answers.update({1: answer, 2: said("fine")})
    found = described(NAME, [1, 2])
    assert found.texts == {} and words in found.note and len(server.asked) == 1


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "file:///etc", "nowhere"])
def test_no_server_is_a_note(server, monkeypatch, address):
    monkeypatch.setenv("DSG_NEURONPEDIA", address)
    found = described(NAME, [1])
    assert found.texts == {} and found.note.startswith("Neuronpedia gave no description of feature 1: ")


def test_a_broken_cache_is_asked_again(server, tmp_path):
    server.answers[1] = said("fine")
    kept = tmp_path / "cache" / "neuronpedia" / NAME / "1.json"
    kept.parent.mkdir(parents=True)
    for content in (b"{", b"[]", b'{"description": 3}', b"\xff"):
        kept.write_bytes(content)
        assert described(NAME, [1]).texts == {1: "fine"}


DOMAINS = ("lab-hexes", "lab-ciphers", "lab-elixirs", "lab-near", "lab-far")
WORDS = "hex cursed dire baneful grim foul"
SMALL = ["corpora.limit=60", "calibrate.alpha=0.1", "eval.benches=[lab-hexes, lab-near]", "eval.limit=16"]
SMALL += ["attack.dilution_lengths=[0, 16]", "select.max_rows=8"]


def small(folder, *sets):
    return load_recipe("lab-zero-shot", sets=[*SMALL, f"select.descriptions={folder / 'lab.jsonl'}", *sets])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_thread):
    """With descriptions of the lab's features, made from all domains together."""
    made = tmp_path_factory.mktemp("zero-shot")
    recipe = load_recipe(sets=["model.source=lab", "corpora.limit=60"])
    found = describe.run(recipe, Workspace(made / "ws"), made / "lab.jsonl", DOMAINS)
    assert len(found) > 300 and not (made / "ws").exists()
    return made


@pytest.fixture(scope="module")
def workspace(folder):
    return Workspace(folder / "ws")


@pytest.fixture(scope="module")
def chain(folder, workspace):
    return run_recipe.run(small(folder), workspace)


@pytest.fixture(scope="module")
def unseen(folder, workspace, chain):
    """A guardrail of the default gate, which nobody has seen fire."""
    recipe = small(folder, "calibrate.gate=probe", "guardrail.tuning_bench=null")
    threshold = calibrate.run(recipe, workspace, source=chain[0].id)
    return apply.run(recipe, workspace, source=threshold.id)


def shown(stored):
    from rich.console import Console

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(artifact_table(stored))
    return " ".join(console.export_text().split())


def test_descriptions_are_lines_that_select_and_people_read(folder):
    rows = [json.loads(line) for line in (folder / "lab.jsonl").read_text().splitlines()]
    assert all(set(row) == {"index", "description", "n", "rate"} for row in rows)
    assert all(row["n"] >= 1 and 0 < row["rate"] <= 1 and row["description"] for row in rows)
    assert [row["index"] for row in rows] == sorted({row["index"] for row in rows})


def test_the_chain_forgets_what_was_only_described(chain):
    assert [stored.header.kind for stored in chain] == ["features", "threshold", "guardrail", "eval", "attack"]
    results = {bench: sides["unlearned"]["acc"] for bench, sides in chain[3].body.results.items()}
    assert results["lab-hexes"] <= 0.45 and results["lab-near"] >= 0.9
    assert chain[3].body.gate["lab-hexes"]["rate"] >= 0.9 and chain[3].body.gate["lab-near"]["rate"] <= 0.1
    assert chain[4].body.bench == "lab-hexes"  # As the guardrail says, which was tried on it.


def test_what_is_not_known_is_null(chain):
    features = chain[0].body_as(FeatureSet)
    assert chain[0].header.settings["forget"] == [] and features.forget_tokens == 0 and features.probe == {}
    assert all(one.forget_score is None and one.ratio is None for one in features.features)
    assert features.ratio_cut is features.forget_cut is features.percentiles_over is None
    described = features.described
    assert described["query"] == WORDS and described["ranker"] == "bm25" and described["source"] == "lab.jsonl"
    order = [row["index"] for row in described["ranking"]]
    assert [one.index for one in features.features] == [i for i in order if i in {f.index for f in features.features}]
    scores = [row["score"] for row in described["ranking"]]
    assert scores == sorted(scores, reverse=True)
    assert "lab.jsonl" in shown(chain[0]) and "no forget text was read" in shown(chain[0])


def test_text_of_descriptions_is_kept_only_if_asked_for(folder, workspace, chain):
    assert all(set(row) == {"index", "score"} for row in chain[0].body.described["ranking"])
    found = []
    kept = select.run(small(folder, "select.samples=true"), workspace, ranked=found.append)
    texts = {row["index"]: row["description"] for row in kept.body.described["ranking"]}
    assert texts and all(text == found[0].texts[j] for j, text in texts.items())
    assert "dire" in shown(kept) and len(candidates_table(found[0]).rows) == min(40, len(texts))


def test_an_embedding_model_ranks_too(folder, workspace):
    stored = select.run(small(folder, "select.embedding=lab", "select.max_retain_rate=null"), workspace)
    described = stored.body.described
    assert described["ranker"] == "embedding lab" and len(stored.body.features) == 12
    assert len(described["ranking"]) == len((folder / "lab.jsonl").read_text().splitlines())
    assert all(-1.001 <= row["score"] <= 1.001 for row in described["ranking"])


def test_other_descriptions_are_another_selection(folder, workspace, chain):
    again = run_recipe.run(small(folder), workspace, options=RunOptions(reuse=True))
    assert [stored.id for stored in again] == [stored.id for stored in chain]
    lines = (folder / "lab.jsonl").read_text()
    (folder / "lab.jsonl").write_text(lines + "\n")
    assert select.run(small(folder), workspace, options=RunOptions(reuse=True)).id != chain[0].id
    (folder / "lab.jsonl").write_text(lines)


def test_features_that_fire_on_retain_text_are_dropped_and_named(folder, workspace):
    strict, loose = (
        select.run(small(folder, f"select.max_retain_rate={rate}", "select.n_features=4"), workspace)
        for rate in ("0.002", "null")
    )
    rates = workspace.tensors(strict)["retain_rate"]
    assert all(rates[one.index] <= 0.002 for one in strict.body.features)
    dropped = next(note for note in strict.header.notes if note.startswith("Dropped"))
    order = [row["index"] for row in strict.body.described["ranking"]]
    before_last = order[: order.index(strict.body.features[-1].index)]
    assert [int(i) for i in dropped.split(": ")[1][:-1].split(", ")] == [i for i in before_last if rates[i] > 0.002]
    assert [one.index for one in loose.body.features] == order[:4] and not loose.header.notes


def test_the_default_gate_gives_way_and_an_untried_guardrail_says_so(unseen, workspace):
    threshold = workspace.read(unseen.header.inputs[0].id)
    body, guardrail = threshold.body_as(Threshold), unseen.body_as(Guardrail)
    assert body.gate == threshold.header.settings["gate"] == "window" and body.detectors == body.features
    assert any("in the place of the probe" in note for note in threshold.header.notes)
    assert guardrail.effect == {} and guardrail.forget == []
    assert any("nobody has seen it fire" in note for note in unseen.header.notes)
    assert "tried on nothing" in shown(unseen)


def test_apply_tries_it_on_a_forget_corpus(folder, workspace, unseen):
    recipe = small(folder, "corpora.forget=[lab-hexes]", "guardrail.tuning_bench=null")
    tried = apply.run(recipe, workspace, source=unseen.header.inputs[0].id)
    assert tried.body.effect["gate_rate"] > 0.9 and tried.body.forget == ["lab-hexes"]
    assert tried.header.settings["forget"][0]["name"] == "lab-hexes"


@pytest.mark.parametrize("gate", ["mean", "causal-mean"])
def test_the_papers_gates_need_no_forget_text(folder, workspace, chain, gate):
    stored = calibrate.run(small(folder, f"calibrate.gate={gate}"), workspace, source=chain[0].id)
    assert stored.body.gate == gate and stored.body.detectors == [] and not stored.header.notes


def test_a_threshold_may_be_given(folder, workspace, chain):
    recipe = small(folder, "calibrate.gate=mean", "calibrate.threshold=0.6")
    stored = calibrate.run(recipe, workspace, source=chain[0].id)
    assert stored.body.threshold == 0.6 and any("was given" in note for note in stored.header.notes)
    assert "promises nothing" in report_of(gather(workspace, [stored.id]), "t").text
    fresh = [row for row in workspace.rows(stored) if row["part"] == "fresh"]
    assert stored.body.false_positive_rate == sum(row["statistic"] > 0.6 for row in fresh) / len(fresh)


def test_what_was_only_described_can_be_inspected(folder, workspace, unseen):
    found = inspect.run(small(folder), workspace, source=unseen.id, settings=inspect.InspectSettings(limit=10)).stored
    features = found.body_as(Inspection).features
    assert features and all(one["forget_score"] is None and one["retain_score"] >= 0 for one in features)
    assert not [warning for one in features for warning in one["warnings"] if "forgotten" in warning]


def test_a_report_shows_descriptions_only_with_the_text_and_says_what_was_never_tried(folder, workspace, unseen):
    kept = select.run(small(folder, "select.samples=true"), workspace)
    gathered = gather(workspace, [kept.id, unseen.id])
    described = kept.body.described["ranking"][0]["description"]
    assert described not in report_of(gathered, "t").text
    assert described in report_of(gathered, "t", has_text=True).text
    assert "never tried on text that it should catch" in report_of(gathered, "t").text


def test_eval_says_that_it_cannot_check_what_nobody_named(folder, workspace, unseen):
    stored = evaluate.run(small(folder), workspace, sources=[unseen.id])
    assert any("is not checked" in note and "--expect" in note for note in stored.header.notes)


def test_features_by_hand_with_and_without_forget_text(folder, workspace, chain):
    recipe = small(folder, "select.describe=null", "select.descriptions=null", "select.features=[331, 7, 468]")
    alone = select.run(recipe, workspace)
    assert [one.index for one in alone.body.features] == [331, 7, 468] and alone.body.described == {}
    assert all(one.ratio is None for one in alone.body.features) and "Named by hand" in shown(alone)
    corpora = dataclasses.replace(recipe.corpora, forget=["lab-hexes"])
    measured = select.run(dataclasses.replace(recipe, corpora=corpora), workspace)
    first, formatted, _ = measured.body.features
    assert first.index == 331 and first.ratio > 10 * formatted.ratio and measured.body.probe
    assert [one.retain_score for one in measured.body.features] == [one.retain_score for one in alone.body.features]
    assert calibrate.run(load_recipe(sets=["calibrate.alpha=0.1"]), workspace, source=measured.id).body.gate == "probe"


LAB = ("--model", "lab", "--retain", "lab-near")

SELECT = {
    ("--describe", "hex"): "Nobody is known to have described the features of lab",
    ("--describe", "hex", "--descriptions", "missing.jsonl"): "missing.jsonl cannot be read",
    ("--describe", "hex", "--descriptions", "bad.jsonl"): "bad.jsonl",
    ("--describe", "dragons", "--descriptions", "lab.jsonl"): "No description matches 'dragons'",
    ("--describe", "hex", "--features", "1"): "leave one out",
    ("--descriptions", "lab.jsonl"): "are for describe, which is not given",
    ("--features", "1,768"): "there is no 768",
    ("--features", "1,1"): "has a value twice",
    ("--features", "1,x"): "no list of indices",
    ("--features", "-1"): "no list of indices",
    ("--features", "1", "--set", "select.max_retain_rate=2"): "select.max_retain_rate is 2; it should be at most 1",
    ("--describe", "hex", "--descriptions", "lab.jsonl", "--embedding", "./none"): "No model folder",
    (): "No forget corpus is named",
}


@pytest.fixture
def unloaded(monkeypatch):
    """No model's weights are loaded."""

    def refuse(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)


@pytest.mark.parametrize("arguments", SELECT, ids=" ".join)
def test_select_refuses_before_weights_are_loaded(dsg, tmp_path, folder, unloaded, arguments):
    shutil.copy(folder / "lab.jsonl", tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"index": 9999, "description": "hex"}\n')
    code, out, err = dsg("select", *LAB, *arguments)
    assert code == 1 and SELECT[arguments] in err and not out, err
    assert not list((tmp_path / "dsg-workspace").glob("*"))


def test_select_needs_retain_text_all_the_same(dsg, folder, unloaded):
    code, _, err = dsg("select", "--model", "lab", "--describe", "hex", "--descriptions", folder / "lab.jsonl")
    assert code == 1 and "No retain corpus is named" in err


LATER = {
    "calibrate --from {features} --gate cusum": "the gate cusum lies half-way",
    "apply --from {threshold} --strength auto": "no questions to choose on",
    "apply --from {threshold} --forget lab-near": "both to be forgotten and to be retained",
    "apply --method static-clamp --from {features}": "picked without forget text",
    "apply --method npo --from {features}": "No forget corpus is named",
    "attack --from {guardrail} --kind dilution": "Nothing says what was to be forgotten",
    "study stability --from {features}": "a study selects by forget text",
    "study stability --recipe lab-zero-shot": "a study selects by forget text",
    "compare --recipe lab-zero-shot": "Nothing says what the methods should unlearn",
    "compare --from {guardrail}": "Nothing says what was to be forgotten",
}


@pytest.mark.parametrize("command", LATER)
def test_later_commands_say_what_they_need_forget_text_for(dsg, workspace, chain, unseen, unloaded, command):
    ids = {"features": chain[0].id, "threshold": unseen.header.inputs[0].id, "guardrail": unseen.id}
    code, out, err = dsg(*command.format(**ids).split(), "-w", workspace.folder.resolve())
    assert code == 1 and LATER[command] in err and not out, err


DESCRIBE = {
    ("there.jsonl", "--corpus", "lab-far"): "there.jsonl exists",
    ("folder", "--corpus", "lab-far", "--force"): "folder exists",
    ("no/such/file", "--corpus", "lab-far"): "There is no folder no/such",
    ("new.jsonl", "--corpus", "lab-fra"): "Did you mean lab-far",
    ("new.jsonl", "--corpus", "lab-far", "--sae", "gemma-scope-2b-pt-res/layer_3/width"): "has no SAE layer_3/width",
}


@pytest.mark.parametrize("arguments", DESCRIBE, ids=" ".join)
def test_describe_refuses_before_weights_are_loaded(dsg, tmp_path, unloaded, arguments):
    (tmp_path / "there.jsonl").write_text("mine")
    (tmp_path / "folder").mkdir()
    code, out, err = dsg("describe", *arguments, "--model", "lab")
    assert code == 1 and DESCRIBE[arguments] in err and not out, err
    assert (tmp_path / "there.jsonl").read_text() == "mine" and not (tmp_path / "new.jsonl").exists()


def test_describe_and_select_as_commands(dsg, tmp_path):
    (tmp_path / "mine.jsonl").write_text("old")
    small = ("--model", "lab", "--limit", "12")
    code, out, err = dsg("describe", "mine.jsonl", "--force", "--corpus", "lab-hexes", *small)
    assert code == 0 and out == "mine.jsonl\n", err
    words = ["--descriptions", "mine.jsonl", "-n", "3", "--set", "select.max_retain_rate=0.2", "--limit", "12"]
    code, out, err = dsg("select", "--describe", "hex dragon", *words, *LAB)
    assert code == 0 and out == "features-001\n", err
    assert "match 'hex dragon'" in err and "No description has the word dragon" in err
    code, out, err = dsg("select", "--features", "5, 9", "--samples", *LAB, "--limit", "12", "--json", "--quiet")
    assert code == 0 and err == "" and [one["index"] for one in json.loads(out)["features"]] == [5, 9]
