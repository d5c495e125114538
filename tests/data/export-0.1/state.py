"""What a gate must remember of a sequence lies in the sequence's own cache, as one more layer of it.

Whatever is done to the cache (reordered by beam search, repeated, cropped by assisted decoding, copied with a prompt
that several requests share) is then done to the gate's memory too. A growing cache keeps the state after every token,
so that cropping finds the earlier one; a cache of fixed size keeps the last.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from .errors import DsgError

DummyLayer: Any = getattr(cache_utils, "DummyLayer", object)
"""Marks a layer that no attention looks at: hybrid models would take it for their first full attention layer."""


class GrowingState(DynamicLayer):
    """States after every token, as `keys` [B, 1, L, C]; `values` is empty."""

    def __init__(self, owner: str) -> None:
        super().__init__()
        self.owner = owner
        """Which guardrail's."""

    def put(self, states_BLC: Tensor) -> None:
        """Append the states after the tokens of one call."""
        self.update(states_BLC[:, None], states_BLC.new_empty(states_BLC.shape[0], 1, states_BLC.shape[1], 0))

    def last(self) -> Tensor:
        """The state after the last token, [B, C]."""
        assert self.keys is not None
        return self.keys[:, 0, -1]

    def get_seq_length(self) -> int:
        return 0 if self.keys is None or self.keys.dim() < 4 else int(self.keys.shape[-2])


class FixedState(CacheLayerMixin, DummyLayer):
    """The state after the last token, as `keys` [B, 1, 1, C] at one address; for caches that compile."""

    is_compileable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, owner: str) -> None:
        super().__init__()
        self.owner = owner
        self.keys: Tensor | None
        self.is_initialized: bool

    def put(self, states_BLC: Tensor) -> None:
        """Overwrite with the state after the last token of one call."""
        last = states_BLC[:, -1:, :].unsqueeze(1)
        if self.is_initialized:
            assert self.keys is not None
            self.keys.copy_(last)
            return
        self.keys, self.values = last.clone(), last.new_empty(*last.shape[:-1], 0)
        self.is_initialized = True

    def last(self) -> Tensor:
        """The state after the last token, [B, C]."""
        assert self.keys is not None
        return self.keys[:, 0, 0].clone()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: `put` does it."""

    def update(self, key_states: Tensor, value_states: Tensor, *_arguments: Any, **_more: Any) -> tuple[Tensor, Tensor]:
        """No attention layer writes here."""
        raise NotImplementedError("A gate's state is not an attention layer.")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return int(self.is_initialized)

    def get_max_length(self) -> int:
        return -1


def state_in(cache: Cache | None, owner: str, n_rows: int) -> Tensor | None:
    """The last state that a guardrail left in a cache, [B, C]; None if nothing has been seen yet.

    Raises:
        DsgError: The cache holds tokens that this guardrail has not seen: it would decide about half a sequence.
    """
    if cache is None:
        return None
    layer = _layer(cache, owner)
    if layer is None:
        if int(cache.get_seq_length()) > 0:
            raise DsgError(
                "This cache holds tokens that the guardrail has not seen.", "Fill it inside the same guarded block."
            )
        return None
    if isinstance(layer, GrowingState):
        n_seen = layer.get_seq_length()
        if n_seen != cache.get_seq_length():
            raise DsgError(
                f"The cache holds {cache.get_seq_length()} tokens, of which the guardrail has seen {n_seen}."
            )
        if n_seen == 0:
            return None
    last_BC: Tensor = layer.last()
    if len(last_BC) != n_rows:
        raise DsgError(f"The cache holds {len(last_BC)} sequences, but {n_rows} are continued.")
    return last_BC


def keep_state(cache: Cache, owner: str, states_BLC: Tensor) -> None:
    """Leave the states after the tokens of one call in the cache, once its own layers are there."""
    layer = _layer(cache, owner)
    if layer is None:
        layer = FixedState(owner) if cache.is_compileable else GrowingState(owner)
        cache.layers.append(layer)
    layer.put(states_BLC)


def _layer(cache: Cache, owner: str) -> Any:
    for layer in reversed(cache.layers):
        if getattr(layer, "owner", None) == owner:
            return layer
    return None
