"""The slice of an SAE against sae-lens's own encoder; what cannot be sliced is refused."""

import copy
import json

import pytest
import torch
from conftest import N_FEATURES, WIDTH, make_sae
from dsg_cli.fit import check_fits
from dsg_cli.sae import load_encoder, read_sae
from dsg_cli.slicing import load_slice, slice_sae

from dsg_cli.errors import DsgError

INDICES = [5, 0, 47, 13]


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
def test_slice_equals_the_whole_encoder(tmp_path, architecture, apply_b_dec_to_input):
    whole = make_sae(tmp_path, architecture, apply_b_dec_to_input=apply_b_dec_to_input)
    if architecture == "jumprelu":
        # A negative threshold still has a ReLU behind it.
        from safetensors.torch import load_file, save_file

        weights = load_file(tmp_path / "sae_weights.safetensors")
        weights["threshold"][5] = -1.0
        save_file(weights, tmp_path / "sae_weights.safetensors")
        whole = type(whole).load_from_disk(tmp_path)
    source = read_sae(str(tmp_path))
    residual = torch.randn(200, WIDTH) * 3
    expected = whole.encode(residual)[:, INDICES].detach()
    part = load_slice(source, INDICES)
    torch.testing.assert_close(part(residual).acts, expected, rtol=1e-5, atol=1e-4)
    assert (expected > 0).any() and (expected == 0).any()
    torch.testing.assert_close(part.W_dec, whole.W_dec[INDICES].detach())
    torch.testing.assert_close(load_encoder(source, device="cpu")(residual), whole.encode(residual).detach())


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
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path, change, words):
    make_sae(tmp_path)
    config = tmp_path / "cfg.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(DsgError, match=words):
        read_sae(str(tmp_path))


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "threshold"])
def test_missing_misshapen_and_infinite_weights_are_refused(tmp_path, name):
    from safetensors.torch import load_file, save_file

    make_sae(tmp_path)
    path = tmp_path / "sae_weights.safetensors"
    weights = load_file(path)
    good = weights.pop(name)
    save_file(weights, path)
    with pytest.raises(DsgError, match=f"has no tensor {name}"):
        read_sae(str(tmp_path))
    save_file(weights | {name: good[..., :-1].contiguous()}, path)
    with pytest.raises(DsgError, match=f"{name} has shape"):
        read_sae(str(tmp_path))
    save_file(weights | {name: torch.full_like(good, torch.nan)}, path)
    with pytest.raises(DsgError, match="not finite"):
        slice_sae(read_sae(str(tmp_path)), INDICES)


def test_a_missing_or_broken_folder_is_refused(tmp_path):
    with pytest.raises(DsgError, match="There is no SAE"):
        read_sae(str(tmp_path / "none"))
    with pytest.raises(DsgError, match="no cfg.json"):
        read_sae(str(tmp_path))
    make_sae(tmp_path)
    (tmp_path / "cfg.json").write_text("[]")
    with pytest.raises(DsgError, match="must be JSON objects"):
        read_sae(str(tmp_path))
    make_sae(tmp_path)
    (tmp_path / "sae_weights.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(DsgError, match="cannot be read"):
        read_sae(str(tmp_path))


def test_the_sae_must_fit_the_model(tmp_path, model):
    make_sae(tmp_path / "deep", hook="blocks.7.hook_resid_post")
    with pytest.raises(DsgError, match="has 3 layers"):
        check_fits(read_sae(str(tmp_path / "deep")), model.config, "m")
    make_sae(tmp_path / "wide", d_in=8)
    with pytest.raises(DsgError, match=f"width 8.*has width {WIDTH}"):
        check_fits(read_sae(str(tmp_path / "wide")), model.config, "m")
    with pytest.raises(DsgError, match="there is no 48"):
        slice_sae(read_sae(str(tmp_path / "wide")), [48])


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
    config = json.loads((tmp_path / "cfg.json").read_text())
    config["metadata"]["model_name"] = trained_on
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    model_config = copy.deepcopy(model.config)
    model_config.__dict__["model_type"] = model_type
    if said is DsgError:
        with pytest.raises(DsgError, match="another family"):
            check_fits(read_sae(str(tmp_path)), model_config, source)
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
    config = json.loads((tmp_path / "cfg.json").read_text())
    config["metadata"]["model_from_pretrained_kwargs"] = {"center_writing_weights": True}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    source = read_sae(str(tmp_path))
    resid_TD = torch.randn(200, WIDTH) * 3 + 2
    with torch.no_grad():
        expected = whole.encode(resid_TD - resid_TD.mean(-1, keepdim=True))
        assert not torch.allclose(expected, whole.encode(resid_TD), atol=0.1)
    torch.testing.assert_close(load_encoder(source, device="cpu")(resid_TD), expected)
    torch.testing.assert_close(load_slice(source, INDICES)(resid_TD).acts, expected[:, INDICES], rtol=1e-5, atol=1e-4)
