"""Low-rank adapters: to the output of a linear layer, a product of two thin matrices is added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dsg_cli.attacks.weights import linear_layers

SCALE = 2.0
"""What the product is multiplied with, as is customary (alpha = 2 r)."""


class LowRank(nn.Module):
    """A forward hook that adds x A B to what a linear layer makes of x. B begins as 0: nothing is changed yet."""

    def __init__(self, n_in: int, n_out: int, rank: int, generator: torch.Generator, device: torch.device) -> None:
        super().__init__()
        self.A_DR = nn.Parameter((torch.randn(n_in, rank, generator=generator) / n_in**0.5).to(device))
        self.B_RD = nn.Parameter(torch.zeros(rank, n_out, device=device))

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + SCALE * (args[0] @ self.A_DR) @ self.B_RD


def add_adapters(model: Any, rank: int, *, frozen: Sequence[nn.Parameter], seed: int) -> list[nn.Parameter]:
    """Put an adapter on every linear layer of the decoder; their parameters.

    Args:
        model: A causal language model that is the attack's own; adapters stay on it.
        rank: Of the product.
        frozen: Weights whose layers get none.
        seed: Of the first matrices.
    """
    generator = torch.Generator().manual_seed(seed)
    without = {id(one) for one in frozen}
    added: list[nn.Parameter] = []
    for module, weight, outputs in list(linear_layers(model)):
        if id(weight) in without:
            continue
        adapter = LowRank(weight.shape[1 - outputs], weight.shape[outputs], rank, generator, weight.device)
        module.register_forward_hook(adapter)
        added += adapter.parameters()
    return added
