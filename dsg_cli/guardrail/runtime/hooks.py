"""How guardrails are put on a model, and taken off again."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from .errors import DsgError
from .guardrail import GuardrailModule, TokenDecisions
from .sites import HookSite, decoder_of, edit_site, find_module

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
    real_BL: Tensor  # False for padding.
    segment_BL: Tensor | None  # Where rows hold several sequences: which of them each token belongs to.
    cache: Cache | None  # What the call continues; None or empty at the beginning of a sequence.

    def counted_BL(self, special: Tensor) -> Tensor:
        return self.real_BL & ~torch.isin(self.ids_BL, special.to(self.ids_BL.device))


def read_call(config: Any, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Read the arguments that a decoder was called with.

    `names` are those of the arguments of its forward, by which arguments that come by position are known.
    """
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    ids_BL, cache, mask = (arguments.get(name) for name in ("input_ids", "past_key_values", "attention_mask"))
    if any(arguments.get(name) is not None for name in PAGED) or "paged" in str(config._attn_implementation):
        raise DsgError(
            "Continuous batching lays many sequences into one row, where a guardrail cannot tell them apart.",
            "Serve without continuous batching.",
        )
    if ids_BL is None:
        raise DsgError("A guardrail needs token ids; this call holds embeddings.", "Pass input_ids.")
    if cache is not None and not isinstance(cache, Cache):
        raise DsgError(f"past_key_values is a {type(cache).__name__}, not a Cache of transformers.")
    real_BL = _real_tokens(mask, ids_BL, cache)
    position_ids, use_cache = arguments.get("position_ids"), arguments.get("use_cache")
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
        reason = f"A guardrail cannot read a {type(mask).__name__} as attention mask."
        raise DsgError(reason, "Pass one of two dimensions.")
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


DummyLayer: Any = getattr(cache_utils, "DummyLayer", object)
"""Marks a layer that no attention looks at: hybrid models would take it for their first full attention layer."""


class GrowingState(DynamicLayer):
    """States after every token, as `keys` [B, 1, L, C]; `values` is empty."""

    def __init__(self, owner: str) -> None:
        super().__init__()
        self.owner = owner  # The guardrail's key.

    def put(self, states_BLC: Tensor) -> None:
        self.update(states_BLC[:, None], states_BLC.new_empty(states_BLC.shape[0], 1, states_BLC.shape[1], 0))

    def last(self) -> Tensor:
        """The state after the last token, [B, C]; so in `FixedState`."""
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
    """The last state that a guardrail left in a cache, [B, C]; None if nothing has been seen yet."""
    if cache is None:
        return None
    layer = _layer(cache, owner)
    if layer is None:
        if int(cache.get_seq_length()) > 0:
            hint = "Fill it inside the same guarded block."
            raise DsgError("This cache holds tokens that the guardrail has not seen.", hint)
        return None
    if isinstance(layer, GrowingState):
        n_seen, n_held = layer.get_seq_length(), cache.get_seq_length()
        if n_seen != n_held:
            raise DsgError(f"The cache holds {n_held} tokens, of which the guardrail has seen {n_seen}.")
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
    return next((layer for layer in reversed(cache.layers) if getattr(layer, "owner", None) == owner), None)


@dataclass
class Running:
    """What is known of a call while it runs."""

    call: Call
    states: list[Tensor | None]
    decisions: dict[int, TokenDecisions]
    edited: set[int]  # Guardrails whose edit has been made.


class Attached:
    """Guardrails on a model. Those that read at one site all read it as it was before any of them changed it."""

    def __init__(self, model: nn.Module, guardrails: Sequence[GuardrailModule]) -> None:
        self.guardrails = list(guardrails)
        self.decoder = decoder_of(model)
        self.config: Any = self.decoder.config
        self.names = tuple(inspect.signature(self.decoder.forward).parameters)
        self.running: dict[int, Running] = {}  # The call that each thread is in: several may use one model at once.
        if "past_key_values" not in self.names:
            raise DsgError(
                f"{type(self.decoder).__name__} keeps its cache elsewhere than in past_key_values, where a guardrail "
                "cannot follow it.",
                "Recurrent models such as Mamba are not supported.",
            )
        self.handles: list[Any] = []
        if len({guard.key for guard in guardrails}) < len(guardrails):
            raise DsgError("One guardrail was named twice.")
        sites = list(dict.fromkeys(site for guard in guardrails for site in (guard.read, guard.write)))
        for site in sites:
            find_module(model, site)  # All of them, before the first hook.
        self.handles.append(self.decoder.register_forward_pre_hook(self._begin, with_kwargs=True))
        self.handles += [edit_site(model, site, functools.partial(self._at, site)) for site in sites]
        self.handles.append(self.decoder.register_forward_hook(self._end))
        forget_compiled()

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        forget_compiled()

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = read_call(self.config, self.names, args, kwargs)
        for guard in self.guardrails:
            if not guard.gate.is_causal and call.cache is not None and int(call.cache.get_seq_length()) > 0:
                raise DsgError(
                    "The gate `mean` needs the token ids of whole sequences; this call continues a cached one.",
                    "To generate text, calibrate with --gate window.",
                )
        # Read now: once the first layer has run, the cache no longer tells what came before this call.
        states = [
            state_in(call.cache, guard.key, len(call.ids_BL)) if guard.gate.is_causal else None
            for guard in self.guardrails
        ]
        self.running[_thread()] = Running(call, states, {}, set())

    def _at(self, site: HookSite, resid: Tensor) -> Tensor:
        """The residual that goes on from a site."""
        running = self.running.get(_thread())
        if running is None:
            raise DsgError("A layer of a guarded model was called by itself.", "Call the model.")
        # In float32, whatever the model's own operations are cast to.
        with torch.autocast(resid.device.type, enabled=False):
            return self._edited(site, resid, running)

    def _edited(self, site: HookSite, resid: Tensor, running: Running) -> Tensor:
        call = running.call
        for i, guard in enumerate(self.guardrails):
            if guard.read == site:
                if guard.detect.device != resid.device:
                    guard.to(resid.device)
                counted_BL = call.counted_BL(guard.special).to(resid.device)
                running.decisions[i] = guard.decide(resid, counted_BL, running.states[i], call.segment_BL)
        for i, guard in enumerate(self.guardrails):
            if guard.write == site and i in running.decisions:
                resid = guard.edit(resid, running.decisions[i])
                running.edited.add(i)
        return resid

    def _end(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        running = self.running.pop(_thread())
        if len(running.edited) < len(self.guardrails):
            raise DsgError(
                "A layer that a guardrail watches did not run, so nothing guarded this call.",
                "Layers were replaced, pruned or skipped; put the guardrail on again.",
            )
        call = running.call
        cache = call.cache if call.cache is not None else getattr(output, "past_key_values", None)
        for i, guard in enumerate(self.guardrails):
            if cache is not None and guard.gate.is_causal:
                keep_state(cache, guard.key, running.decisions[i].states_BLC)


def _thread() -> int:
    """Which thread this is; a compiled graph belongs to the one that runs it."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def forget_compiled() -> None:
    """Drop compiled graphs: one that was traced without these hooks would go on without them."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
