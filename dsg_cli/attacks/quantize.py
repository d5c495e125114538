"""Quantisation: weights are rounded to a few bits, and activations move, perhaps below the gate's threshold."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dsg_cli.artifacts import Json
from dsg_cli.attacks.target import Material, Target
from dsg_cli.attacks.weights import edited, linear_layers


def attack(target: Target, material: Material, *, bits: Sequence[int]) -> list[Json]:
    """Round the decoder's linear weights, and ask under the guard that was made for the others.

    Args:
        target: What is attacked.
        material: `forget` and, if there is any, `utility` are asked.
        bits: Of a rounded weight, a point of the curve each.

    Raises:
        DsgError: The model is spread over several devices.
    """
    return [
        target.point(
            n,
            material.forget,
            models=edited(target, functools.partial(quantized, bits=n)),
            utility=material.utility,
        )
        for n in bits
    ]


@torch.no_grad()
def quantized(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """The model, its linear weights rounded to so many bits and back."""
    for _, weight, outputs in linear_layers(model):
        weight.copy_(rounded(weight, bits, outputs))
    return model


def rounded(weight: Tensor, bits: int, outputs: int) -> Tensor:
    """The nearest of 2^bits - 1 values around 0, evenly spaced up to the largest magnitude of each output channel.

    Args:
        weight: A matrix.
        bits: At least 2.
        outputs: The dimension that counts output channels.
    """
    largest = 2 ** (bits - 1) - 1
    step = weight.float().abs().amax(1 - outputs, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / largest
    return ((weight.float() / step).round() * step).to(weight.dtype)
