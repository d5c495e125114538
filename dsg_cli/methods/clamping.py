"""What the methods that clamp features without a gate have in common: which features, set to what, and where.

Each makes a `Clamping` from the statistics of select; stages/clamp.py makes a guardrail of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dsg_cli.errors import DsgError
from dsg_cli.runtime.spec import NEVER
from dsg_cli.selection import check_measured
from dsg_cli.strength import parse_strength


@dataclass(frozen=True)
class Clamping:
    """What is clamped to what, and where; the fields of an artifacts.Guardrail of these names."""

    indices: list[int]
    """Features that are clamped."""
    detectors: list[int]
    """Features that are only watched."""
    coefficients: list[float]
    """What each clamped feature is set to."""
    above: list[float]
    """Of each feature, the clamped ones first, the activation above which a token is hot."""
    clamp: Literal["all", "each"]
    setting: str
    """The coefficients as a person gave them."""
    notes: tuple[str, ...] = ()
    """What a person should know of the choice."""


def frequent_features(
    statistics: Mapping[str, Tensor], *, n_features: int, max_retain_rate: float, section: str
) -> list[int]:
    """The features most often active on forget text among those seldom active on retain text, best first.

    Args:
        statistics: `forget_rate` and `retain_rate` of select, [F]: shares of tokens on which a feature is active.
        n_features: How many.
        max_retain_rate: Features active on a larger share of retain tokens are dropped.
        section: Of the settings, for messages.

    Raises:
        DsgError: There are fewer that are active on forget text at all, or no forget text was read.
    """
    check_measured(statistics)
    forget_F, retain_F = statistics["forget_rate"], statistics["retain_rate"]
    is_left_F = (retain_F <= max_retain_rate) & (forget_F > 0)
    n_left = int(is_left_F.sum())
    if n_left < n_features:
        raise DsgError(
            f"{n_left or 'No'} feature{'s are' if n_left != 1 else ' is'} active on forget text and on at most "
            f"{max_retain_rate:g} of retain tokens; {n_features} were asked for.",
            f"Raise methods.{section}.max_retain_rate, or lower methods.{section}.n_features (--set).",
        )
    ranked = forget_F.where(is_left_F, -1.0).sort(descending=True, stable=True).indices
    return [int(j) for j in ranked[:n_features]]


def coefficient_of(text: str, median_residual_norm: float, *, key: str) -> float:
    """A coefficient from a setting, as a positive number.

    Raises:
        DsgError: It is none.
    """
    hint = f"Set methods.{key} to a number such as 300, or a multiple of the median residual norm such as 4r."
    return parse_strength(text, median_residual_norm, hint=hint)


def refusing(
    selected: Sequence[int],
    above: Sequence[float],
    refusal: int,
    coefficient: float,
    *,
    clamps_features: bool,
    setting: str,
    notes: tuple[str, ...] = (),
) -> Clamping:
    """Wherever any selected feature exceeds its `above`, the refusal feature is set to the coefficient.

    Args:
        selected: Features that are watched.
        above: Of each of them.
        refusal: The refusal feature; how active it is itself makes no token hot.
        coefficient: What it is set to.
        clamps_features: Set the selected features to minus that, too.
        setting: The coefficient as a person gave it.
        notes: What a person should know.

    Raises:
        DsgError: The refusal feature is one of the selected.
    """
    if refusal in selected:
        raise DsgError(
            f"The refusal feature {refusal} is one of those whose activity calls for it.",
            "Name another with methods.refusal_clamp.refusal_feature, or fewer features with n_features (--set).",
        )
    also = list(selected) if clamps_features else []
    return Clamping(
        indices=[refusal, *also],
        detectors=[] if clamps_features else list(selected),
        coefficients=[coefficient, *(-coefficient for _ in also)],
        above=[NEVER, *above],
        clamp="all",
        setting=setting,
        notes=notes,
    )
