"""One forward call of a decoder: which tokens does it hold, which count, and do rows hold several sequences?

The same text must be decided on in the same way however it is served: with a mask of two dimensions, of four or none,
padded left or right, in one call or token by token from a cache, alone or packed.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .errors import DsgError

PAGED = ("cu_seq_lens_q", "cu_seq_lens_k", "block_table", "read_index", "write_index", "cache")
"""Arguments by which continuous batching lays many sequences into one row."""


ISOLATING = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt_neox", "gpt2", "phi",
    "phi3", "olmo2", "olmo3",
)  # fmt: skip
"""Families that keep packed sequences apart. In others a packed row counts as one sequence, which blocks too much."""


@dataclass(frozen=True)
class Call:
    """What a guardrail must know of a call."""

    ids_BL: Tensor
    real_BL: Tensor
    """False for padding."""
    segment_BL: Tensor | None
    """Where rows hold several sequences: which of them each token belongs to."""
    cache: Cache | None
    """What the call continues; None or empty at the beginning of a sequence."""

    def counted_BL(self, special: Tensor) -> Tensor:
        """True for tokens that are neither padding nor special."""
        return self.real_BL & ~torch.isin(self.ids_BL, special.to(self.ids_BL.device))


def argument_names(decoder: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of the decoder's forward, for those that come by position."""
    return tuple(inspect.signature(decoder.forward).parameters)


def read_call(config: Any, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Read the arguments that a decoder was called with.

    Args:
        config: The decoder's configuration.
        names: `argument_names` of the decoder.
        args: Its arguments by position.
        kwargs: Its arguments by name.

    Raises:
        DsgError: Something by which sequences cannot be told apart, or tokens not be known.
    """
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    ids_BL, cache, mask = (given.get(name) for name in ("input_ids", "past_key_values", "attention_mask"))
    if any(given.get(name) is not None for name in PAGED) or "paged" in str(config._attn_implementation):
        raise DsgError(
            "Continuous batching lays many sequences into one row, where a guardrail cannot tell them apart.",
            "Serve without continuous batching.",
        )
    if ids_BL is None:
        raise DsgError("A guardrail needs token ids; this call holds embeddings.", "Pass input_ids.")
    if cache is not None and not isinstance(cache, Cache):
        raise DsgError(f"past_key_values is a {type(cache).__name__}, not a Cache of transformers.")
    real_BL = _real_tokens(mask, ids_BL, cache)
    position_ids, use_cache = given.get("position_ids"), given.get("use_cache")
    is_cached = cache is not None or (config.use_cache if use_cache is None else use_cache)
    segment_BL = None
    # The condition under which transformers keeps packed sequences apart.
    isolates = config.model_type.removeprefix("dsg_") in ISOLATING
    if position_ids is not None and mask is None and not is_cached and isolates:
        step_BL = position_ids.expand(ids_BL.shape).diff(dim=-1) != 1
        segment_BL = torch.cat([torch.zeros_like(ids_BL[:, :1]), step_BL.cumsum(-1)], -1)
    return Call(ids_BL, real_BL, segment_BL, cache)


def _real_tokens(mask: Any, ids_BL: Tensor, cache: Cache | None) -> Tensor:
    """False for padding, [B, L], from whatever mask the decoder was given."""
    if isinstance(mask, dict):  # One mask a kind of attention; None where nothing is hidden.
        mask = mask["full_attention"] if "full_attention" in mask else next(iter(mask.values()))
    if mask is None:
        return torch.ones_like(ids_BL, dtype=torch.bool)
    n_rows, length = ids_BL.shape
    if not torch.is_tensor(mask) or mask.dim() not in (2, 4):
        raise DsgError(
            f"A guardrail cannot read a {type(mask).__name__} as attention mask.", "Pass one of two dimensions."
        )
    n_before: int | Tensor = 0 if cache is None else cache.get_seq_length()
    if isinstance(n_before, int) and mask.shape[-1] < n_before + length:
        if mask.dim() == 2:
            raise DsgError(f"The attention mask covers {mask.shape[-1]} of {n_before + length} tokens.")
        n_before = mask.shape[-1] - length  # A sliding window keeps the last tokens only.
    own_L = torch.arange(length, device=mask.device) + n_before
    if mask.dim() == 2:
        return mask.index_select(-1, own_L).bool().to(ids_BL.device).expand(n_rows, length)
    # A token of a prepared mask is padding if it may not even see itself.
    own_L = own_L.clamp(max=mask.shape[-1] - 1)
    own_BL = mask[:, 0].gather(-1, own_L[None, :, None].expand(mask.shape[0], -1, 1)).squeeze(-1)
    if own_BL.dtype != torch.bool:
        own_BL = own_BL > torch.finfo(own_BL.dtype).min / 2
    return own_BL.to(ids_BL.device).expand(n_rows, length)
