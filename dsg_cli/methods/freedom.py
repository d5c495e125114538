"""Which parameters training may change: all weights, those of MLPs, some layers; or adapters in their place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dsg_cli.adapters import check_peft
from dsg_cli.errors import DsgError, nearest
from dsg_cli.methods.settings import Training
from dsg_cli.runtime.sites import MLP, decoder_layers

OUT = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "w2", "wo")
"""What families call the matrix by which an MLP writes."""


@dataclass(frozen=True)
class Free:
    """Parameters that may change."""

    names: list[str]
    parameters: list[nn.Parameter]
    adapter: Any = None
    """PEFT's model around the given one, in which adapters now are."""
    settings: Training = field(default_factory=Training)


def freed(model: PreTrainedModel, settings: Training, *, layers: Sequence[int] | None = None, seed: int = 0) -> Free:
    """Freeze all of the model but what the settings name.

    Args:
        model: Whole; adapters are put into it in place.
        settings: Of the training.
        layers: Those of the method, where the settings name none; None means all.
        seed: Of adapters' first values.

    Raises:
        DsgError: Nothing is left to train, a layer is not there, or no linear layer has such a name.
    """
    chosen = settings.layers if settings.layers is not None else layers
    n_layers = len(decoder_layers(model))
    beyond = [layer for layer in chosen or () if not 0 <= layer < n_layers]
    if beyond:
        raise DsgError(f"The model has layers 0 to {n_layers - 1}; there is no layer {beyond[0]}.")
    model.requires_grad_(False)
    if settings.lora:
        return _adapted(model, settings, chosen, seed)
    names = [name for name, _ in model.named_parameters() if _is_chosen(model, name, settings.trained, chosen)]
    if not names:
        raise DsgError(f"No weight is left to train by `{settings.trained}` in layers {chosen}.")
    own = dict(model.named_parameters())
    for name in names:
        own[name].requires_grad_(True)
    return Free(names, [own[name] for name in names], settings=settings)


def _is_chosen(model: PreTrainedModel, name: str, trained: str, layers: Sequence[int] | None) -> bool:
    """Whether a parameter, or a module, of that name is meant."""
    prefix = next(path for path, module in model.named_modules() if module is decoder_layers(model))
    if not name.startswith(f"{prefix}."):
        return trained == "all" and layers is None
    number, _, inner = name.removeprefix(f"{prefix}.").partition(".")
    parts = inner.split(".")
    is_mlp = any(part in MLP for part in parts)
    is_out = is_mlp and any(part in OUT for part in parts) and not name.endswith(".bias")
    kind = {"all": True, "mlp": is_mlp, "mlp-out": is_out}[trained]
    return kind and (layers is None or int(number) in layers)


def _adapted(model: PreTrainedModel, settings: Training, layers: Sequence[int] | None, seed: int) -> Free:
    """Adapters on every linear layer that would be trained."""
    check_peft()
    import torch
    from peft import LoraConfig, get_peft_model

    within = [path for path, module in model.named_modules() if module is decoder_layers(model)]
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and name.startswith(f"{within[0]}.")
        and _is_chosen(model, name, settings.trained, layers)
    ]
    targets = [
        name
        for name in linear
        if not settings.lora_targets or any(f".{name}".endswith(f".{end}") for end in settings.lora_targets)
    ]
    if not targets:
        ends = sorted({name.rsplit(".", 1)[-1] for name in linear})
        wanted = ", ".join(settings.lora_targets)
        raise DsgError(
            f"No linear layer that would be trained has a name that ends with {wanted or 'anything'}.",
            f"{nearest(settings.lora_targets[0] if settings.lora_targets else '', ends)} They end with: "
            f"{', '.join(ends) or 'nothing'}.",
        )
    config = LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, lora_dropout=0.0, target_modules=targets)
    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped: Any = get_peft_model(model, config)
    found = [(name, one) for name, one in wrapped.named_parameters() if one.requires_grad]
    return Free([name for name, _ in found], [one for _, one in found], wrapped, settings)
