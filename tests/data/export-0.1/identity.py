"""Which model is this? A cheap identity of its weights."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from .sites import decoder_layers

N_SAMPLED_VALUES = 64


def evenly_spaced(tensor: Tensor, n: int) -> Tensor:
    """Up to `n` evenly spaced values of a tensor, on the CPU."""
    flat = tensor.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, min(n, flat.numel()), dtype=torch.float64).long()
    return flat[index.to(flat.device)].cpu()


def fingerprint(model: nn.Module, last_layer: int) -> str:
    """A cheap identity of the weights up to and including `last_layer`.

    Hashes the name, the shape and 64 evenly spaced values, rounded to bfloat16, of every parameter of the
    embeddings and of layers 0..last_layer: a cut model, the whole model and either dtype agree.
    """
    layers = decoder_layers(model)
    prefix = next(name for name, module in model.named_modules() if module is layers)
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if name.startswith(f"{prefix}."):
            if int(name[len(prefix) + 1 :].split(".")[0]) > last_layer:
                continue
        elif "embed" not in name and "wte" not in name and "wpe" not in name:
            continue
        values = evenly_spaced(parameter, N_SAMPLED_VALUES).to(torch.bfloat16).view(torch.int16)
        digest.update(f"{name} {tuple(parameter.shape)} {values.tolist()}\n".encode())
    return digest.hexdigest()
