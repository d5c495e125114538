"""SAEs: the slice against sae-lens's own encoder and decoder, what is refused, which model fits, and releases."""

from __future__ import annotations

import copy
import errno
import json

import pytest
import torch
from conftest import N_FEATURES, WIDTH, make_sae, refuses
from loopback import LoopbackHub
from safetensors.torch import load_file, save_file
from test_hub import SELECT, files_of, run

from dsg_cli.data.hub import hub_errors
from dsg_cli.errors import DsgError
from dsg_cli.lab import data as lab
from dsg_cli.models import releases
from dsg_cli.models.releases import find_sae, locate_release
from dsg_cli.models.sae import check_fits, load_encoder, read_sae
from dsg_cli.models.sae_slice import load_slice, slice_sae

INDICES = [5, 0, 47, 13]


def configure(folder, change=(), **metadata):
    """Change keys of an SAE's configuration, and of its metadata."""
    settings = json.loads((folder / "cfg.json").read_text()) | dict(change)
    if metadata:
        settings["metadata"] |= metadata
    (folder / "cfg.json").write_text(json.dumps(settings))


def test_identity_comes_from_the_folder(tmp_path):
    make_sae(tmp_path, hook="blocks.2.hook_resid_pre")
    source = read_sae(str(tmp_path))
    assert (source.site.layer, source.site.point) == (2, "resid_pre")
    assert (source.identity.width, source.identity.n_features) == (WIDTH, N_FEATURES)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "crosscoder"}, "cannot slice exactly"),
        ({"normalize_activations": "batch_norm"}, "normalize_activations"),
        ({"metadata": {}}, "does not say which hook"),
        ({"metadata": {"hook_name": "blocks.1.ln2.hook_normalized"}}, "no module of a Hugging Face model"),
        ({"d_in": 8}, "W_enc has shape"),
        ({"d_in": None}, "must be whole numbers"),
        ({"metadata": ["x"]}, "must be JSON objects"),
        ({"metadata": {"hook_name": 7}}, "does not say which hook"),
        ({"architecture": "standard", "activation_fn_str": "topk"}, "activation_fn_str='topk'"),
        ({"architecture": ["x"]}, "cannot slice exactly"),
        ({"architecture": "temporal"}, "depends on all earlier tokens"),
        ({"architecture": "matching_pursuit"}, "one after another"),
        ({"architecture": "batchtopk"}, "save_inference_model"),
        ({"normalize_activations": "expected_average_only_in"}, "fold_activation_norm_scaling_factor"),
        ({"normalize_activations": "covariance_whitening"}, "fold_activation_whitening"),
        ({"architecture": "topk", "k": N_FEATURES + 1}, "k=49"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path, change, words):
    make_sae(tmp_path)
    configure(tmp_path, change)
    refuses(words, read_sae, str(tmp_path))


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "threshold"])
def test_missing_misshapen_and_infinite_weights_are_refused(tmp_path, name):
    make_sae(tmp_path)
    path = tmp_path / "sae_weights.safetensors"
    weights = load_file(path)
    good = weights.pop(name)
    save_file(weights, path)
    refuses(f"has no tensor {name}", read_sae, str(tmp_path))
    save_file(weights | {name: good[..., :-1].contiguous()}, path)
    refuses(f"{name} has shape", read_sae, str(tmp_path))
    save_file(weights | {name: torch.full_like(good, torch.nan)}, path)
    refuses("not finite", slice_sae, read_sae(str(tmp_path)), INDICES)


def test_a_missing_or_broken_folder_is_refused(tmp_path):
    refuses("There is no SAE", read_sae, str(tmp_path / "none"))
    refuses("no cfg.json", read_sae, str(tmp_path))
    make_sae(tmp_path)
    (tmp_path / "cfg.json").write_text("[]")
    refuses("must be JSON objects", read_sae, str(tmp_path))
    make_sae(tmp_path)
    (tmp_path / "sae_weights.safetensors").write_bytes(b"\x00" * 100)
    refuses("cannot be read", read_sae, str(tmp_path))


def test_the_sae_must_fit_the_model(tmp_path, model):
    make_sae(tmp_path / "deep", hook="blocks.7.hook_resid_post")
    refuses("has 3 layers", check_fits, read_sae(str(tmp_path / "deep")), model.config, "m")
    make_sae(tmp_path / "wide", d_in=8)
    refuses(f"width 8.*has width {WIDTH}", check_fits, read_sae(str(tmp_path / "wide")), model.config, "m")
    refuses("there is no 48", slice_sae, read_sae(str(tmp_path / "wide")), [48])


NAMES = [
    ("gemma-2-2b", "google/gemma-2-2b-it@abc", "gemma2", "the same model before or after tuning"),
    ("google/gemma-3-1b-pt", "google/gemma-3-1b-it", "gemma3_text", "the same model before or after tuning"),
    ("gpt2-small", "openai-community/gpt2", "gpt2", None),
    ("gemma-2-2b", "google/gemma-2-2b", "gemma2", None),
    ("gemma-2b", "google/gemma-2b", "gemma", None),
    ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct", "llama", "before or after tuning"),
    ("meta-llama/Llama-3.1-8B", "acme/my-llama", "llama", "is not known"),
    ("something-new", "acme/my-llama", "llama", "is not known"),
    ("", "acme/my-llama", "llama", "does not say which model"),
    ("Qwen/Qwen3-30B-A3B-Base", "Qwen/Qwen3-30B-A3B-Base", "qwen3_moe", None),
    ("gemma-2b", "google/gemma-2-2b", "gemma2", DsgError),
    ("gemma-2-2b", "meta-llama/Llama-3.1-8B", "llama", DsgError),
    ("qwen3-4b", "Qwen/Qwen2.5-7B-Instruct", "qwen2", DsgError),
]


@pytest.mark.parametrize(("trained_on", "source", "model_type", "said"), NAMES)
def test_the_model_that_an_sae_names(tmp_path, model, trained_on, source, model_type, said):
    make_sae(tmp_path)
    configure(tmp_path, model_name=trained_on)
    model_config = copy.deepcopy(model.config)
    model_config.__dict__["model_type"] = model_type
    if said is DsgError:
        refuses("another family", check_fits, read_sae(str(tmp_path)), model_config, source)
        return
    notes = check_fits(read_sae(str(tmp_path)), model_config, source)
    assert (len(notes) == 1 and said in notes[0]) if said else not notes
    assert "has none" in check_fits(read_sae(str(tmp_path)), model_config, source, has_bos=False)[-1]


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated", "topk"])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_an_sae_of_centred_activations(tmp_path, architecture, apply_b_dec_to_input):
    """The mean over the width is taken out before the encoder: in the whole SAE and, folded in, in a slice of it."""
    settings = {"k": 5} if architecture == "topk" else {}
    whole = make_sae(tmp_path, architecture, bias=1.0, apply_b_dec_to_input=apply_b_dec_to_input, **settings)
    configure(tmp_path, model_from_pretrained_kwargs={"center_writing_weights": True})
    source = read_sae(str(tmp_path))
    resid_TD = torch.randn(200, WIDTH) * 3 + 2
    with torch.no_grad():
        expected = whole.encode(resid_TD - resid_TD.mean(-1, keepdim=True))
        assert not torch.allclose(expected, whole.encode(resid_TD), atol=0.1)
    torch.testing.assert_close(load_encoder(source, device="cpu")(resid_TD), expected)
    torch.testing.assert_close(load_slice(source, INDICES)(resid_TD).acts, expected[:, INDICES], rtol=1e-5, atol=1e-4)


DETECTORS = [0, 20]
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
ARCHITECTURES = {"standard": {}, "jumprelu": {}, "gated": {}, "topk": {"k": 5}, "abstopk": {"k": 5}}
STRENGTH = 3.0


def check(folder, whole, dtype=torch.float32, *, write_width=WIDTH):
    source = read_sae(str(folder))
    residual = (torch.randn(3, 40, WIDTH) * 3).to(dtype)
    part = load_slice(source, INDICES, DETECTORS)
    encoded = part(residual)
    with torch.no_grad():
        acts = whole.encode(residual.float())
        expected = acts[..., [*INDICES, 20]]
        torch.testing.assert_close(encoded.acts, expected, rtol=1e-5, atol=1e-4)
        assert ((expected != 0) == (encoded.acts != 0)).all() and (expected != 0).any() and (expected == 0).any()
        assert encoded.is_finite.all()
        # Clamping through the whole SAE: decode(clamped) - decode(acts), as the closed form says it.
        clamped = acts.clone()
        clamped[..., INDICES] = -STRENGTH
        whole.encode(residual.float())  # Run-time normalisation remembers its input until the next decode.
        after = whole.decode(clamped)
        whole.encode(residual.float())
        expected_delta = after - whole.decode(acts)
        delta = (-STRENGTH - encoded.acts[..., : len(INDICES)]) @ part.W_dec
        if encoded.scale is not None:
            delta = delta * encoded.scale
        assert delta.shape[-1] == write_width
        torch.testing.assert_close(delta, expected_delta, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(load_encoder(source, device="cpu")(residual), acts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("normalization", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_slice_equals_the_whole_sae(tmp_path, architecture, normalization, apply_b_dec_to_input, dtype):
    settings = {"normalize_activations": normalization, "apply_b_dec_to_input": apply_b_dec_to_input}
    whole = make_sae(tmp_path, architecture, bias=1.0, **settings, **ARCHITECTURES[architecture])
    check(tmp_path, whole, dtype)


def test_a_negative_threshold_has_a_relu_behind_it(tmp_path):
    whole = make_sae(tmp_path, "jumprelu", bias=1.0)
    weights = load_file(tmp_path / "sae_weights.safetensors")
    weights["threshold"][5] = -1.0
    save_file(weights, tmp_path / "sae_weights.safetensors")
    check(tmp_path, type(whole).load_from_disk(tmp_path))


@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_ranking_by_decoder_norm(tmp_path, architecture):
    whole = make_sae(tmp_path, architecture, bias=1.0, k=5, rescale_acts_by_decoder_norm=True)
    check(tmp_path, whole)


@pytest.mark.parametrize("architecture", TRANSCODERS)
def test_transcoders_write_elsewhere(tmp_path, architecture):
    whole = make_sae(tmp_path, architecture, bias=1.0, d_out=WIDTH + 4, apply_b_dec_to_input=False)
    configure(tmp_path, hook_name="blocks.1.hook_mlp_in", hook_name_out="blocks.1.hook_mlp_out")
    check(tmp_path, whole, write_width=WIDTH + 4)
    source = read_sae(str(tmp_path))
    assert source.site.point == "mlp_in" and source.write.point == "mlp_out"
    assert source.identity.hook_out == "blocks.1.hook_mlp_out"


@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_attention_heads_side_by_side(tmp_path, architecture):
    """sae-lens reads hook_z as [..., heads, d_head]; the output projection of a Hugging Face model reads them flat."""
    options = {"hook": "blocks.1.attn.hook_z", "reshape_activations": "hook_z", "bias": 1.0}
    whole = make_sae(tmp_path, architecture, **options, **ARCHITECTURES[architecture])
    source = read_sae(str(tmp_path))
    assert source.site.point == "attn_z"
    residual = torch.randn(3, 40, WIDTH) * 3
    with torch.no_grad():
        acts = whole.encode(residual.unflatten(-1, (2, WIDTH // 2)))
        torch.testing.assert_close(load_slice(source, INDICES)(residual).acts, acts[..., INDICES], rtol=1e-5, atol=1e-4)
        clamped = acts.clone()
        clamped[..., INDICES] = -STRENGTH
        wanted = (whole.decode(clamped) - whole.decode(acts)).flatten(-2)
    delta = (-STRENGTH - acts[..., INDICES]) @ load_slice(source, INDICES).W_dec
    torch.testing.assert_close(delta, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_not_finite_is_seen(tmp_path, architecture, value):
    make_sae(tmp_path, architecture, **ARCHITECTURES[architecture])
    residual = torch.randn(2, 3, WIDTH)
    residual[1, 2, 7] = value
    found = load_slice(read_sae(str(tmp_path)), INDICES)(residual).is_finite
    assert found.sum() == 5 and not found[1, 2]


NAME = "gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_142"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pretend(monkeypatch, sae):
    """sae-lens gives this SAE for every name; what was asked for is returned."""
    import sae_lens

    asked = []
    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", lambda *names, **_: asked.append(names) or sae)
    return asked


def test_a_release_is_converted_once(tmp_path, cache, monkeypatch):
    asked = pretend(monkeypatch, make_sae(tmp_path / "sae"))
    first, second = read_sae(NAME), read_sae(NAME)
    assert asked == [("gemma-scope-2b-pt-res", "layer_3/width_16k/average_l0_142")]
    assert first.identity == second.identity and first.identity.source == NAME and first.identity.width == WIDTH
    origin = json.loads((first.folder / "origin.json").read_text())
    assert origin["repository"] == "google/gemma-scope-2b-pt-res"
    assert first.folder.is_relative_to(cache)


def test_a_full_disk_leaves_nothing_half_written(tmp_path, cache, monkeypatch):
    sae = make_sae(tmp_path / "sae")
    pretend(monkeypatch, sae)

    def full(folder):
        (folder / "cfg.json").write_text("{}")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sae, "save_model", full)
        refuses(r"cannot be kept.*No space left.*\n.*DSG_CACHE", read_sae, NAME)
    assert not [path for path in cache.rglob("*") if path.is_file()]
    assert read_sae(NAME).identity.width == WIDTH
    with pytest.raises(DsgError, match="no room on the disk for org/name"), hub_errors("org/name"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="another"), hub_errors("org/name"):
        raise OSError(errno.EIO, "another")


def test_another_process_that_was_faster_is_no_error(tmp_path, cache, monkeypatch):
    """Of two conversions at once, the second finds the folder of the first; a folder without origin is replaced."""
    sae = make_sae(tmp_path / "sae")
    pretend(monkeypatch, sae)
    folder = read_sae(NAME).folder
    save, first = sae.save_model, (folder / "origin.json").read_text()

    def slowly(partial):
        save(partial)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "origin.json").write_text(first)

    (folder / "origin.json").unlink()
    monkeypatch.setattr(sae, "save_model", slowly)
    assert read_sae(NAME).folder == folder
    (folder / "origin.json").unlink()
    monkeypatch.setattr(sae, "save_model", save)
    assert read_sae(NAME).folder == folder and (folder / "sae_weights.safetensors").is_file()


def test_what_sae_lens_cannot_read_is_said(cache, monkeypatch):
    import sae_lens

    def broken(*_names, **_options):
        raise KeyError("W_enc")

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", broken)
    refuses(f"sae-lens cannot read {NAME}: 'W_enc'", find_sae, NAME)


@pytest.mark.parametrize(
    ("source", "place"),
    [
        (NAME, ("google/gemma-scope-2b-pt-res", "layer_3/width_16k/average_l0_142")),
        ("llama_scope_lxr_8x/l8r_8x", ("fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L8R-8x")),
        ("acme/saes", ("acme/saes", "")),
        ("acme/saes@v1/layer 3/a", ("acme/saes@v1", "layer 3/a")),
    ],
)
def test_where_a_name_leads(source, place):
    assert locate_release(source) == place
    assert len(releases.releases()) > 100


def test_an_sae_in_a_repository_is_pinned(tmp_path):
    with LoopbackHub(tmp_path / "hub") as hub:
        files = files_of(lab.SAE_DIRS["lab"])
        root = hub.add("models", "acme/sae", files)
        deep = hub.add("models", "acme/many", {f"a/one/{name}": content for name, content in files.items()})
        names = ("acme/sae", "acme/many/a/one", "acme/many/a/two", "acme/many", "acme/sae@nope")
        commands = [(*SELECT, "--model", "lab", "--json", "--sae", name) for name in names]
        found = run(hub.environment(tmp_path / "cache"), tmp_path, *commands)
    sources = [json.loads(out)["sae"]["source"] for code, out, _ in found[:2] if code == 0]
    assert sources == [f"acme/sae@{root}", f"acme/many@{deep}/a/one"], found
    refused = ("Did you mean a/one", "no SAE in its root", "no such revision")
    for (code, _, err), words in zip(found[2:], refused, strict=True):
        assert code == 1 and words in err, err
