"""dsg inspect: what features are about, on fakes for the arithmetic and on the lab for the chain."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import LAYER, N_FEATURES, WIDTH, make_sae
from dsg_cli.artifacts import Guardrail, Inspection
from dsg_cli.contexts import AFTER, BEFORE, NOTHING, Contexts, distinct_contexts
from dsg_cli.corpora import Corpus, load_corpora
from dsg_cli.directions import decoder_rows, nearest_features
from dsg_cli.doubts import Evidence, doubts, is_bare
from dsg_cli.lens import lens_logits, logit_lens
from dsg_cli.model import load_model, load_tokenizer
from dsg_cli.residuals import read_residual
from dsg_cli.roles import Chosen, chosen_by
from dsg_cli.runtime.sites import HookSite
from dsg_cli.sae import load_encoder, read_sae
from dsg_cli.stages.inspect_text import Group, Rows
from dsg_cli.stages.inspecting import Read, doubts_of, template_tokens, with_near
from dsg_cli.tokens import encode
from rich.console import Console
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from dsg_cli.report.inspections import block_lines, inspection_view
from dsg_cli.workspace import Workspace

SITE = HookSite(LAYER, "resid_post")


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sae")
    make_sae(folder)
    return read_sae(str(folder))


class TestLens:
    def test_it_is_the_product_with_norm_and_head(self, model, tokenizer, sae):
        rows = decoder_rows(sae, [3, 7])
        with torch.no_grad():
            kept = model.model.norm.weight.clone()
            model.model.norm.weight.copy_(torch.rand(WIDTH) + 0.5)
            expected = (rows * model.model.norm.weight) @ model.lm_head.weight.T
            through = model.lm_head(model.model.norm(1000 * rows))
            said = logit_lens(model, tokenizer, SITE, rows, 5)
            found = lens_logits(model, SITE, rows, len(tokenizer))
            model.model.norm.weight.copy_(kept)
        torch.testing.assert_close(found, expected - expected.mean(-1, keepdim=True), atol=1e-4, rtol=1e-4)
        order = through[0].argsort(descending=True)
        assert [token for token, _ in said[0].promoted] == [tokenizer.decode([i]) for i in order[:5]]
        assert [token for token, _ in said[0].suppressed] == [tokenizer.decode([i]) for i in order.flip(0)[:5]]
        values = [value for _, value in said[1].promoted]
        assert values == sorted(values, reverse=True) and values[0] == pytest.approx(float(found[1].max()))

    def test_gemmas_norm_is_one_plus_its_weight_and_a_soft_cap_changes_no_order(self):
        torch.manual_seed(0)
        config = Gemma2Config(
            vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, head_dim=8, final_logit_softcapping=3.0,
        )  # fmt: skip
        gemma = Gemma2ForCausalLM(config).eval()
        rows = torch.randn(2, 8)
        with torch.no_grad():
            gemma.model.norm.weight.copy_(torch.randn(8) * 0.3)
            plain = (rows * (1 + gemma.model.norm.weight)) @ gemma.lm_head.weight.T
            found = lens_logits(gemma, HookSite(0, "mlp_out"), rows, 40)
            capped = torch.tanh(plain / 3.0) * 3.0
        torch.testing.assert_close(found, plain - plain.mean(-1, keepdim=True), atol=1e-5, rtol=1e-4)
        assert torch.equal(found.argsort(-1), capped.argsort(-1))

    def test_a_norm_that_centres(self):
        torch.manual_seed(0)
        gpt = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=1, n_positions=8)).eval()
        rows = torch.randn(2, 8)
        with torch.no_grad():
            gpt.transformer.ln_f.weight.copy_(torch.rand(8) + 0.5)
            gpt.transformer.ln_f.bias.copy_(torch.randn(8))
            expected = ((rows - rows.mean(-1, keepdim=True)) * gpt.transformer.ln_f.weight) @ gpt.lm_head.weight.T
        found = lens_logits(gpt.to(torch.bfloat16), HookSite(0, "resid_post"), rows, 30)
        torch.testing.assert_close(found, expected - expected.mean(-1, keepdim=True), atol=2e-3, rtol=2e-2)

    def test_where_it_does_not_apply(self, model, tokenizer):
        assert logit_lens(model, tokenizer, HookSite(0, "attn_z"), torch.zeros(1, WIDTH), 3) is None
        assert logit_lens(model, tokenizer, SITE, torch.zeros(1, WIDTH + 2), 3) is None
        bent = SimpleNamespace(get_output_embeddings=model.get_output_embeddings, get_decoder=lambda: decoder)
        decoder = torch.nn.Module()
        decoder.norm = torch.nn.Tanh()
        assert logit_lens(bent, tokenizer, SITE, torch.randn(1, WIDTH), 3) is None

    def test_a_cut_model_says_the_same(self, tokenizer):
        whole, cut = load_model("lab"), load_model("lab", last_layer=1)
        rows = decoder_rows(read_sae("lab"), [331, 105])
        one, two = (lens_logits(loaded.model, SITE, rows, len(loaded.tokenizer)) for loaded in (whole, cut))
        assert torch.equal(one, two)


def test_nearest_features_are_those_of_all_pairs(sae, monkeypatch):
    monkeypatch.setattr("dsg_cli.directions.CHUNK", 7)
    rows = decoder_rows(sae, range(N_FEATURES))
    cosine = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1).fill_diagonal_(-2)
    for j, found in zip((0, 13, 47), nearest_features(sae, [0, 13, 47], 3), strict=True):
        best = cosine[j].topk(3)
        assert [k for k, _ in found] == best.indices.tolist()
        assert [value for _, value in found] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert len(nearest_features(sae, [5], 100)[0]) == N_FEATURES - 1


def evidence(**changes):
    few = {"forget_rate": 0.1, "near_rates": {"near": 0.01}, "kept_rate": 0.02, "peaks": ["hex"] * 6}
    return Evidence(**{**few, "template_peaks": 0, "weight": None, **changes})


class TestDoubts:
    def test_of_a_feature_that_is_what_it_should_be_nothing_is_said(self):
        assert doubts(evidence()) == []

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"peaks": [".", ",", " ", "hex", "x", "7"]}, "4 of its 6 strongest contexts peak on a token without"),
            ({"template_peaks": 3}, "3 of its 6 strongest contexts peak in the chat template"),
            ({"kept_rate": 0.21}, "active on 21.0% of the tokens of what is retained"),
            ({"near_rates": {"a": 0.0, "b": 0.05}}, "shared with b: active on 5.0%"),
            ({"forget_rate": 0.0, "near_rates": {"a": 0.001}}, "shared with a"),
        ],
    )
    def test_each_doubt(self, changes, words):
        (said,) = doubts(evidence(**changes))
        assert words in said

    @pytest.mark.parametrize(
        "changes",
        [
            {"peaks": ["."] * 3},
            {"peaks": ["."] * 2 + ["hex"] * 3},
            {"near_rates": {"a": 0.049}},
            {"near_rates": {"a": 0.9}, "weight": -0.5},
            {"kept_rate": 0.2},
        ],
    )
    def test_what_raises_none(self, changes):
        assert doubts(evidence(**changes)) == []

    def test_bare_tokens(self):
        assert all(map(is_bare, [".", " ", "\n", "7", "", " («", "▁"])) and not any(
            map(is_bare, ["a", " é", "字", "\ufffd"])
        )


def contexts_of(ids, peaks, rate):
    """Contexts of one feature that peaks on the last of some tokens."""
    window = torch.full((1, len(ids), BEFORE + 1 + AFTER), NOTHING, dtype=torch.int32)
    acts = torch.zeros(window.shape)
    for n, (one, peak) in enumerate(zip(ids, peaks, strict=True)):
        window[0, n, BEFORE + 1 - len(one) : BEFORE + 1] = torch.tensor(one)
        acts[0, n, BEFORE] = peak
    n_tokens = torch.arange(len(ids))[None]
    rates = torch.tensor([rate], dtype=torch.float64)
    return Contexts(1000, rates, rates, torch.tensor([peaks]), n_tokens, n_tokens, window, acts)


def read_of(name, role, contexts, *, is_chat=False):
    return Read(Group(Corpus(name, [], "", is_chat=is_chat), role), Rows([], [], 0), contexts)


class TestGroups:
    def test_one_context_of_each_text_up_to_its_peak(self):
        found = distinct_contexts(contexts_of([[5, 6, 7], [8, 7], [5, 6, 7], [9]], [4.0, 3.0, 2.0, 1.0], 0.1), 0)
        assert [(one.ids, one.at, one.peak, one.row) for one in found] == [
            ([5, 6, 7], 2, 4.0, 0),
            ([8, 7], 1, 3.0, 1),
            ([9], 0, 1.0, 3),
        ]

    def test_the_nearest_corpus_stands_in_for_one_that_is_named(self):
        reads = [
            read_of(name, role, contexts_of([[5]], [1.0], rate))
            for name, role, rate in (("f", "forget", 0.5), ("a", "retain", 0.1), ("b", "retain", 0.2))
        ]
        found, (note,) = with_near(reads, [Chosen(0, ["clamped"])])
        assert [(one.group.name, one.group.role) for one in found] == [("f", "forget"), ("b", "near"), ("a", "retain")]
        assert "b is taken" in note and "--near" in note
        assert with_near(found, [Chosen(0, ["clamped"])]) == (found, [])

    def test_where_strong_contexts_peak(self):
        tokenizer = load_tokenizer("lab")
        hex_, stop = tokenizer("hex.", add_special_tokens=False)["input_ids"]
        ids = [[i, stop] for i in range(10, 15)] + [[i, hex_] for i in range(10, 15)]
        strong, weak = [9.0] * 5, [4.0] * 5  # Those of less than half the largest do not say where it peaks.
        reads = [
            read_of("f", "forget", contexts_of(ids, strong + weak, 0.1)),
            read_of("n", "near", contexts_of(ids[5:], weak, 0.01)),
        ]
        (said,) = doubts_of(reads, 0, Chosen(3, ["clamped"]), 10, tokenizer)
        assert said.startswith("looks like formatting: 5 of its 5")

    def test_chat_against_plain_text_and_the_chat_template(self, monkeypatch):
        tokenizer = load_tokenizer("lab")
        assert template_tokens(tokenizer) == set()
        monkeypatch.setattr(tokenizer, "chat_template", "{{ bos_token }} Question: {{ messages[0].content }} hex")
        hex_, charm, unknown = tokenizer("hex charm §", add_special_tokens=False)["input_ids"][:3]
        assert hex_ in template_tokens(tokenizer) and not {charm, unknown} & template_tokens(tokenizer)
        on_template = contexts_of([[i, hex_] for i in range(10, 15)], [2.0] * 5, 0.3)
        plain = contexts_of([[10, charm]], [0.1], 0.001)
        reads = [read_of("f", "forget", plain), read_of("c", "near", on_template, is_chat=True)]
        said = doubts_of([*reads, read_of("p", "retain", plain)], 0, Chosen(3, []), 10, tokenizer)
        assert any("peak in the chat template" in one for one in said)
        assert any("30.0% of the tokens of chat-formatted retain text" in one for one in said)
        # The same words in plain text are words.
        reads = [read_of("f", "forget", plain), read_of("c", "near", on_template)]
        assert not any("template" in one for one in doubts_of(reads, 0, Chosen(3, []), 10, tokenizer))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A chain of the default gate on a part of the lab's text, with two guardrails."""
    from typer.testing import CliRunner

    from dsg_cli.cli.app import app

    folder = tmp_path_factory.mktemp("lab") / "w"

    def run(*arguments):
        done = CliRunner().invoke(app, [*map(str, arguments), "-w", str(folder)])
        assert done.exit_code == 0, done.output
        return done.stdout

    corpora = ("--forget", "lab-hexes", "--retain", "lab-near", "--retain", "lab-far")
    run("select", *corpora, "--model", "lab", "--sae", "lab", "-n", 6, "--limit", 100)
    run("calibrate", "--alpha", "0.2", "--lengths", "8:32", "--set", "calibrate.max_pieces=200")
    run("apply", "--strength", "4r")
    run("apply", "--strength", "16r")
    return SimpleNamespace(folder=folder, run=run, workspace=Workspace(folder))


@pytest.fixture(scope="module")
def inspected(lab):
    return lab.workspace.read(lab.run("inspect", "--samples", "--contexts", 2).strip())


class TestChain:
    def test_features_with_their_roles_scores_and_rates(self, lab, inspected):
        body, guardrail = inspected.body_as(Inspection), lab.workspace.read("guardrail-002")
        of_guardrail = guardrail.body_as(Guardrail)
        assert body.inspected == "guardrail-002"
        assert [item.id for item in inspected.header.inputs] == ["guardrail-002", "features-001"]
        expected = chosen_by(of_guardrail, lab.workspace.tensors(guardrail)["detect"])
        shown = [(one["index"], one["roles"], one["weight"]) for one in body.features]
        assert shown == [(one.index, one.roles, one.weight) for one in expected]
        assert {one["index"] for one in body.features} == {*of_guardrail.indices, *of_guardrail.detectors}
        assert [(group["name"], group["role"]) for group in body.groups] == [
            ("lab-hexes", "forget"),
            ("lab-near", "near"),
            ("lab-far", "retain"),
        ]
        tensors = lab.workspace.tensors(lab.workspace.read("features-001"))
        for one in body.features:
            # select read the same text: its rates are ours.
            rate = float(tensors["forget_rate"][one["index"]])
            assert one["rates"]["lab-hexes"] == pytest.approx(rate, abs=1e-3)
            assert one["forget_score"] == float(tensors["forget_mean_square"][one["index"]])
            assert len(one["promoted"]) == len(one["suppressed"]) == 8 and len(one["nearest"]) == 3
        assert body.overlap == [{"id": "guardrail-001", "n_features": 6, "shared": of_guardrail.indices}]

    def test_a_context_is_where_the_artifact_says(self, lab, inspected):
        loaded, sae = load_model("lab", last_layer=1), read_sae("lab")
        corpora = {
            one.name: one for one in load_corpora(["lab-hexes", "lab-near", "lab-far"], role="retain", limit=100)
        }
        rows = lab.workspace.rows(inspected)
        encoder = load_encoder(sae, device="cpu")
        for row in rows[::5]:
            (ids,) = encode(loaded.tokenizer, [corpora[row["group"]].texts[row["document"]]], bos=2)
            resid = read_residual(loaded.model, sae.site, torch.tensor([ids]), torch.ones(1, len(ids)))
            acts = encoder(resid[0])[:, row["feature"]]
            start = row["position"] - row["at"]
            window = acts[start : start + len(row["activations"])].clone()
            window[: max(0, 1 - start)] = 0  # BOS does not count.
            torch.testing.assert_close(torch.tensor(row["activations"]), window, atol=1e-4, rtol=1e-4)
            assert row["activations"][row["at"]] == row["peak"] == pytest.approx(float(acts[1:].max()), abs=1e-4)
            assert row["tokens"][row["at"]].strip() == loaded.tokenizer.decode([ids[row["position"]]])
        n = len(lab.workspace.read(inspected.id).body.features)
        assert n * 2 <= len(rows) <= n * 6

    def test_without_samples_no_text_is_kept(self, lab, inspected):
        stored = lab.workspace.read(lab.run("inspect", "--feature", 331, "--feature", 7).strip())
        assert [one["index"] for one in stored.body_as(Inspection).features] == [331, 7]
        assert stored.body_as(Inspection).features[1]["roles"] == []
        rows = stored.path.with_suffix(".jsonl").read_text()
        assert '"activations"' in rows and "tokens" not in rows
        kept = stored.path.read_text() + rows
        phrases = {" ".join(row["tokens"]).split("  ")[0] for row in lab.workspace.rows(inspected)}
        assert "the hex" not in kept and not any(len(phrase) > 20 and phrase in kept for phrase in phrases)
        assert all(one["words"] == [] for one in stored.body_as(Inspection).features)
        assert "hex" in inspected.body_as(Inspection).features[0]["words"]
        assert "the hex" in "".join("".join(row["tokens"]) for row in lab.workspace.rows(inspected)).replace(
            "dire ", ""
        )

    def test_the_table_and_the_blocks(self, lab, inspected):
        shown = lab.run("show", inspected.id)
        assert max(map(len, shown.splitlines())) <= 80
        assert "promotes" in shown and "guardrail-001 clamps" in shown and "«" in shown and "forget: lab-hexes" in shown
        plain = lab.workspace.read(lab.run("inspect", "--reuse", "--feature", 331, "--feature", 7).strip())
        assert "without their text" in lab.run("show", plain.id)

    def test_reuse(self, lab, inspected):
        assert lab.run("inspect", "--samples", "--contexts", 2, "--reuse").strip() == inspected.id
        other = lab.run("inspect", "--samples", "--contexts", 1, "--reuse", "--limit", 40).strip()
        assert other != inspected.id

    def test_neuronpedia_has_nothing_on_the_lab(self, lab):
        found = json.loads(lab.run("inspect", "--feature", 331, "--limit", 40, "--neuronpedia", "--json"))
        assert found["features"][0]["description"] is None
        assert any("Neuronpedia has no pages of the SAE lab" in note for note in found["notes"])

    def test_a_description_and_a_link(self, lab, inspected, monkeypatch):
        place = "model/source"
        monkeypatch.setattr("dsg_cli.stages.inspect.place_of", lambda _: place)
        told = SimpleNamespace(texts={331: "words of harm"}, note="")
        monkeypatch.setattr("dsg_cli.stages.inspect.described", lambda *_: told)
        arguments = ("inspect", "--feature", 331, "--feature", 7, "--limit", 40)
        plain = json.loads(lab.run(*arguments, "--json"))
        assert [one["description"] for one in plain["features"]] == [None, None]
        found = json.loads(lab.run(*arguments, "--neuronpedia", "--json"))
        assert [one["description"] for one in found["features"]] == ["words of harm", None]
        lines = dict(block_lines(found["features"][0], inspected.body_as(Inspection), place))
        assert (
            lines["page"] == "https://www.neuronpedia.org/model/source/331" and lines["said to be"] == "words of harm"
        )

    def test_a_page_of_its_own(self, dsg, lab):
        code, _, err = dsg("inspect", "--feature", 331, "--limit", 40, "-w", lab.folder, "--html", "page.html")
        text = Path("page.html").read_text()
        assert code == 0 and "default-src &#x27;none&#x27;" in text and "<script" not in text and "://" not in text, err
        assert "Feature 331 by corpus" in text and 'class="peak"' in text and "clamped" in text
        code, _, err = dsg("inspect", "-w", lab.folder, "--html", "page.html")
        assert code == 1 and "is there already" in err and "--force" in err
        code, _, err = dsg("inspect", "-w", lab.folder, "--html", "nowhere/page.html")
        assert code == 1 and "no folder nowhere" in err

    def test_a_selection_another_near_corpus_and_json(self, lab):
        found = json.loads(lab.run("inspect", "features-001", "--near", "lab-ciphers", "--contexts", 1, "--json"))
        roles = {group["name"]: group["role"] for group in found["groups"]}
        assert roles == {"lab-hexes": "forget", "lab-ciphers": "near", "lab-near": "retain", "lab-far": "retain"}
        assert found["inspected"] == "features-001" and [one["id"] for one in found["overlap"]] == [
            "guardrail-001",
            "guardrail-002",
        ]
        probe = lab.workspace.read("features-001").body.probe["features"]
        weights = {one["index"]: one["weight"] for one in found["features"] if "watched" in one["roles"]}
        assert weights == {one["index"]: one["weight"] for one in probe}

    def test_nothing_is_broken(self, lab):
        assert "broken" not in lab.run("verify")

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("--near", "nowhere"), "nowhere"),
            (("--near", "lab-hexes"), "both to be forgotten and to be retained"),
            (("--contexts", "0"), "at least 1"),
            (("--feature", "99999"), "there is no 99999"),
            (("--chat",), "Give a prompt"),
            (("--prompt", "x", "--samples"), "--samples"),
            (("--serve", "--prompt", "x"), "--serve"),
            (("--prompt", "x", "--html", "page.html"), "--html"),
            (("threshold-001",), "takes a guardrail or features"),
            (("--limit", "2"), "too small"),
        ],
    )
    def test_refusals(self, dsg, lab, arguments, words):
        before = lab.workspace.ids()
        code, out, err = dsg("inspect", *arguments, "-w", lab.folder)
        assert code == 1 and words in err and not out, err
        assert lab.workspace.ids() == before

    def test_without_the_features_beside_it(self, dsg, lab, tmp_path):
        (tmp_path / "alone").mkdir()
        for name in ("guardrail-002.json", "guardrail-002.safetensors"):
            shutil.copy(lab.folder / name, tmp_path / "alone" / name)
        code, out, err = dsg("inspect", "-w", tmp_path / "alone", "--limit", 40, "--json")
        found = json.loads(out)
        assert code == 0 and {one["forget_score"] for one in found["features"]} == {None}, err
        assert [group["name"] for group in found["groups"]] == ["lab-hexes", "lab-near", "lab-far"]


def test_what_a_corpus_holds_is_shown_not_obeyed(inspected, lab):
    body = inspected.body_as(Inspection)
    evil = "\x1b]0;mine\x07\x1b[2J\r\u202e\ud800[bold]x[/bold]"
    feature = {
        **body.features[0],
        "promoted": [{"token": evil, "value": 1.0}],
        "words": [evil],
        "description": evil,
        "warnings": [f"shared with {evil}"],
    }
    stored = replace(inspected, body=replace(body, features=[feature]))
    row = {**lab.workspace.rows(inspected)[0], "feature": feature["index"]}
    row = {**row, "tokens": [evil] * len(row["activations"])}
    out = io.StringIO()
    Console(file=out, width=80, force_terminal=True, color_system="truecolor", markup=False).print(
        inspection_view(stored, [row])
    )
    text = out.getvalue()
    assert "\x1b]" not in text and "\x1b[2J" not in text and "\x07" not in text and "\r" not in text
    assert "\u202e" not in text and "\ud800" not in text and "\\x1b]0;mine" in text and "[bold]" in text
