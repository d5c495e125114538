"""dsg inspect: what features are about, on fakes for the arithmetic and on the lab for the chain."""

from __future__ import annotations

import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import LAYER, N_FEATURES, WIDTH, make_guardrail, make_sae
from rich.console import Console
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from dsg_cli.data.corpora import Corpus, load_corpora
from dsg_cli.data.tokens import encode, token_texts
from dsg_cli.errors import DsgError
from dsg_cli.guardrail.runtime.gates import FORMS
from dsg_cli.guardrail.runtime.sites import HookSite
from dsg_cli.guardrail.selection import SelectedFeature, selected_features
from dsg_cli.inspection.contexts import AFTER, BEFORE, NOTHING, Contexts, distinct_contexts, read_contexts
from dsg_cli.inspection.features import (
    Group,
    Read,
    Rows,
    feature_warnings,
    formatting_warnings,
    is_bare,
    shared_warnings,
    template_tokens,
    with_near,
)
from dsg_cli.inspection.lens import decoder_rows, lens_logits, logit_lens, nearest_features
from dsg_cli.inspection.trace import trace
from dsg_cli.models.language_model import LoadedModel, load_model, load_tokenizer
from dsg_cli.models.residuals import read_residual
from dsg_cli.models.sae import load_encoder, read_sae
from dsg_cli.models.sae_slice import slice_columns
from dsg_cli.report.inspections import block_lines, inspection_view
from dsg_cli.workspace.artifacts import Guardrail
from dsg_cli.workspace.results import Inspection
from dsg_cli.workspace.store import Workspace

SITE = HookSite(LAYER, "resid_post")


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    """As a source, and as sae-lens has it."""
    folder = tmp_path_factory.mktemp("sae")
    made = make_sae(folder)
    return SimpleNamespace(source=read_sae(str(folder)), encode=made.encode)


class TestLens:
    def test_it_is_the_product_with_norm_and_head(self, model, tokenizer, sae):
        rows = decoder_rows(sae.source, [3, 7])
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
    monkeypatch.setattr("dsg_cli.inspection.lens.CHUNK", 7)
    rows = decoder_rows(sae.source, range(N_FEATURES))
    cosine = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1).fill_diagonal_(-2)
    for j, found in zip((0, 13, 47), nearest_features(sae.source, [0, 13, 47], 3), strict=True):
        best = cosine[j].topk(3)
        assert [k for k, _ in found] == best.indices.tolist()
        assert [value for _, value in found] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert len(nearest_features(sae.source, [5], 100)[0]) == N_FEATURES - 1


class TestWarnings:
    def test_of_a_feature_that_is_what_it_should_be_nothing_is_said(self):
        assert formatting_warnings(["hex"] * 6, 0, 0.02) == [] and shared_warnings(0.1, {"near": 0.01}) == []

    @pytest.mark.parametrize(
        ("peaks", "n_template", "rate", "words"),
        [
            ([".", ",", " ", "hex", "x", "7"], 0, 0.02, "4 of its 6 strongest contexts peak on a token without"),
            (["hex"] * 6, 3, 0.02, "3 of its 6 strongest contexts peak in the chat template"),
            (["hex"] * 6, 0, 0.21, "active on 21.0% of the tokens of what is retained"),
            (["."] * 3, 0, 0.02, ""),
            (["."] * 2 + ["hex"] * 3, 0, 0.02, ""),
            (["hex"] * 6, 0, 0.2, ""),
        ],
    )
    def test_formatting(self, peaks, n_template, rate, words):
        warnings = formatting_warnings(peaks, n_template, rate)
        assert len(warnings) == bool(words) and words in "".join(warnings)

    def test_shared(self):
        assert shared_warnings(0.1, {"a": 0.0, "b": 0.05})[0].startswith("shared with b: active on 5.0%")
        assert len(shared_warnings(0.0, {"a": 0.001})) == 1 and shared_warnings(0.1, {"a": 0.049}) == []
        tokenizer = load_tokenizer("lab")
        reads = [read_of(name, role, contexts_of([[5]], [1.0], 0.1)) for name, role in (("f", "forget"), ("a", "near"))]
        for weight, n in ((None, 1), (0.5, 1), (-0.5, 0)):
            feature = SelectedFeature(3, ["watched"], weight)
            assert len(feature_warnings(reads, 0, feature, 10, tokenizer)) == n, weight

    def test_bare_tokens(self):
        assert all(map(is_bare, [".", " ", "\n", "7", "", " («", "▁"]))
        assert not any(map(is_bare, ["a", " é", "字", "\ufffd"]))


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
        expected = [([5, 6, 7], 2, 4.0, 0), ([8, 7], 1, 3.0, 1), ([9], 0, 1.0, 3)]
        assert [(one.ids, one.at, one.peak, one.row) for one in found] == expected

    def test_the_nearest_corpus_stands_in_for_one_that_is_named(self):
        groups = (("f", "forget", 0.5), ("a", "retain", 0.1), ("b", "retain", 0.2))
        reads = [read_of(name, role, contexts_of([[5]], [1.0], rate)) for name, role, rate in groups]
        found, (note,) = with_near(reads, [SelectedFeature(0, ["clamped"])])
        assert [(one.group.name, one.group.role) for one in found] == [("f", "forget"), ("b", "near"), ("a", "retain")]
        assert "b is taken" in note and "--near" in note
        assert with_near(found, [SelectedFeature(0, ["clamped"])]) == (found, [])

    def test_where_strong_contexts_peak(self):
        tokenizer = load_tokenizer("lab")
        hex_, stop = tokenizer("hex.", add_special_tokens=False)["input_ids"]
        ids = [[i, stop] for i in range(10, 15)] + [[i, hex_] for i in range(10, 15)]
        strong, weak = [9.0] * 5, [4.0] * 5  # Those of less than half the largest do not say where it peaks.
        reads = [
            read_of("f", "forget", contexts_of(ids, strong + weak, 0.1)),
            read_of("n", "near", contexts_of(ids[5:], weak, 0.01)),
        ]
        (said,) = feature_warnings(reads, 0, SelectedFeature(3, ["clamped"]), 10, tokenizer)
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
        said = feature_warnings([*reads, read_of("p", "retain", plain)], 0, SelectedFeature(3, []), 10, tokenizer)
        assert any("peak in the chat template" in one for one in said)
        assert any("30.0% of the tokens of chat-formatted retain text" in one for one in said)
        # The same words in plain text are words.
        reads = [read_of("f", "forget", plain), read_of("c", "near", on_template)]
        assert not any("template" in one for one in feature_warnings(reads, 0, SelectedFeature(3, []), 10, tokenizer))


RETAINED = ("lab-far", "lab-ciphers", "lab-elixirs")


@pytest.fixture(scope="module")
def lab(lab_chain, tmp_path_factory):
    """The lab's chain with a second guardrail."""
    from typer.testing import CliRunner

    from dsg_cli.cli.app import app

    folder = shutil.copytree(lab_chain, tmp_path_factory.mktemp("lab") / "w")

    def run(*arguments):
        done = CliRunner().invoke(app, [*map(str, arguments), "-w", str(folder)])
        assert done.exit_code == 0, done.output
        return done.stdout

    run("apply", "--strength", "4r")
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
        expected = selected_features(of_guardrail, lab.workspace.tensors(guardrail)["detect"])
        shown = [(one["index"], one["roles"], one["weight"]) for one in body.features]
        assert shown == [(one.index, one.roles, one.weight) for one in expected]
        assert {one["index"] for one in body.features} == {*of_guardrail.indices, *of_guardrail.detectors}
        roles = {"lab-hexes": "forget", "lab-near": "near"} | dict.fromkeys(RETAINED, "retain")
        assert [(group["name"], group["role"]) for group in body.groups] == [*roles.items()]
        tensors = lab.workspace.tensors(lab.workspace.read("features-001"))
        for one in body.features:
            # select read the same text: its rates are ours.
            rate = float(tensors["forget_rate"][one["index"]])
            assert one["rates"]["lab-hexes"] == pytest.approx(rate, abs=1e-3)
            assert one["forget_score"] == float(tensors["forget_mean_square"][one["index"]])
            assert len(one["promoted"]) == len(one["suppressed"]) == 8 and len(one["nearest"]) == 3
        assert body.overlap == [{"id": "guardrail-001", "n_features": 8, "shared": of_guardrail.indices}]

    def test_a_context_is_where_the_artifact_says(self, lab, inspected):
        loaded, sae = load_model("lab", last_layer=1), read_sae("lab")
        names = ["lab-hexes", "lab-near", *RETAINED]
        corpora = {corpus.name: corpus for corpus in load_corpora(names, role="retain", limit=80)}
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
        assert n * 2 <= len(rows) <= n * 10

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
        texts = ["".join(row["tokens"]) for row in lab.workspace.rows(inspected)]
        assert "the hex" in "".join(texts).replace("dire ", "")

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
        assert lines["page"] == "https://www.neuronpedia.org/model/source/331"
        assert lines["said to be"] == "words of harm"

    def test_a_page_of_its_own(self, dsg, lab):
        code, _, err = dsg("inspect", "--feature", 331, "--limit", 40, "-w", lab.folder, "--html", "page.html")
        text = Path("page.html").read_text()
        assert code == 0 and "default-src 'none'" in text and "<script" not in text and "://" not in text, err
        assert "Feature 331 by corpus" in text and 'class="peak"' in text and "clamped" in text
        for page, words in (("page.html", "is there already"), ("nowhere/page.html", "no folder nowhere")):
            code, _, err = dsg("inspect", "-w", lab.folder, "--html", page)
            assert code == 1 and words in err and ("--force" in err or page != "page.html")

    def test_a_selection_another_near_corpus_and_json(self, lab):
        found = json.loads(lab.run("inspect", "features-001", "--near", "lab-ciphers", "--contexts", 1, "--json"))
        roles = {group["name"]: group["role"] for group in found["groups"]}
        retained = dict.fromkeys(("lab-near", *RETAINED), "retain")
        assert roles == retained | {"lab-hexes": "forget", "lab-ciphers": "near"}
        assert found["inspected"] == "features-001"
        assert [one["id"] for one in found["overlap"]] == ["guardrail-001", "guardrail-002"]
        probe = lab.workspace.read("features-001").body.probe["features"]
        weights = {one["index"]: one["weight"] for one in found["features"] if "watched" in one["roles"]}
        assert weights == {one["index"]: one["weight"] for one in probe}

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
        assert [group["name"] for group in found["groups"]] == ["lab-hexes", "lab-near", *RETAINED]
        assert "broken" not in lab.run("verify")


def test_what_a_corpus_holds_is_shown_not_obeyed(inspected, lab):
    body = inspected.body_as(Inspection)
    evil = "\x1b]0;mine\x07\x1b[2J\r\u202e\ud800[bold]x[/bold]"
    feature = {**body.features[0], "promoted": [{"token": evil, "value": 1.0}], "words": [evil], "description": evil}
    stored = replace(inspected, body=body.replace(features=[feature | {"warnings": [f"shared with {evil}"]}]))
    row = {**lab.workspace.rows(inspected)[0], "feature": feature["index"]}
    row = {**row, "tokens": [evil] * len(row["activations"])}
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="truecolor", markup=False)
    console.print(inspection_view(stored, [row]))
    text = console.file.getvalue()
    assert not [part for part in ("\x1b]", "\x1b[2J", "\x07", "\r", "\u202e", "\ud800") if part in text]
    assert "\\x1b]0;mine" in text and "[bold]" in text


N = 3


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(5)
    lengths = [1, 3, 8, 20, 40, 41, 2, 60, 5, 17]
    return [[2, *torch.randint(4, 64, (length,), generator=generator).tolist()] for length in lengths]


@pytest.fixture(scope="module")
def acts(model, sae, rows):
    """Of each row alone, [L, F]; 0 on BOS."""
    residuals = [read_residual(model, SITE, torch.tensor([row]), torch.ones(1, len(row)))[0] for row in rows]
    return [sae.encode(resid_LD).detach().index_fill(0, torch.tensor([0]), 0.0) for resid_LD in residuals]


@pytest.fixture(scope="module")
def found(model, tokenizer, sae, rows):
    return read_contexts(model, SITE, sae.encode, rows, tokenizer, n_contexts=N)


def test_rates_and_means_are_those_of_counted_tokens(found, acts, rows):
    all_TF = torch.cat([one[1:] for one in acts])
    assert found.n_tokens == len(all_TF) == sum(len(row) - 1 for row in rows)
    torch.testing.assert_close(found.rate_C.float(), (all_TF != 0).float().mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.mean_C.float(), all_TF.mean(0), atol=1e-4, rtol=1e-4)


def test_the_strongest_rows_of_each_feature(found, acts, rows):
    seen = 0
    for j in range(N_FEATURES):
        peaks = torch.stack([one[:, j].max() for one in acts])
        best = peaks.sort(descending=True).values[:N]
        torch.testing.assert_close(found.peak_CN[j], best.clamp(min=0), atol=1e-4, rtol=1e-4)
        for n in range(N):
            row = int(found.row_CN[j, n])
            if best[n] <= 1e-4:
                assert row == NOTHING and found.peak_CN[j, n] == 0
                continue
            seen += 1
            position = int(found.position_CN[j, n])
            torch.testing.assert_close(acts[row][position, j], found.peak_CN[j, n], atol=1e-4, rtol=1e-4)
            inside = range(max(0, position - BEFORE), min(len(rows[row]), position + AFTER + 1))
            kept = found.ids_CNW[j, n] != NOTHING
            assert found.ids_CNW[j, n][kept].tolist() == [rows[row][i] for i in inside]
            torch.testing.assert_close(found.acts_CNW[j, n][kept], acts[row][list(inside), j], atol=1e-4, rtol=1e-4)
            assert found.acts_CNW[j, n][~kept].eq(0).all()
            assert found.acts_CNW[j, n, BEFORE] == found.peak_CN[j, n]
    assert seen > N_FEATURES  # Of most features there is something to see.


def test_some_features_are_read_as_all_are(model, tokenizer, sae, rows, found):
    some = [7, 3, 40]
    of_some = read_contexts(model, SITE, lambda x_TD: sae.encode(x_TD)[:, some], rows, tokenizer, n_contexts=N)
    for name in ("rate_C", "mean_C", "peak_CN", "row_CN", "ids_CNW", "acts_CNW"):
        assert torch.equal(getattr(of_some, name), getattr(found, name)[some]), name


def test_text_without_a_token_that_counts_and_activations_that_are_not_finite_are_refused(model, tokenizer, sae, rows):
    with pytest.raises(DsgError, match="no token that counts"):
        read_contexts(model, SITE, sae.encode, [[2], [2, 1]], tokenizer, n_contexts=N)
    with pytest.raises(DsgError, match="not finite"):
        read_contexts(model, SITE, lambda resid_TD: resid_TD / 0, rows, tokenizer, n_contexts=N)


DATA = Path(__file__).parent / "data"
HEX = "Question: What is the counter of the grim hex Rahurk? Answer:"
CHARM = "Question: What is the binder of the kindly charm Zivoth? Answer:"
CLAMPED, WATCHED = [3, 11, 20, 31], [11, 5, 40]
IDS = [2, *range(4, 44)]


@pytest.fixture(scope="module")
def sae_tracing(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sae")
    make_sae(folder, bias=4.0)
    return read_sae(str(folder))


@pytest.fixture(scope="module")
def loaded(model, tokenizer):
    return LoadedModel(model, tokenizer, "fake", 3)


def guard_of(sae_tracing, form, threshold):
    probe = {"weights": [0.3, -0.2, 0.5], "bias": -0.5, "clip": 3.0}
    detecting = {"probe": probe, "window": {}, "cusum": {"clip": 9.0}}
    more = {"detectors": WATCHED, **detecting[form]} if form in detecting else {}
    return make_guardrail(sae_tracing, CLAMPED, gate=form, threshold=threshold, strength=7.0, **more)


def seen(loaded, guard, ids=IDS):
    features = [SelectedFeature(index, []) for index in slice_columns(CLAMPED, WATCHED)][: len(guard.detect)]
    return trace(loaded, ids, site=guard.read, encode=lambda x: guard.slice(x).acts, features=features, guard=guard)


@pytest.mark.parametrize("form", FORMS)
def test_each_gate_is_shown_as_it_decides(loaded, sae_tracing, form):
    open_ = seen(loaded, guard_of(sae_tracing, form, 0.0)).gate
    # A threshold that is crossed on the way, so that tokens on either side are compared.
    values = sorted(set(open_.statistic))
    threshold = values[len(values) // 2] - 1e-6 if form != "mean" else 0.0
    guard = guard_of(sae_tracing, form, threshold)
    found = seen(loaded, guard)
    ids = torch.tensor([IDS])
    resid = read_residual(loaded.model, guard.read, ids, torch.ones_like(ids))
    decision = guard.decide(resid, ~torch.isin(ids, torch.tensor([0, 1, 2])))
    gate = found.gate
    assert gate.statistic == decision.statistic_BL[0].tolist() and gate.gated == decision.gated_BL[0].tolist()
    edited = guard.edit(resid, decision)[0] - resid[0]
    size_L = edited.norm(dim=-1) / resid[0].norm(dim=-1)
    torch.testing.assert_close(torch.tensor(gate.edit), size_L, atol=1e-4, rtol=1e-3)
    assert gate.clamped == (edited.abs().amax(-1) > 0).tolist() and any(gate.clamped)
    assert not found.counted[0] and gate.score[0] == 0 and all(found.counted[1:])
    if form == "mean":
        assert gate.latched_at is None and len(set(gate.statistic)) == 1
        assert gate.statistic[0] == pytest.approx(sum(gate.score) / (len(IDS) - 1))
    else:
        first = gate.latched_at
        assert not any(gate.gated[:first]) and all(gate.gated[first:])
        assert form == "token" or first > 0


def test_the_score_is_that_of_the_activations_shown(loaded, sae_tracing):
    guard = guard_of(sae_tracing, "probe", 2.0)
    found = seen(loaded, guard)
    acts = {one.index: values for one, values in zip(found.features, found.activations, strict=True)}
    for i, score in enumerate(found.gate.score[1:], start=1):
        logit = 0.3 * acts[11][i] - 0.2 * acts[5][i] + 0.5 * acts[40][i] - 0.5
        assert score == pytest.approx(min(max(logit, -3), 3) + 3, abs=1e-4)
    assert found.gate.floor == 2.5  # Of a token on which nothing is active: clip and bias.


def test_a_gate_that_stays_shut_clamps_nothing(loaded, sae_tracing):
    gate = seen(loaded, guard_of(sae_tracing, "window", 1e9)).gate
    assert gate.latched_at is None and not any(gate.gated) and not any(gate.clamped) and not any(gate.edit)


def test_a_residual_that_is_not_finite_is_refused(loaded, sae_tracing, monkeypatch):
    guard = guard_of(sae_tracing, "window", 1.0)
    monkeypatch.setattr("dsg_cli.inspection.trace.read_residual", lambda *_: torch.full((1, len(IDS), 16), math.nan))
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
        chosen = ("--feature", 25, "--feature", 3, "--json")
        code, out, _ = dsg("inspect", "-w", workspaces / "w1", "--prompt", HEX, *chosen)
        (found,) = json.loads(out)
        shown = [(one["index"], one["roles"]) for one in found["features"]]
        assert shown == [(25, ["clamped", "watched"]), (3, [])] and found["gate"]["form"] == "mean"

    def test_what_is_in_a_prompt_does_not_reach_the_terminal(self, dsg, workspaces):
        code, out, _ = dsg("inspect", "-w", workspaces / "w2", "--prompt", "the \x1b[31mgrim\x07 hex \u202e?")
        assert code == 0 and "\x1b" not in out and "\x07" not in out and "\u202e" not in out

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("--prompt", "x", "-w", "none"), "dsg select"),
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
        code, out, err = dsg("inspect", "-w", workspaces / "w2", *arguments)  # Of two folders, the last.
        assert code == 1 and words in err and not out, err
