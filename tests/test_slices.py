"""The slice of every architecture and normalisation against sae-lens's own encode and decode."""

import json

import pytest
import torch
from conftest import N_FEATURES, WIDTH, make_sae
from dsg_cli.sae import load_encoder, read_sae
from dsg_cli.slicing import load_slice

from dsg_cli.errors import DsgError

INDICES = [5, 0, 47, 13]
DETECTORS = [0, 20]
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
ARCHITECTURES = {
    "standard": {},
    "jumprelu": {},
    "gated": {},
    "topk": {"k": 5},
    "abstopk": {"k": 5},
}
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
        wanted = after - whole.decode(acts)
        delta = (-STRENGTH - encoded.acts[..., : len(INDICES)]) @ part.W_dec
        if encoded.scale is not None:
            delta = delta * encoded.scale
        assert delta.shape[-1] == write_width
        torch.testing.assert_close(delta, wanted, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(load_encoder(source, device="cpu")(residual), acts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("normalization", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_slice_equals_the_whole_sae(tmp_path, architecture, normalization, apply_b_dec_to_input, dtype):
    whole = make_sae(
        tmp_path,
        architecture,
        bias=1.0,
        normalize_activations=normalization,
        apply_b_dec_to_input=apply_b_dec_to_input,
        **ARCHITECTURES[architecture],
    )
    check(tmp_path, whole, dtype)


@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_ranking_by_decoder_norm(tmp_path, architecture):
    whole = make_sae(tmp_path, architecture, bias=1.0, k=5, rescale_acts_by_decoder_norm=True)
    check(tmp_path, whole)


@pytest.mark.parametrize("architecture", TRANSCODERS)
def test_transcoders_write_elsewhere(tmp_path, architecture):
    whole = make_sae(tmp_path, architecture, bias=1.0, d_out=WIDTH + 4, apply_b_dec_to_input=False)
    config = tmp_path / "cfg.json"
    settings = json.loads(config.read_text())
    settings["metadata"] |= {"hook_name": "blocks.1.hook_mlp_in", "hook_name_out": "blocks.1.hook_mlp_out"}
    config.write_text(json.dumps(settings))
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
    part = load_slice(source, INDICES)
    delta = (-STRENGTH - acts[..., INDICES]) @ part.W_dec
    torch.testing.assert_close(delta, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_not_finite_is_seen(tmp_path, architecture, value):
    make_sae(tmp_path, architecture, **ARCHITECTURES[architecture])
    residual = torch.randn(2, 3, WIDTH)
    residual[1, 2, 7] = value
    found = load_slice(read_sae(str(tmp_path)), INDICES)(residual).is_finite
    assert found.sum() == 5 and not found[1, 2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "temporal"}, "depends on all earlier tokens"),
        ({"architecture": "matching_pursuit"}, "one after another"),
        ({"architecture": "batchtopk"}, "save_inference_model"),
        ({"normalize_activations": "expected_average_only_in"}, "fold_activation_norm_scaling_factor"),
        ({"normalize_activations": "covariance_whitening"}, "fold_activation_whitening"),
        ({"architecture": "topk", "k": N_FEATURES + 1}, "k=49"),
    ],
)
def test_what_cannot_be_sliced_is_refused_with_the_reason(tmp_path, change, words):
    make_sae(tmp_path)
    config = tmp_path / "cfg.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(DsgError, match=words):
        read_sae(str(tmp_path))
