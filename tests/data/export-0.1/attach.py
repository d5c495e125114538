"""How guardrails are put on a model, and taken off again."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .calls import Call, argument_names, read_call
from .errors import DsgError
from .guardrail import Decision, GuardrailModule
from .sites import HookSite, decoder_of, edit_site, find_module
from .state import keep_state, state_in


@dataclass
class Running:
    """What is known of a call while it runs."""

    call: Call
    states: list[Tensor | None]
    decisions: dict[int, Decision]
    edited: set[int]
    """Guardrails whose edit has been made."""


class Attached:
    """Guardrails on a model. Those that read at one site all read it as it was before any of them changed it."""

    def __init__(self, model: nn.Module, guardrails: Sequence[GuardrailModule]) -> None:
        self.guardrails = list(guardrails)
        self.decoder = decoder_of(model)
        self.config: Any = self.decoder.config
        self.names = argument_names(self.decoder)
        self.running: dict[int, Running] = {}
        """The call that each thread is in: several may use one model at once."""
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
        """Take the guardrails off again."""
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
