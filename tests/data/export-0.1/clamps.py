"""Which tokens are hot, and to what their clamped features are set.

The rule of dynamic guardrails: a token is hot if any clamped feature is active, and on it all are set to -c. A spec can
say otherwise, and rivals are such specs: a feature makes a token hot only above an activation of its own, or although
it is not clamped, or never although it is; each feature is set where it exceeds that activation, or all of them
wherever one does; each to a value of its own.

Shape suffixes: B batch, L position, K features that are watched, C of them that are clamped, which come first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .errors import DsgError
from .spec import NEVER, GuardrailSpec

RULES = ("all", "each")


class Clamp(nn.Module):
    """The rule of one guardrail. What it is was decided when it was made: no branch depends on a tensor's values."""

    chosen: Tensor
    """1 for features that can make a token hot, 0 for others, [K]."""
    above: Tensor
    """[K]; only where the spec has it or clamps each feature by itself."""
    target: Tensor
    """[C]; only where the spec has coefficients."""

    def __init__(
        self, spec: GuardrailSpec, n_clamped: int, n_watched: int, device: torch.device, *, is_signed: bool
    ) -> None:
        super().__init__()
        self.is_signed, self.is_each = is_signed, spec.clamp == "each"
        self.n_clamped, self.target_of_all = n_clamped, -spec.strength
        self.has_above, self.has_target = bool(spec.above) or self.is_each, bool(spec.coefficients)
        above = spec.above or [0.0] * n_clamped + [NEVER] * (n_watched - n_clamped)
        self.register_buffer("chosen", torch.tensor([float(one < NEVER) for one in above], device=device), False)
        if self.has_above:
            self.register_buffer("above", torch.tensor(above, dtype=torch.float32, device=device), False)
        if self.has_target:
            self.register_buffer("target", torch.tensor(spec.coefficients, dtype=torch.float32, device=device), False)

    def strength(self, acts: Tensor) -> Tensor:
        """How strongly features are active, which for an `abstopk` SAE has no sign."""
        return acts.abs() if self.is_signed else acts

    def hot(self, strength_BLK: Tensor) -> Tensor:
        """Whether a token is hot, [B, L]."""
        if self.has_above:
            return (strength_BLK > self.above).any(-1)
        return strength_BLK @ self.chosen > 0

    def change(self, acts_BLC: Tensor) -> Tensor:
        """What is added to the clamped features of a token, if it is hot."""
        change_BLC = (self.target if self.has_target else self.target_of_all) - acts_BLC
        if self.is_each:
            is_over_BLC = self.strength(acts_BLC) > self.above[: self.n_clamped]
            change_BLC = torch.where(is_over_BLC, change_BLC, 0.0)
        return change_BLC


def check_clamp(spec: GuardrailSpec, n_clamped: int, n_watched: int, where: str) -> None:
    """Refuse a rule that does not fit the features, or whose numbers float32 does not hold.

    Raises:
        DsgError: It is one.
    """
    numbers = [spec.strength, *spec.coefficients, *spec.above]
    are_numbers = all(math.isfinite(one) and abs(one) <= NEVER for one in numbers)
    fits = len(spec.coefficients) in (0, n_clamped) and len(spec.above) in (0, n_watched)
    if spec.clamp not in RULES or not fits or not are_numbers or any(one < 0 for one in spec.above):
        raise DsgError(f"{where}: how it clamps does not fit its features.", "Make the guardrail again with dsg apply.")
