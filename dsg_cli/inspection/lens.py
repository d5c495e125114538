"""What a direction of the residual stream says of the next token: the logit lens.

A direction d is taken through the norm in front of the head and through the head itself, as if it alone were what the
layers in between had left: `logits_V = W_head (gain * d)`, minus their mean over the vocabulary. `gain` is what the
norm multiplies each dimension with (Gemma's is 1 + weight); where the norm subtracts the mean over the width, so does
the lens. What is left out changes no order: the norm's division by the residual's length and a soft cap on logits
are monotonous, and a constant that the norm or the head adds is there with and without the direction. Centred, because
softmax does not see what all logits have in common. Layers in between change what a direction says; the lower the
layer, the more.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsg_cli.guardrail.runtime.sites import HookSite
from dsg_cli.models.language_model import final_norm
from dsg_cli.models.releases import WEIGHTS_FILE
from dsg_cli.models.sae import SaeSource

READABLE = ("resid_pre", "resid_post", "mlp_out", "attn_out", "output")
"""Points at which what is written is added to the residual stream."""
LARGE = 1024.0
"""Length of a dimension of what the norm is asked about: its epsilon is nothing beside it."""
VOCABULARY_CHUNK, CHUNK = 16_384, 8192
"""Rows of the head, and of the decoder, that are taken to float32 at a time."""


@dataclass(frozen=True)
class LensTokens:
    """Tokens of one direction, with their centred logits for one unit of it, the strongest first."""

    promoted: list[tuple[str, float]]
    suppressed: list[tuple[str, float]]


@torch.inference_mode()
def logit_lens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, site: HookSite, rows_CP: Tensor, n_tokens: int
) -> list[LensTokens] | None:
    """What each of C directions, written at `site`, promotes and suppresses: `n_tokens` either way.

    The model may be cut after any layer: only its last norm and its head are used. None where the lens does not apply:
    directions that are not of the residual stream, or a last norm or a head that is of no form known here.
    """
    logits_CV = lens_logits(model, site, rows_CP, len(tokenizer))
    if logits_CV is None:
        return None
    most, least = (logits_CV.topk(min(n_tokens, logits_CV.shape[1]), largest=largest) for largest in (True, False))

    def tokens(values: Tensor, ids: Tensor) -> list[tuple[str, float]]:
        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        return [(str(tokenizer.decode([token])), value) for token, value in pairs]

    return [
        LensTokens(tokens(most.values[c], most.indices[c]), tokens(least.values[c], least.indices[c]))
        for c in range(len(rows_CP))
    ]


def lens_logits(model: PreTrainedModel, site: HookSite, rows_CP: Tensor, vocabulary: int) -> Tensor | None:
    """Centred logits [C, V] on the CPU; None where the lens does not apply."""
    head, norm = model.get_output_embeddings(), final_norm(model)
    weight_VD = getattr(head, "weight", None)
    if site.point not in READABLE or norm is None or weight_VD is None or weight_VD.shape[-1] != rows_CP.shape[1]:
        return None
    linear = _linear_part(norm, rows_CP.shape[1], weight_VD.device)
    if linear is None:
        return None
    gain_D, is_centring = linear
    rows_CD = rows_CP.float().to(weight_VD.device)
    read_CD = (rows_CD - rows_CD.mean(-1, keepdim=True) if is_centring else rows_CD) * gain_D
    parts = torch.split(weight_VD[:vocabulary], VOCABULARY_CHUNK)
    logits_CV = torch.cat([(read_CD @ part.float().T).cpu() for part in parts], -1)
    return logits_CV - logits_CV.mean(-1, keepdim=True)


def _linear_part(norm: nn.Module, width: int, device: torch.device) -> tuple[Tensor, bool] | None:
    """What a norm multiplies each dimension with, and whether it subtracts the mean: the norm itself is asked.

    Families write their norms differently; all that is assumed is checked on a random residual.
    """
    if width % 2:
        return None  # No vector of ones and minus ones has the mean 0.
    own = copy.deepcopy(norm).float().to(device)
    sign_D = torch.tensor([1.0, -1.0], device=device).repeat(width // 2)

    def odd(x_D: Tensor) -> Any:
        """Without the constant that it adds."""
        return (own(x_D[None])[0] - own(-x_D[None])[0]) / 2

    gain_D = odd(LARGE * sign_D) * sign_D
    random_D = LARGE * torch.randn(width, generator=torch.Generator().manual_seed(0)).to(device) + LARGE
    for is_centring in (False, True):
        x_D = random_D - random_D.mean() if is_centring else random_D
        if torch.allclose(odd(random_D), gain_D * x_D / x_D.square().mean().sqrt(), rtol=1e-3, atol=1e-4):
            return gain_D, is_centring
    return None


def decoder_rows(sae: SaeSource, indices: Sequence[int]) -> Tensor:
    """Rows of `W_dec` [C, P] in float32; the others stay on the disk."""
    with safe_open(sae.folder / WEIGHTS_FILE, framework="pt") as file:
        W_dec = file.get_slice("W_dec")
        return torch.cat([W_dec[index : index + 1].float() for index in indices])


def nearest_features(sae: SaeSource, indices: Sequence[int], n: int) -> list[list[tuple[int, float]]]:
    """Of each of some features, the n others whose decoder rows have the largest cosine with its own."""
    rows_CP = _unit(decoder_rows(sae, indices))
    own_C = torch.tensor(list(indices))
    best_CN, place_CN = torch.empty(len(indices), 0), torch.empty(len(indices), 0, dtype=torch.long)
    with safe_open(sae.folder / WEIGHTS_FILE, framework="pt") as file:
        W_dec = file.get_slice("W_dec")
        for start in range(0, sae.identity.n_features, CHUNK):
            chunk_HP = _unit(W_dec[start : start + CHUNK].float())
            place_H = torch.arange(start, start + len(chunk_HP))
            cosine_CH = torch.where(place_H == own_C[:, None], -torch.inf, rows_CP @ chunk_HP.T)
            together = torch.cat([best_CN, cosine_CH], -1)
            places = torch.cat([place_CN, place_H.expand(len(indices), -1)], -1)
            top = together.topk(min(n, together.shape[1]), dim=-1)
            best_CN, place_CN = top.values, places.gather(-1, top.indices)
    return [
        [(j, cosine) for j, cosine in zip(places, values, strict=True) if cosine > -1.5]  # Not itself.
        for places, values in zip(place_CN.tolist(), best_CN.tolist(), strict=True)
    ]


def _unit(rows_CP: Tensor) -> Tensor:
    return rows_CP / rows_CP.norm(dim=-1, keepdim=True).clamp(min=1e-12)
