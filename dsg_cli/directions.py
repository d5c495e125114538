"""Decoder rows of an SAE: those of some features, and which other features have nearly the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from safetensors import safe_open
from torch import Tensor

from dsg_cli.releases import WEIGHTS_FILE
from dsg_cli.sae import SaeSource

CHUNK = 8192
"""Rows that are in memory at a time."""


def decoder_rows(sae: SaeSource, indices: Sequence[int]) -> Tensor:
    """Rows of `W_dec` [C, P] in float32; the others stay on the disk."""
    with safe_open(sae.folder / WEIGHTS_FILE, framework="pt") as file:
        W_dec = file.get_slice("W_dec")
        return torch.cat([W_dec[index : index + 1].float() for index in indices])


def nearest_features(sae: SaeSource, indices: Sequence[int], n: int) -> list[list[tuple[int, float]]]:
    """Of each of some features, the n others whose decoder rows have the largest cosine with its own.

    Args:
        sae: Where from; its rows are read in chunks.
        indices: The features.
        n: How many.
    """
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
