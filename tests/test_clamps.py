"""Static, conditional and refusal clamp against naive loops over the whole SAE, and as guardrails of a user's own."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from conftest import LAYER, N_FEATURES, WIDTH, make_guardrail, make_sae, refuses
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_serving import alone, generate

from dsg_cli.cli.options import names_of
from dsg_cli.data.batches import pad_rows
from dsg_cli.errors import DsgError
from dsg_cli.guardrail.guarded import guarded
from dsg_cli.guardrail.loading import light_file, load_guardrail
from dsg_cli.guardrail.runtime.guardrail import build_guardrail
from dsg_cli.guardrail.runtime.sites import HookSite
from dsg_cli.guardrail.runtime.spec import NEVER, CalibratedGate
from dsg_cli.methods.clamps import (
    LARGEST_FILE,
    check_same_sae,
    conditional_clamping,
    read_steering,
    refusal_clamping,
    static_clamping,
    steered_clamping,
)
from dsg_cli.models.language_model import load_model
from dsg_cli.models.residuals import read_residual
from dsg_cli.models.sae import read_sae
from dsg_cli.recipe import load_recipe
from dsg_cli.report.tables import artifact_table, headline
from dsg_cli.settings import CalibrateSection, ConditionalClamp, RefusalClamp, StaticClamp
from dsg_cli.stages import apply as clamp
from dsg_cli.stages.stage import QUIET
from dsg_cli.workspace.artifacts import FeatureSet, Guardrail
from dsg_cli.workspace.store import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")

SITE, SPECIAL = HookSite(LAYER, "resid_post"), (0, 1, 2)
ROWS = [[2, 5, 6, 7, 8, 9], [2, 30, 31], [2, 12, 1, 40, 41, 42, 43, 44, 45], [2, 50, 51, 52]]
C = 30.0
ARCHITECTURES = {"jumprelu": {"bias": 2.0}, "abstopk": {"bias": 0.0, "k": 8}}
ANYTHING = {"max_retain_rate": 1.0, "n_features": 6}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def whole(request, tmp_path_factory, model):
    """An SAE, its source, how often its features are active on the rows, and about how strongly the median one is.

    Of retain text it is said that one feature is active there.
    """
    folder = tmp_path_factory.mktemp("sae")
    sae = make_sae(folder, request.param, **ARCHITECTURES[request.param])
    acts = torch.cat([sae.encode(residual(model, ids)[0][1:]).detach() for ids in ROWS])
    rates = {"forget_rate": (acts != 0).double().mean(0), "retain_rate": torch.zeros(N_FEATURES).double()}
    rates["retain_rate"][rates["forget_rate"].argmin()] = 0.9
    return sae, read_sae(str(folder)), rates, float(acts[acts != 0].abs().median()) + 0.01  # No activation itself.


def residual(model, ids):
    batch = pad_rows([ids], 0, SPECIAL)
    return read_residual(model, SITE, batch.ids_BL, batch.mask_BL)[0], batch.counted_BL


def strength(f):
    return abs(float(f))


def static(f, chosen, _raised, _above):
    return {j: -C for j in chosen if strength(f[j]) > 0}


def conditional(f, chosen, _raised, above):
    return {j: -C for j in chosen if strength(f[j]) > above}


def refusal(f, chosen, raised, above):
    return {raised: C} if any(strength(f[j]) > above for j in chosen) else {}


def both(f, chosen, raised, above):
    return {raised: C, **dict.fromkeys(chosen, -C)} if any(strength(f[j]) > above for j in chosen) else {}


RULES = {
    static: lambda rates, above: static_clamping(rates, StaticClamp(**ANYTHING, strength="10r"), C / 10),
    conditional: lambda rates, above: conditional_clamping(
        rates, ConditionalClamp(**ANYTHING, above=above, strength=str(C)), 1.0
    ),
    refusal: lambda rates, above: refusal_clamping(
        rates, RefusalClamp(**ANYTHING, above=above, coefficient=str(C)), 1.0
    ),
    both: lambda rates, above: refusal_clamping(
        rates, RefusalClamp(**ANYTHING, above=above, coefficient="10r", clamps_features=True), C / 10
    ),
}


def module_of(source, clamping, **changes):
    values = {"clamp": clamping.clamp, "coefficients": clamping.coefficients, "above": clamping.above} | changes
    options = {"gate": "token", "threshold": 0.5, "strength": C, "detectors": clamping.detectors}
    return make_guardrail(source, clamping.indices, **options, **values)


@pytest.mark.parametrize("rule", RULES)
def test_equals_the_definition_token_by_token(whole, model, rule):
    sae, source, rates, above = whole
    source = replace(source, site=SITE, write=SITE)
    clamping = RULES[rule](rates, above)
    chosen = sorted(range(N_FEATURES), key=lambda j: -rates["forget_rate"][j])[:6]
    raised = int(rates["retain_rate"].argmax())
    module = module_of(source, clamping)
    n_set, n_hot, n_calm, n_weak = 0, 0, 0, 0
    for ids in ROWS:
        resid_LD, counted_BL = residual(model, ids)
        found_LD = module(resid_LD[None], counted_BL)[0]
        has_fired = False
        for i, (token, h) in enumerate(zip(ids, resid_LD, strict=True)):
            f = sae.encode(h[None]).detach()[0]
            targets = rule(f, chosen, raised, above) if token not in SPECIAL else {}
            has_fired |= bool(targets)
            assert bool(module.last.gated_BL[0, i]) == has_fired
            if not targets:
                assert torch.equal(found_LD[i], h)
                n_calm += 1
                continue
            clamped = f.clone()
            for j, value in targets.items():
                clamped[j] = value
            wanted = sae.decode(clamped[None])[0].detach() + (h - sae.decode(f[None])[0].detach())
            torch.testing.assert_close(found_LD[i], wanted, rtol=1e-4, atol=1e-3)
            assert float((found_LD[i] - h).norm()) > 1.0
            n_hot, n_set = n_hot + 1, n_set + len(targets)
            n_weak += any(0 < strength(f[j]) <= above for j in chosen)
    assert n_hot > 2 and n_calm > 2 and module.counters()["n_clamped"] == n_hot
    assert rule is static or n_weak > 0  # Features that are active, but not above the value.
    assert n_set < n_hot * len(chosen) or rule is both


def test_what_is_said_of_the_default_changes_no_bit(whole):
    """A spec of before, and one that says in full what it meant."""
    source = whole[1]
    resid_BLD, counted_BL = torch.randn(3, 20, WIDTH) * 3, torch.rand(3, 20) > 0.2
    for gate, threshold in (("mean", 0.02), ("window", 0.1), ("token", 0.5)):
        options = {"gate": gate, "threshold": threshold, "strength": 7.3, "detectors": [4, 9]}
        default = make_guardrail(source, [3, 11, 30], **options)
        said = make_guardrail(
            source, [3, 11, 30], **options, coefficients=[-7.3] * 3, above=[0.0] * 3 + [NEVER] * 2, clamp="all"
        )
        assert torch.equal(default(resid_BLD, counted_BL), said(resid_BLD, counted_BL))
        assert torch.equal(default.last.statistic_BL, said.last.statistic_BL)
        assert default.counters() == said.counters() and default.counters()["n_clamped"] > 0
        acts_BLK = default.slice(resid_BLD).acts
        hot_BL = (acts_BLK[..., :3] != 0).any(-1) & counted_BL & default.last.gated_BL
        by_hand = torch.where(hot_BL[..., None], -7.3 - acts_BLK[..., :3], 0.0)
        assert torch.equal(default.last.change_BLC, by_hand)
        assert default.key != said.key


@pytest.mark.parametrize("rule", RULES)
def test_generation_with_a_cache_equals_the_whole_text_anew(whole, model, rule):
    source = replace(whole[1], site=SITE, write=SITE)
    module, n_changed = module_of(source, RULES[rule](*whole[2:])), 0
    for ids in ROWS:
        base = alone(model, ids, 8)
        with guarded(model, module, allow_mismatch=True):
            expected = alone(model, ids, 8)
            found = generate(model, [ids], n_new=8)[0]
            assert found == expected[: len(found)] and (len(found) == len(expected) or found[-1] == 1)  # EOS.
        n_changed += expected != base
    assert n_changed > 0


def test_a_clamp_compiles_in_one_piece(whole):
    for rule in (static, both):
        clamp_of = module_of(whole[1], RULES[rule](*whole[2:])).clamp

        def both_of(acts_BLK, clamp_of=clamp_of):
            return clamp_of.is_active(clamp_of.size(acts_BLK)), clamp_of.change(acts_BLK[..., : clamp_of.n_clamped])

        acts_BLK = torch.randn(2, 9, len(clamp_of.triggers))
        found = torch.compile(both_of, backend="eager", fullgraph=True)(acts_BLK)
        assert all(torch.equal(one, two) for one, two in zip(found, both_of(acts_BLK), strict=True))


@pytest.mark.parametrize(
    "values",
    [
        {"coefficients": [1.0]},
        {"above": [0.0, 0.0]},
        {"above": [0.0, -1.0, 0.0]},
        {"coefficients": [1.0, float("nan"), 1.0]},
        {"coefficients": [1.0, 1e39, 1.0]},
        {"clamp": "some"},
    ],
)
def test_a_clamp_that_does_not_fit_is_refused(whole, values):
    guard = make_guardrail(whole[1], [3, 11, 30], threshold=0.5, strength=1.0)
    refuses("how it clamps does not fit", build_guardrail, replace(guard.spec, **values), guard.tensors(), where="test")


RATES = {
    "forget_rate": torch.tensor([0.5, 0.0, 0.3, 0.3, 0.9, 0.1, 0.0]),
    "retain_rate": torch.tensor([0.01, 0.0, 0.0, 0.005, 0.02, 0.0, 0.4]),
}


class TestSelection:
    def test_drops_what_retain_text_has_and_ranks_by_forget_text(self):
        found = static_clamping(RATES, StaticClamp(n_features=4, strength="2r"), 10.0)
        assert found.indices == [0, 2, 3, 5] and found.coefficients == [-20.0] * 4 and found.above == [0.0] * 4
        looser = static_clamping(RATES, StaticClamp(n_features=2, max_retain_rate=0.02), 10.0)
        assert looser.indices == [4, 0]

    @pytest.mark.parametrize(("n", "words"), [(5, "4 features are active"), (9, "4 features are active")])
    def test_too_few_are_an_error_that_says_what_to_change(self, n, words):
        for method, section in ((static_clamping, StaticClamp), (conditional_clamping, ConditionalClamp)):
            with pytest.raises(DsgError, match=words) as error:
                method(RATES, section(n_features=n), 1.0)
            assert f"methods.{method.__name__.removesuffix('ing')}.max_retain_rate" in str(error.value)
        none = RATES | {"forget_rate": torch.zeros(7)}
        refuses("No features are active", refusal_clamping, none, RefusalClamp(), 1.0)

    def test_a_stand_in_is_live_and_not_selected_and_said_to_be_one(self):
        found = refusal_clamping(RATES, RefusalClamp(n_features=2, coefficient="2r"), 10.0)
        assert (found.indices, found.detectors, found.coefficients) == ([6], [0, 2], [20.0])
        assert found.above == [NEVER, 0.05, 0.05] and "6 is a stand-in" in found.notes[0]
        named = refusal_clamping(RATES, RefusalClamp(n_features=2, refusal_feature=1), 10.0)
        assert named.indices == [1] and named.notes == ()

    @pytest.mark.parametrize(("feature", "words"), [(0, "is one of those"), (7, "has 7 features; there is no 7 ")])
    def test_a_refusal_feature_that_cannot_be_one(self, feature, words):
        refuses(words, refusal_clamping, RATES, RefusalClamp(n_features=2, refusal_feature=feature), 10.0)


def test_without_a_gate_is_nothing_that_calibrate_takes():
    assert set(get_args(get_type_hints(CalibrateSection)["gate"])) == set(get_args(CalibratedGate))
    assert names_of("gates") == list(get_args(CalibratedGate)) and "token" not in names_of("gates")
    refuses("calibrate.gate is .token.; it should be 'mean'", load_recipe, sets=["calibrate.gate=token"])


class TestStage:
    SETS = ("methods.static_clamp.max_retain_rate=1", "methods.conditional_clamp.max_retain_rate=1",
            "methods.refusal_clamp.max_retain_rate=1", "methods.conditional_clamp.n_features=3",
            "guardrail.allow_ineffective=false")  # fmt: skip

    @pytest.fixture(scope="class")
    def workspace(self, tiny_features, tmp_path_factory):
        return Workspace(shutil.copytree(tiny_features, tmp_path_factory.mktemp("clamps") / "ws"))

    @pytest.fixture
    def clamp_model(self, workspace, tiny_recipe):
        def run(method, *sets, options=QUIET):
            return clamp.run_clamp(tiny_recipe(*self.SETS, *sets), workspace, method, options=options)

        return run

    @pytest.mark.parametrize("method", clamp.CLAMPINGS)
    def test_makes_a_guardrail_that_acts_on_the_model(self, workspace, clamp_model, folders, method):
        stored = clamp_model(method)
        assert clamp_model(method, options=replace(QUIET, reuse=True)).id == stored.id
        body, features = workspace.read(stored.id).body_as(Guardrail), workspace.find("features")
        norm = features.body_as(FeatureSet).median_residual_norm
        assert (body.method, body.gate, body.threshold, body.median_residual_norm) == (method, "token", 0.5, norm)
        assert [one.id for one in stored.header.inputs] == [features.id] and stored.header.settings["method"] == method
        assert body.special_ids == [0, 1, 2] and body.bos == 2 and body.forget == [str(folders["forget.jsonl"])]
        assert body.effect["changed_rate"] > 0.5 and body.effect["n_clamped"] > 0
        assert method in headline(stored) and artifact_table(stored)
        assert ("stand-in" in " ".join(stored.header.notes)) == (method == "refusal-clamp")
        loaded, guard = load_model(str(folders["model"])), load_guardrail(stored.path)
        ids = torch.tensor([[2, *range(4, 34)]])
        with torch.no_grad():
            base = loaded.model(ids, use_cache=False).logits
            with guarded(loaded.model, guard):
                assert not torch.equal(loaded.model(ids, use_cache=False).logits, base)
        assert guard.counters()["n_clamped"] > 0

    def test_one_that_does_nothing_is_refused_unless_allowed(self, workspace, clamp_model):
        before, never = workspace.ids(), "methods.conditional_clamp.above=99999"
        with pytest.raises(DsgError, match="gate never fires") as error:
            clamp_model("conditional-clamp", never)
        assert "methods.conditional_clamp" in str(error.value) and workspace.ids() == before
        allowed = clamp_model("conditional-clamp", never, "guardrail.allow_ineffective=true")
        assert allowed.body_as(Guardrail).effect["gate_rate"] == 0

    def test_a_steering_file_takes_the_place_of_statistics(self, workspace, clamp_model, tmp_path):
        path = tmp_path / "steering.csv"
        path.write_text("latent_idx,hook_action,steering_coefficient,sae_id\n7,clamp,-9,x/y\n3,,4.5,x/y\n")
        stored = clamp_model("static-clamp", f"methods.static_clamp.steering_file={path}")
        body, settings = stored.body_as(Guardrail), stored.header.settings
        assert (body.indices, body.coefficients, body.above) == ([7, 3], [-9.0, 4.5], [0.0, 0.0])
        assert settings["steering_file"] == "steering.csv" and len(settings["steering_sha256"]) == 64
        assert "cannot be told" in stored.header.notes[0]
        assert str(tmp_path).encode() not in light_file(stored.header, body, workspace.tensors(stored))
        for method, file, words in (
            ("refusal-clamp", path, "those of static-clamp"),
            ("static-clamp", "nothing.csv", "nothing.csv"),
        ):
            refuses(words, clamp_model, method, f"methods.{method.replace('-', '_')}.steering_file={file}")


HEAD = "latent_idx,hook_action,refuse_id,clamp_value,steering_coefficient,sae_id,sae_release,description\n"
CANONICAL = "layer_7/width_16k/canonical,gemma-scope-2b-pt-res-canonical"


@pytest.fixture
def read(tmp_path):
    def run(content):
        path = tmp_path / "steering.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_steering(path)

    return run


def clamping(steering, **options):
    return steered_clamping(steering, steering.method, n_features=20000, **options)


def test_clamp_prime_with_a_coefficient_of_its_own_for_each_feature(read):
    found = read(
        HEAD
        + f'11766,clamp_prime,,,-300,{CANONICAL},"biology, and\nmore"\n'
        + f"9723.0,,,0.5,-150.5,{CANONICAL},\n\n"
        + f"4788,CLAMP,,,-3e1,{CANONICAL}\n"
    )
    assert found.method == "static-clamp" and [row.line for row in found.rows] == [3, 4, 6]
    made = clamping(found)
    assert (made.indices, made.coefficients) == ([11766, 9723, 4788], [-300.0, -150.5, -30.0])
    assert (made.above, made.clamp, made.detectors) == ([0.0] * 3, "each", [])


def test_conditional_in_another_order_of_columns_with_a_byte_order_mark(read):
    found = read(
        b"\xef\xbb\xbfmine, steering_coefficient ,clamp_value,latent_idx,hook_action\r\n1,-300,0.5,7,conditional\r\n"
        b"2,-200,1.5,8, conditional\r\n"
    )
    made = clamping(found)
    assert found.method == "conditional-clamp" and made.clamp == "each"
    assert (made.indices, made.coefficients, made.above) == ([7, 8], [-300.0, -200.0], [0.5, 1.5])
    assert check_same_sae(found, "any/thing") == []  # The file names none.


def test_refusal(read):
    found = read(HEAD + "7,refusal,15864,0.05,300,,,\n8,refusal,15864,0.1,300,,,\n")
    made = clamping(found)
    assert (made.indices, made.detectors, made.coefficients) == ([15864], [7, 8], [300.0])
    assert (made.above, made.clamp) == ([NEVER, 0.05, 0.1], "all")
    also = clamping(found, clamps_features=True)
    assert (also.indices, also.detectors, also.coefficients) == ([15864, 7, 8], [], [300.0, -300.0, -300.0])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "has no rows"),
        (HEAD, "has no rows"),
        ("latent_idx,steering_coefficient\n7,1\n", "line 1: there is no column hook_action"),
        ("latent_idx,latent_idx,hook_action,steering_coefficient\n", "line 1: the column latent_idx is there twice"),
        (HEAD + "7,clamp,,,-1,,,\n7,clamp,,,-2,,,\n", "line 3: the feature 7 is there twice"),
        (HEAD + "7,clamp,,,-1,,,\n8,conditional,,1,-2,,,\n", "line 3: .*actions of one kind"),
        (HEAD + "7,clmp,,,-1,,,\n", "line 2: there is no action 'clmp'.\nDid you mean clamp"),
        (HEAD + "7,clamp,,,nan,,,\n", "line 2: steering_coefficient must be a number"),
        (HEAD + "7,clamp,,,1e9,,,\n", "line 2: steering_coefficient must be a number"),
        (HEAD + "7,clamp\n", "line 2: steering_coefficient must be a number of sensible size, not ''"),
        (HEAD + "-7,clamp,,,1,,,\n", "line 2: latent_idx must be a feature's number"),
        (HEAD + "7.5,clamp,,,1,,,\n", "line 2: latent_idx must be a feature's number"),
        (HEAD + "7,conditional,,,1,,,\n", "line 2: clamp_value must be a number"),
        (HEAD + "7,conditional,,-1,1,,,\n", "line 2: clamp_value must be a number"),
        (HEAD + "7,refusal,,1,1,,,\n", "line 2: refuse_id must be a feature's number"),
        (HEAD + "7,refusal,9,1,1,,,\n8,refusal,10,1,1,,,\n", "line 3: another refuse_id"),
        (HEAD + "7,refusal,9,1,1,,,\n8,refusal,9,1,2,,,\n", "line 3: another refuse_id or steering_coefficient"),
        (HEAD + "7,clamp,,,1,a,b,\n8,clamp,,,1,c,b,\n", "line 3: .*a file is for one SAE"),
        (HEAD + "7,clamp,,,1,a,b,what,is,this\n", "line 2: there are more values than columns"),
        (HEAD + '7,clamp,,,1,a,b,"never\nended\n', "this is no CSV"),
        (HEAD.encode() + b"7,clamp,,,1,,,\n8,clamp,,,1,,,\xff\n", "line 3: this is not UTF-8"),
        (b"x" * (LARGEST_FILE + 1), "is larger than"),
    ],
)
def test_what_is_wrong_is_one_error_with_its_line(read, content, words):
    refuses(words, read, content)


@pytest.mark.parametrize("name", ["nothing.csv", "", "x" * 5000, "a\0b"])
def test_a_file_that_is_not_there(name):
    refuses("There is no steering file", read_steering, Path(name))


def test_features_and_methods_that_do_not_fit(read):
    found = read(HEAD + "7,clamp,,,1,,,\n99,clamp,,,1,,,\n")
    refuses("line 3: the SAE has 48 features; no 99", steered_clamping, found, "static-clamp", n_features=48)
    refuses("those of static-clamp, not of refusal-clamp", steered_clamping, found, "refusal-clamp", n_features=200)
    refusal = read(HEAD + "7,refusal,99,1,1,,,\n")
    refuses("no 99", steered_clamping, refusal, "refusal-clamp", n_features=48)
    refuses("is one of those", clamping, read(HEAD + "7,refusal,7,1,1,,,\n"))


def test_the_sae_that_it_names_is_that_of_the_features(read):
    found = read(HEAD + f"7,clamp,,,1,{CANONICAL},\n")
    assert check_same_sae(found, "gemma-scope-2b-pt-res-canonical/layer_7/width_16k/canonical") == []
    assert check_same_sae(found, "gemma-scope-2b-pt-res/layer_7/width_16k/average_l0_69") == []  # The same weights.
    for other in (
        "gemma-scope-2b-pt-res-canonical/layer_8/width_16k/canonical",
        "gpt2-small-res-jb/blocks.7.hook_resid_pre",
    ):
        refuses("the features are of", check_same_sae, found, other)
    for elsewhere in ("lab", "/home/someone/sae"):
        (note,) = check_same_sae(found, elsewhere)
        assert "cannot be told" in note
    named = read(HEAD + "7,clamp,,,1,layer_7/width_16k/canonical,,\n")
    assert check_same_sae(named, "gemma-scope-2b-pt-res-canonical/layer_7/width_16k/canonical") == []
    refuses("the features are of", check_same_sae, named, "gemma-scope-2b-pt-res-canonical/layer_8/width_16k/canonical")


CELLS = st.sampled_from(["7", "8", "clamp", "refusal", "conditional", "", "-1", "1e400", "0.5", "x", '"', "\x00", "é"])

LINES = st.lists(st.lists(CELLS, max_size=9).map(",".join), max_size=5).map(
    lambda lines: (HEAD + "\n".join(lines)).encode()
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200) | st.text(max_size=80).map(lambda text: (HEAD + text).encode(errors="replace")) | LINES)
@example(HEAD.encode() + b"7" * 200_000)
@example(HEAD.encode() + b"\r7,clamp,,,1\r")
@example(HEAD.encode() + b"7,clamp,,,1+1e-,,,")
def test_any_bytes_are_a_clamp_or_one_error(read, content):
    try:
        found = read(content)
    except DsgError as error:
        assert len(str(error).splitlines()) <= 3 and len(str(error)) < 600
    else:
        assert found.rows and len({row.index for row in found.rows}) == len(found.rows)
