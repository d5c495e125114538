"""The guardrail: gate and clamp as one torch module, and the context manager that puts it on a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dsg_cli.errors import DsgError
from dsg_cli.gate import hot_tokens, mean_statistic
from dsg_cli.model import HookSite
from dsg_cli.residuals import replace_residual
from dsg_cli.sae import SaeSlice
from dsg_cli.tokens import counted_tokens


class GuardrailModule(nn.Module):
    """Decides for each sequence whether it is about the forgotten knowledge and, if so, clamps its hot tokens.

    On every hot token of a sequence whose statistic exceeds the threshold all selected features are set to -c, the
    SAE's error left as it is, which in closed form is `h + sum_j (-c - f_j(h)) W_dec[j]`. Every other token is
    returned bit for bit.
    """

    special: Tensor

    def __init__(
        self, sae: SaeSlice, site: HookSite, *, threshold: float, strength: float, special: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.sae = sae
        self.site = site
        self.threshold = threshold
        self.strength = strength
        self.register_buffer("special", torch.tensor(special, dtype=torch.long))
        self.last_statistic_B: Tensor | None = None
        """Gate statistic of the last batch."""
        self.last_gated_B: Tensor | None = None
        """Whether each sequence of the last batch was gated."""

    def forward(self, resid_BLD: Tensor, counted_BL: Tensor) -> Tensor:
        """The residual with its hot tokens clamped where the gate fires, in the dtype it came in."""
        acts_BLK = self.sae(resid_BLD)
        hot_BL = hot_tokens(acts_BLK, counted_BL)
        statistic_B = mean_statistic(hot_BL, counted_BL)
        gated_B = statistic_B > self.threshold
        self.last_statistic_B, self.last_gated_B = statistic_B.detach(), gated_B
        edited_BLD = resid_BLD.float() + (-self.strength - acts_BLK) @ self.sae.W_dec
        clamped_BL = hot_BL & gated_B[:, None]
        return torch.where(clamped_BL[..., None], edited_BLD.to(resid_BLD.dtype), resid_BLD)


@contextmanager
def guarded(model: nn.Module, guardrail: GuardrailModule) -> Iterator[nn.Module]:
    """While the block runs, the model answers under the guardrail.

    The decision is made on whole sequences (the paper's gate), so every call must hold token ids of whole sequences.
    Hooks are gone after the block, also after an exception.

    Raises:
        DsgError: Inside the block, on a call that continues a cached sequence or holds embeddings instead of ids.
    """
    counted: list[Tensor] = []

    def remember(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids_BL = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        if ids_BL is None or (cache is not None and cache.get_seq_length() > 0):
            raise DsgError(
                "The gate `mean` needs the token ids of whole sequences; "
                "this call continues a cached one, or has no ids."
            )
        counted[:] = [counted_tokens(ids_BL, kwargs.get("attention_mask"), guardrail.special)]

    guardrail.to(next(model.parameters()).device)
    handle = model.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        with replace_residual(model, guardrail.site, lambda resid_BLD: guardrail(resid_BLD, counted[0])):
            yield model
    finally:
        handle.remove()
