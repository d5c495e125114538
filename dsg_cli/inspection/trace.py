"""What features and a gate see of one text, token by token, and where the guardrail acts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsg_cli.data.tokens import counted_tokens, special_ids, token_texts
from dsg_cli.errors import DsgError
from dsg_cli.guardrail.runtime.gates import latched_at
from dsg_cli.guardrail.runtime.guardrail import GuardrailModule
from dsg_cli.guardrail.runtime.sites import HookSite
from dsg_cli.guardrail.selection import SelectedFeature
from dsg_cli.models.language_model import LoadedModel
from dsg_cli.models.residuals import read_residual
from dsg_cli.workspace.body import Json


@dataclass(frozen=True)
class GateSteps:
    """What a gate makes of each token. Every list is as long as the text."""

    form: str
    threshold: float
    window: int
    score: list[float]
    """The token score that the gate gathers; 0 on tokens that do not count."""
    floor: float
    """The score of a token on which no feature is active."""
    statistic: list[float | None]
    """After each token; that of the whole text, for a gate that needs it whole. None where it counts as infinite."""
    gated: list[bool]
    latched_at: int | None
    """The first token at which it was open; None if it stayed closed, or needs the whole text."""
    clamped: list[bool]
    """Whether the token's residual was changed."""
    edit: list[float]
    """By how much, relative to the residual's norm."""


@dataclass(frozen=True)
class Trace:
    """One text under a guardrail, or under features alone."""

    tokens: list[str]
    counted: list[bool]
    """False for BOS and other tokens that never enter a statistic."""
    features: list[SelectedFeature]
    activations: list[list[float]]
    """Of each feature on each token; 0 on tokens that do not count."""
    gate: GateSteps | None

    def as_json(self) -> Json:
        """For scripts and pages."""
        features = [
            {**dataclasses.asdict(feature), "activations": acts}
            for feature, acts in zip(self.features, self.activations, strict=True)
        ]
        gate = None if self.gate is None else dataclasses.asdict(self.gate)
        return {"tokens": self.tokens, "counted": self.counted, "features": features, "gate": gate}


@torch.inference_mode()
def trace(
    loaded: LoadedModel,
    ids: Sequence[int],
    *,
    site: HookSite,
    encode: Callable[[Tensor], Tensor],
    features: Sequence[SelectedFeature],
    guard: GuardrailModule | None = None,
) -> Trace:
    """Read a text, given as token ids, up to the hook: nothing above it is run, and the model may be cut there.

    `encode` maps residuals [T, D] at `site`, where the guardrail reads too if there is one, to activations [T, C] of
    the C features.
    """
    ids_BL = torch.tensor([list(ids)], device=loaded.model.device)
    resid_BLD = read_residual(loaded.model, site, ids_BL, torch.ones_like(ids_BL))
    counted_BL = counted_tokens(ids_BL, None, special_ids(loaded.tokenizer))
    acts_LC = encode(resid_BLD[0].float()) * counted_BL[0, :, None]
    if not bool(torch.isfinite(resid_BLD).all() & torch.isfinite(acts_LC).all()):
        hint = "Check the model's weights, or run it in float32."
        raise DsgError(f"The residual at {site.name} is not finite.", hint)
    return Trace(
        tokens=token_texts(loaded.tokenizer, ids),
        counted=counted_BL[0].tolist(),
        features=list(features),
        activations=acts_LC.T.tolist(),
        gate=None if guard is None else _gate_steps(guard, resid_BLD, counted_BL),
    )


def _gate_steps(guard: GuardrailModule, resid_BLD: Tensor, counted_BL: Tensor) -> GateSteps:
    guard.to(resid_BLD.device)
    watched, decision = guard.watch(resid_BLD, counted_BL), guard.decide(resid_BLD, counted_BL)
    return GateSteps(
        form=guard.gate.form,
        threshold=guard.gate.threshold,
        window=guard.gate.window,
        score=torch.where(counted_BL, watched.signal_BL, 0.0)[0].tolist(),
        floor=float(guard.gate.score(torch.zeros(1, dtype=torch.bool), torch.zeros(1))),
        statistic=[value if math.isfinite(value) else None for value in decision.statistic_BL[0].tolist()],
        gated=decision.gated_BL[0].tolist(),
        latched_at=latched_at(decision.gated_BL[0]) if guard.gate.is_causal else None,
        clamped=(decision.change_BLC != 0).any(-1)[0].tolist(),
        edit=guard.edit_size(resid_BLD, decision)[0].tolist(),
    )


@dataclass(frozen=True)
class Traced:
    """A prompt, and what was seen of it."""

    prompt: str
    inspected: str
    """Id of the guardrail or the features."""
    trace: Trace

    def as_json(self) -> Json:
        """For scripts and pages."""
        return {"prompt": self.prompt, "inspected": self.inspected, **self.trace.as_json()}
