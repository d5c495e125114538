"""Statistics to the features that carry the knowledge (arXiv 2504.08192), and the roles of those in a guardrail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsg_cli.errors import DsgError
from dsg_cli.guardrail.runtime.gates import DETECTING_FORMS
from dsg_cli.models.sae_slice import slice_columns
from dsg_cli.workspace.artifacts import Feature, FeatureSet, Guardrail

LIVE_AT_LEAST = 0.05  # Share of live features below which percentiles are taken over those alone.
FORGET_PERCENTILE = 5.0
EPSILON = 1e-21
FORMATTING_RATE = 0.05
FORMATTING_RATIO = 10.0
SHOWN = 20  # Features in a note, at most.


@dataclass(frozen=True)
class Selection:
    """The chosen features and how the choice was cut."""

    features: list[Feature]
    ratio_cut: float | None
    forget_cut: float | None
    percentiles_over: str | None
    n_live: int
    n_passed: int
    notes: tuple[str, ...] = ()  # What a person should know of the choice.


def select_features(forget_F: Tensor, retain_F: Tensor, *, n_features: int, ratio_percentile: float) -> Selection:
    """Choose features that matter to the forget corpus and, in proportion, not to the retain corpus.

    `ratio_j = forget_j / (retain_j + 1e-21)`; keep features with `forget_j` at or above its 5th percentile and
    `ratio_j` at or above its `ratio_percentile`-th; of those the `n_features` with the largest `forget_j`.
    Percentiles are taken over all F features; where the SAE is nearly dead (fewer than 5 % of its features are active
    on a token of either corpus), or the ratio's cut would be 0, over those that are live.

    Scores are those of each feature on the forget and the retain corpus, [F]; `ratio_percentile` is p_ratio of the
    paper.
    """
    forget_F, retain_F = forget_F.double(), retain_F.double()
    if n_features > len(forget_F):
        raise DsgError(f"{n_features} features were asked for, but the SAE has {len(forget_F)}.")
    ratio_F = forget_F / (retain_F + EPSILON)
    live_F = (forget_F > 0) | (retain_F > 0)
    if not (forget_F > 0).any():
        hint = "Check that the SAE belongs to the model."
        raise DsgError("No feature of the SAE is active on the forget corpus.", hint)
    over, percentiles_over = torch.ones_like(live_F), "all"
    if live_F.double().mean() < LIVE_AT_LEAST or torch.quantile(ratio_F, ratio_percentile / 100) == 0:
        over, percentiles_over = live_F, "live"
    ratio_cut = torch.quantile(ratio_F[over], ratio_percentile / 100)
    forget_cut = torch.quantile(forget_F[over], FORGET_PERCENTILE / 100)
    passed_F = (forget_F >= forget_cut) & (ratio_F >= ratio_cut) & (forget_F > 0)
    n_passed = int(passed_F.sum())
    if n_passed < n_features:
        none = "No feature passes" if n_passed == 0 else f"Only {n_passed} features pass"
        raise DsgError(
            f"{none} the filter at ratio percentile {ratio_percentile:g}, but {n_features} were asked for.",
            "Lower --ratio-percentile, take fewer with -n, or give more forget text.",
        )
    ranked = torch.argsort(torch.where(passed_F, forget_F, -torch.inf), descending=True, stable=True)[:n_features]
    features = [
        Feature(index=j, forget_score=float(forget_F[j]), retain_score=float(retain_F[j]), ratio=float(ratio_F[j]))
        for j in ranked.tolist()
    ]
    return Selection(
        features=features,
        ratio_cut=float(ratio_cut),
        forget_cut=float(forget_cut),
        percentiles_over=percentiles_over,
        n_live=int(live_F.sum()),
        n_passed=n_passed,
    )


def picked_features(
    ranking: Sequence[int],
    forget_F: Tensor | None,
    retain_F: Tensor,
    retain_rate_F: Tensor,
    *,
    n_features: int | None,
    max_retain_rate: float | None,
) -> Selection:
    """The first features of a ranking that was made without any text, by descriptions or by hand.

    Scores are [F]; `ranking` holds indices, the best first. Features that are active on more than `max_retain_rate` of
    retain tokens are dropped, or only named where all are taken (`n_features` None).
    """
    limit = 1.0 if max_retain_rate is None else max_retain_rate
    frequent = [j for j in ranking if retain_rate_F[j] > limit]
    candidates = [j for j in ranking if n_features is None or retain_rate_F[j] <= limit]
    if not candidates:
        raise DsgError(
            f"All {len(ranking)} features that match are active on more than {limit:g} of retain tokens.",
            "Raise select.max_retain_rate (--set), or describe in other words.",
        )
    taken = candidates[:n_features]
    live_F = retain_F > 0 if forget_F is None else (retain_F > 0) | (forget_F > 0)
    features = []
    for j in taken:
        forget, retain = None if forget_F is None else float(forget_F[j]), float(retain_F[j])
        ratio = None if forget is None else forget / (retain + EPSILON)
        features.append(Feature(index=j, forget_score=forget, retain_score=retain, ratio=ratio))
    notes = []
    # Of those dropped only the ones that would have been taken are worth a word.
    place = {j: number for number, j in enumerate(ranking)}
    passed_over = [j for j in frequent if n_features is None or place[j] < place[taken[-1]]]
    if passed_over:
        which = ", ".join(map(str, passed_over[:SHOWN])) + (", ..." if len(passed_over) > SHOWN else "")
        what = "Taken as named, though" if n_features is None else "Dropped, because"
        notes.append(f"{what} active on more than {limit:g} of retain tokens: {which}.")
    if n_features is not None and len(taken) < n_features:
        notes.append(f"Only {len(taken)} of the {n_features} features that were asked for match and are left.")
    return Selection(
        features=features,
        ratio_cut=None,
        forget_cut=None,
        percentiles_over=None,
        n_live=int(live_F.sum()),
        n_passed=len(candidates),
        notes=tuple(notes),
    )


def scores_of(score: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Forget and retain score of every feature, each [F], from the statistics beside a features artifact."""
    check_measured(tensors)
    return score_of(score, tensors, "forget"), score_of(score, tensors, "retain")


def score_of(score: str, tensors: Mapping[str, Tensor], role: str) -> Tensor:
    """Score of every feature on the forget or on the retain corpus, [F]."""
    return tensors[f"{role}_mean_square"] if score == "mean-square" else tensors[f"{role}_mean"].square()


def check_measured(tensors: Mapping[str, Tensor]) -> None:
    """Refuse statistics without those of forget text."""
    if not any(name.startswith("forget_") for name in tensors):
        raise DsgError(
            "These features were picked without forget text, so nothing says how active any feature is on it.",
            "Select with --forget CORPUS.",
        )


def formatting_notes(chat_F: Tensor, plain_F: Tensor, indices: Sequence[int]) -> list[str]:
    """A note on each selected feature that tells chat text from plain text, not what the text is about.

    On plain retain text alone such a feature looks exclusive to a forget corpus that is formatted; it then blocks every
    formatted prompt. Seen where retain text of both forms is given: active on a twentieth of the tokens of the one and
    ten times as often as on the other.

    Rates are shares of tokens of chat-formatted and of plain retain text on which each feature is active, [F].
    """
    return [
        f"Feature {j} looks like formatting: it is active on {float(chat_F[j]):.1%} of the tokens of chat-formatted "
        f"retain text and on {float(plain_F[j]):.1%} of plain retain text. Prompts in that format may be blocked."
        for j in indices
        if chat_F[j] >= FORMATTING_RATE and chat_F[j] >= FORMATTING_RATIO * plain_F[j]
    ]


@dataclass(frozen=True)
class SelectedFeature:
    """One feature of an SAE."""

    index: int
    roles: list[str]  # `clamped`, `watched`; empty where it was not chosen at all.
    weight: float | None = None  # In the gate's token score, if it has one there.


def selected_features(body: Guardrail | FeatureSet, detect_K: Tensor | None = None) -> list[SelectedFeature]:
    """What a guardrail clamps, then what its gate only watches; or what a selection would.

    `detect_K` are weights of a guardrail's columns in the gate's token score.
    """
    weights: dict[int, float] = {}
    if isinstance(body, FeatureSet):
        weights = {int(feature["index"]): float(feature["weight"]) for feature in body.probe.get("features", [])}
        clamped, watched = [feature.index for feature in body.features], list(weights)
    else:
        clamped, watched = body.indices, body.detectors or body.indices
        if body.gate in DETECTING_FORMS and detect_K is not None:
            weights = dict(zip(slice_columns(body.indices, body.detectors), detect_K.tolist(), strict=True))
    sides = (("clamped", clamped), ("watched", watched))
    return [
        SelectedFeature(
            index,
            roles=[role for role, indices in sides if index in indices],
            weight=weights.get(index) if index in watched else None,
        )
        for index in slice_columns(clamped, watched)
    ]
