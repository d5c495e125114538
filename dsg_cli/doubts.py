"""What speaks against a feature: that it follows the form of a text, or what the forgotten domain shares with others.

The rules are simple, and say so; none of them is a proof.

- *Formatting*: at least half of its strongest contexts (those that reach half of its largest activation) peak on a
  token without a letter (punctuation, digits, white space), or on a token of the chat template; or it is active on
  more than a fifth of the tokens of what is retained, near text included; or on chat-formatted retain text far more
  often than on plain (`selection.formatting_notes`).
- *Shared*: on a near corpus it is active at least half as often as on what is to be forgotten. A gate may watch a
  feature with a negative weight in order to stay shut there; of those it is not said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MANY_PEAKS = 0.5
FEW_CONTEXTS = 4
"""With fewer nothing is said about where contexts peak."""
COMMON_RATE = 0.2
SHARED_RATIO = 0.5


@dataclass(frozen=True)
class Evidence:
    """What is known of one feature."""

    forget_rate: float | None
    """Share of the tokens of all forget corpora on which it is active; None where there are none."""
    near_rates: Mapping[str, float]
    """The same of each near corpus."""
    kept_rate: float
    """The same of all that is not to be forgotten."""
    peaks: Sequence[str]
    """Texts of the tokens on which its strongest contexts peak."""
    template_peaks: int
    """How many of those are of the chat template."""
    weight: float | None
    """In the gate's token score."""


def doubts(evidence: Evidence) -> list[str]:
    """One sentence a doubt."""
    return [*_formatting(evidence), *_shared(evidence)]


def is_bare(text: str) -> bool:
    """Whether a token holds no letter; one that is a part of a character may be a part of a letter."""
    return "\ufffd" not in text and not any(character.isalpha() for character in text)


def _formatting(evidence: Evidence) -> list[str]:
    n, found = len(evidence.peaks), []
    n_bare = sum(map(is_bare, evidence.peaks))
    if n >= FEW_CONTEXTS and evidence.template_peaks >= MANY_PEAKS * n:
        found.append(
            f"looks like formatting: {evidence.template_peaks} of its {n} strongest contexts peak in the chat template"
        )
    elif n >= FEW_CONTEXTS and n_bare >= MANY_PEAKS * n:
        found.append(f"looks like formatting: {n_bare} of its {n} strongest contexts peak on a token without a letter")
    if evidence.kept_rate > COMMON_RATE:
        found.append(f"looks like formatting: active on {evidence.kept_rate:.1%} of the tokens of what is retained")
    return found


def _shared(evidence: Evidence) -> list[str]:
    if evidence.forget_rate is None or (evidence.weight is not None and evidence.weight < 0):
        return []
    return [
        f"shared with {name}: active on {rate:.1%} of its tokens, and on {evidence.forget_rate:.1%} of what is to be "
        "forgotten"
        for name, rate in evidence.near_rates.items()
        if rate > 0 and rate >= SHARED_RATIO * evidence.forget_rate
    ]
