"""Read or replace what a module of a Hugging Face model reads or writes; hooks never outlive their block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from torch import Tensor, nn

from dsg_cli.runtime.sites import HookSite, edit_site


class _ReachedError(Exception):
    """Raised inside the forward pass once the residual is known: nothing above it needs to run."""


def read_residual(model: nn.Module, site: HookSite, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """The activations at `site`; layers above it are not run.

    Args:
        model: A causal language model, whole or cut after the site's layer.
        site: Where to read.
        ids_BL: Token ids.
        mask_BL: 1 for tokens, 0 for padding.

    Returns:
        resid_BLD in the model's dtype, on the device of the ids wherever the layer lies.
    """
    found: list[Tensor] = []

    def keep(resid_BLD: Tensor) -> Tensor:
        found.append(resid_BLD)
        raise _ReachedError

    with replace_residual(model, site, keep), suppress(_ReachedError):
        model(input_ids=ids_BL, attention_mask=mask_BL.long(), use_cache=False)
    return found[0].to(ids_BL.device)


@contextmanager
def replace_residual(model: nn.Module, site: HookSite, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While the block runs, the activation at `site` is `edit(activation)`."""
    handle = edit_site(model, site, edit)
    try:
        yield
    finally:
        handle.remove()
