"""Does a guardrail do anything? Asked of text that it should act on, before anybody relies on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsg_cli.fitting import Fitting
from dsg_cli.guardrail import GuardrailModule, guarded
from dsg_cli.model import LoadedModel
from dsg_cli.runtime.sites import decoder_of
from dsg_cli.tokens import TokenBatch, batches


@dataclass(frozen=True)
class Effect:
    """What a guardrail did to some rows."""

    n_rows: int
    gate_rate: float
    """Share of rows that were gated."""
    changed_rate: float
    """Share of rows whose activations after the last guarded layer differ from the unguarded model's in any bit."""
    n_clamped: int
    """Tokens that were clamped."""
    edit: float
    """Largest change of a token's residual, relative to its norm."""


@torch.inference_mode()
def measure_effect(loaded: LoadedModel, guard: GuardrailModule, rows: Sequence[list[int]]) -> Effect:
    """Run rows with and without the guardrail.

    Args:
        loaded: The model it was made for, whole or cut after the layer that it writes to.
        guard: The guardrail.
        rows: Token ids, BOS included; at least one.

    Raises:
        DsgError: A residual is not finite.
    """
    decoder = decoder_of(loaded.model)
    n_gated = n_changed = 0
    before = guard.counters()["n_clamped"]

    def run(batch: TokenBatch) -> Tensor:
        options = {"input_ids": batch.ids_BL, "attention_mask": batch.mask_BL.long(), "use_cache": False}
        return decoder(**options).last_hidden_state.to(batch.ids_BL.device)

    def both(batch: TokenBatch) -> tuple[Tensor, Tensor]:
        plain_BLD = run(batch)
        # That it is the right model has been checked when it was loaded; here it may be cut.
        with guarded(loaded.model, guard, allow_mismatch=True):
            guarded_BLD = run(batch)
        differs_BL = (plain_BLD != guarded_BLD).any(-1) & batch.mask_BL
        return guard.last_gated_B.clone(), differs_BL.any(-1)

    fit = Fitting()
    for whole in batches(rows, loaded.tokenizer, device=str(loaded.model.device)):
        for _, (gated_B, changed_B) in fit(whole, both):
            n_gated += int(gated_B.sum())
            n_changed += int(changed_B.sum())
    counters = guard.counters()
    return Effect(
        n_rows=len(rows),
        gate_rate=n_gated / len(rows),
        changed_rate=n_changed / len(rows),
        n_clamped=int(counters["n_clamped"] - before),
        edit=counters["largest_edit"],
    )
