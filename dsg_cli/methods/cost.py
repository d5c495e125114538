"""What a method costs: passes through the model and tokens in them, counted where they happen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from dsg_cli.runtime.sites import decoder_of


@dataclass
class Cost:
    """Calls of the model, and tokens in them, padding included. A call that keeps a graph is followed by a backward
    pass."""

    forward_passes: int = 0
    backward_passes: int = 0
    forward_tokens: int = 0
    backward_tokens: int = 0

    def as_json(self) -> dict[str, int]:
        return asdict(self)


@contextmanager
def counted(model: nn.Module, cost: Cost) -> Iterator[None]:
    """While the block runs, every call of the model is counted."""

    def count(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        n_tokens = ids.numel() if ids is not None else kwargs["inputs_embeds"].shape[:2].numel()
        cost.forward_passes += 1
        cost.forward_tokens += n_tokens
        if torch.is_grad_enabled():
            cost.backward_passes += 1
            cost.backward_tokens += n_tokens

    handle = decoder_of(model).register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
