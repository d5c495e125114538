"""Copies of a model whose weights an attack may change."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dsg_cli.attacks.target import Target
from dsg_cli.errors import DsgError
from dsg_cli.model import devices_of
from dsg_cli.runtime.sites import decoder_of


def copied(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model.

    Raises:
        DsgError: It is spread over several devices.
    """
    if len(devices_of(model)) > 1:
        raise DsgError(
            "A model that is spread over several devices cannot be copied, so its weights cannot be attacked here.",
            "Take a device that holds it whole.",
        )
    return copy.deepcopy(model)


def edited(target: Target, edit: Callable[[PreTrainedModel], PreTrainedModel]) -> dict[str, PreTrainedModel]:
    """The models of both sides after an edit of their weights; one copy where they are the same."""
    guarded = edit(copied(target.of("guarded")))
    return {"guarded": guarded, "unguarded": guarded if target.base is None else edit(copied(target.base))}


def linear_layers(model: PreTrainedModel) -> Iterator[tuple[nn.Module, Tensor, int]]:
    """Of every linear layer in the decoder, so without the head: the module, its weight, and which of the two
    dimensions of the weight counts its outputs."""
    for module in decoder_of(model).modules():
        if isinstance(module, nn.Linear):
            yield module, module.weight, 0
        elif isinstance(module, Conv1D):
            yield module, module.weight, 1
