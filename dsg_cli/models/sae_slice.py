"""Slice a few features out of an SAE: guardrail/runtime/slice.py computes them exactly as the whole SAE does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from safetensors import safe_open
from torch import Tensor

from dsg_cli.errors import DsgError
from dsg_cli.guardrail.runtime.slice import SaeSlice, SliceSpec
from dsg_cli.models.releases import WEIGHTS_FILE
from dsg_cli.models.sae import WEIGHTS, SaeSource


def slice_sae(
    sae: SaeSource, indices: Sequence[int], detectors: Sequence[int] = (), weights: Sequence[float] = ()
) -> tuple[SliceSpec, dict[str, Tensor]]:
    """A slice as `SaeSlice` takes it, and beside its tensors `detect`, the features' weights in the gate's token score.

    `indices` will be clamped: they come first, and only they have rows of `W_dec`. `detectors` are what the gate
    watches, where it does not watch those, with `weights`, or 1 each where there are none.
    """
    columns = slice_columns(indices, detectors)
    beyond = [index for index in columns if not 0 <= index < sae.identity.n_features]
    if beyond:
        n_features = sae.identity.n_features
        raise DsgError(f"The SAE {sae.identity.source} has {n_features} features; there is no {beyond[0]}.")
    index_K = torch.tensor(columns, dtype=torch.long)
    with safe_open(sae.folder / WEIGHTS_FILE, framework="pt") as file:
        whole = {name: file.get_tensor(name) for name in WEIGHTS[sae.identity.architecture]}
    is_topk = "topk" in sae.identity.architecture
    W_enc = (whole["W_enc"] if is_topk else whole["W_enc"][:, index_K]).double()
    bias = _input_bias(sae, whole, W_enc)
    if sae.is_centred:  # (x - mean x) W = x (W - column means of W)
        W_enc = W_enc - W_enc.mean(0)
    whole |= {"W_enc": W_enc.float(), "bias": bias}
    tensors = _topk_tensors(sae, whole, index_K) if is_topk else _column_tensors(sae, whole, index_K)
    tensors["W_dec"] = tensors["W_dec"][: len(indices)]
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise DsgError(f"The SAE {sae.identity.source} holds a value behind {name} that is not finite.")
    tensors["detect"] = detector_weights(indices, detectors, weights)
    activation = "threshold" if "b_enc" in tensors and not is_topk else sae.identity.architecture
    spec = SliceSpec(
        activation=activation,
        normalization=sae.config.get("normalize_activations") or "none",
        is_rescaled_back=not sae.is_transcoder,
        k=int(sae.config["k"]) if is_topk else 0,
    )
    return spec, tensors


def slice_columns(indices: Sequence[int], detectors: Sequence[int]) -> list[int]:
    """The features of a slice in the order of its columns: those to be clamped, then those only watched."""
    return [*indices, *(j for j in detectors if j not in set(indices))]


def detector_weights(indices: Sequence[int], detectors: Sequence[int], weights: Sequence[float] = ()) -> Tensor:
    """The weight of each column of the slice in the gate's token score, [K].

    `detectors` are the features that the gate watches, all columns where there are none; `weights` are theirs, 1 each
    where there are none.
    """
    columns = slice_columns(indices, detectors)
    watched = list(detectors) or columns
    weight_of = dict(zip(watched, weights or [1.0] * len(watched), strict=True))
    return torch.tensor([weight_of.get(j, 0.0) for j in columns])


def load_slice(sae: SaeSource, indices: Sequence[int], detectors: Sequence[int] = ()) -> SaeSlice:
    """The slice as a module."""
    return SaeSlice(*slice_sae(sae, indices, detectors))


def _input_bias(sae: SaeSource, weights: dict[str, Tensor], W_enc: Tensor) -> Tensor:
    """What the encoder adds to its pre-activations because it subtracts the decoder's bias from its input."""
    if sae.is_transcoder or not sae.config.get("apply_b_dec_to_input", True):
        return torch.zeros(W_enc.shape[1], dtype=torch.float64)
    return -(weights["b_dec"].double() @ W_enc)


def _column_tensors(sae: SaeSource, weights: dict[str, Tensor], index_K: Tensor) -> dict[str, Tensor]:
    bias = weights["bias"]
    tensors = {"W_enc": weights["W_enc"], "W_dec": weights["W_dec"][index_K].float()}
    if sae.identity.architecture == "gated":
        mag_scale = weights["r_mag"][index_K].double().exp()
        return tensors | {
            "b_gate": (weights["b_gate"][index_K] + bias).float(),
            "b_mag": (weights["b_mag"][index_K] + bias * mag_scale).float(),
            "mag_scale": mag_scale.float(),
        }
    # A ReLU follows the threshold: below zero nothing is active.
    threshold = weights["threshold"][index_K].float().clamp(min=0.0) if "threshold" in weights else bias.float() * 0
    return tensors | {"b_enc": (weights["b_enc"][index_K] + bias).float(), "active_above": threshold}


def _topk_tensors(sae: SaeSource, weights: dict[str, Tensor], index_K: Tensor) -> dict[str, Tensor]:
    W_dec = weights["W_dec"].float()
    norm_F = W_dec.norm(dim=-1) if sae.config.get("rescale_acts_by_decoder_norm") else torch.ones(len(W_dec))
    return {
        "W_enc": weights["W_enc"],
        "b_enc": (weights["b_enc"] + weights["bias"]).float(),
        "act_scale": norm_F,
        "index": index_K,
        "W_dec": W_dec[index_K] / norm_F[index_K, None],
    }
