"""Settings of clamps that have the right type and still make no sense. No torch here."""

from __future__ import annotations

from dsg_cli.methods.settings import ConditionalClamp, MethodsSection, RefusalClamp, StaticClamp
from dsg_cli.strength import LARGEST_STRENGTH, strength_of

Check = tuple[bool, str]
"""Whether a setting is fine, and what is wrong with it if it is not."""


def checks(section: MethodsSection) -> tuple[Check, ...]:
    """Whether each setting is fine, and what to say if it is not."""
    static, conditional, refusal = section.static_clamp, section.conditional_clamp, section.refusal_clamp
    latent = refusal.refusal_feature
    return (
        *_selection("methods.static_clamp", static),
        *_selection("methods.conditional_clamp", conditional),
        *_selection("methods.refusal_clamp", refusal),
        _above("methods.conditional_clamp", conditional.above),
        _above("methods.refusal_clamp", refusal.above),
        _strength("methods.static_clamp.strength", static.strength),
        _strength("methods.conditional_clamp.strength", conditional.strength),
        _strength("methods.refusal_clamp.coefficient", refusal.coefficient),
        (latent is None or latent >= 0, f"methods.refusal_clamp.refusal_feature is {latent}; it must be at least 0."),
    )


def _selection(section: str, settings: StaticClamp | ConditionalClamp | RefusalClamp) -> tuple[Check, ...]:
    n_features, largest = settings.n_features, settings.max_retain_rate
    return (
        (n_features >= 1, f"{section}.n_features is {n_features}; take at least 1."),
        (0 <= largest <= 1, f"{section}.max_retain_rate is {largest:g}; it must lie between 0 and 1."),
    )


def _above(section: str, above: float) -> Check:
    words = f"{section}.above is {above:g}; it must be an activation: at least 0, below {LARGEST_STRENGTH:g}."
    return 0 <= above < LARGEST_STRENGTH, words


def _strength(name: str, text: str) -> Check:
    words = f"{name} is {text[:200]!r}; give a positive number, or a multiple of the median residual norm such as 2r."
    return strength_of(text, 1.0) is not None, words
