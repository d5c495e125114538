"""Read or replace the residual stream at one place of a Hugging Face model; hooks never outlive their block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from dsg_cli.model import HookSite, decoder_layers


class _ReachedError(Exception):
    """Raised inside the forward pass once the residual is known: nothing above it needs to run."""


def read_residual(model: nn.Module, site: HookSite, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """The residual stream at `site`; layers above it are not run.

    Args:
        model: A causal language model, whole or cut after the site's layer.
        site: Where to read.
        ids_BL: Token ids.
        mask_BL: 1 for tokens, 0 for padding.

    Returns:
        resid_BLD in the model's dtype.
    """
    found: list[Tensor] = []

    def keep(resid_BLD: Tensor) -> Tensor:
        found.append(resid_BLD)
        raise _ReachedError

    with replace_residual(model, site, keep), suppress(_ReachedError):
        model(input_ids=ids_BL, attention_mask=mask_BL.long(), use_cache=False)
    return found[0]


@contextmanager
def replace_residual(model: nn.Module, site: HookSite, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While the block runs, the residual at `site` is `edit(residual)`.

    Decoder layers return a tensor in most families and a tuple in a few; both are handled.
    """
    layer = decoder_layers(model)[site.layer]

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        if torch.is_tensor(output):
            return edit(output)
        return (edit(output[0]), *output[1:])

    if site.point == "resid_pre":
        handle = layer.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = layer.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()
