"""Pruning: the smallest weights are set to 0, and activations move, perhaps below the gate's threshold."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from dsg_cli.artifacts import Json
from dsg_cli.attacks.target import Material, Target
from dsg_cli.attacks.weights import edited, linear_layers


def attack(target: Target, material: Material, *, shares: Sequence[float]) -> list[Json]:
    """Prune the decoder's linear weights by magnitude, and ask under the guard that was made for the others.

    Args:
        target: What is attacked.
        material: `forget` and, if there is any, `utility` are asked.
        shares: Of each weight matrix, what is set to 0: a point of the curve each. 0 is plain evaluation.

    Raises:
        DsgError: The model is spread over several devices.
    """
    return [
        target.point(
            share,
            material.forget,
            models=edited(target, functools.partial(pruned, share=share)),
            utility=material.utility,
        )
        for share in shares
    ]


@torch.no_grad()
def pruned(model: PreTrainedModel, share: float) -> PreTrainedModel:
    """The model, with that share of each linear weight matrix, its smallest magnitudes, set to 0."""
    for _, weight, _ in linear_layers(model):
        n_pruned = int(share * weight.numel())
        smallest = weight.abs().flatten().argsort(stable=True)[:n_pruned]
        weight.view(-1)[smallest] = 0.0
    return model
