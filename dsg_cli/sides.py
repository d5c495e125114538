"""What comes of asking two models the same: shared by every way of asking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dsg_cli.artifacts import Json
from dsg_cli.calibration import wilson
from dsg_cli.scorer import Known


@dataclass(frozen=True)
class SideBySide:
    """An evaluation of two models on the same questions."""

    results: dict[str, Json]
    """bench -> side -> metrics"""
    gate: dict[str, Json]
    rows: list[Json]
    """One a question."""
    n_tokens: int
    answers: Known = field(default_factory=dict)
    """Of the base model, for a later evaluation."""
    n_known: int = 0
    """Requests of the base model that an earlier evaluation had answered."""
    found: dict[str, Any] = field(default_factory=dict)
    """lm-eval's own results of each side."""
    question_ids: dict[str, list[str]] = field(default_factory=dict)
    """Questions that the base model knows, of the benches that count only those."""
    asked: dict[str, str] = field(default_factory=dict)
    """Bench on free text -> digest of all that was asked."""
    scores: dict[str, Json] = field(default_factory=dict)
    """Such a bench -> scores of a model that never saw what is forgotten."""
    refused: dict[str, Json] = field(default_factory=dict)
    """Such a bench -> metrics that could not be computed, and why."""


def counts(k: int, n: int, metric: str = "acc") -> Json:
    """How many, and the Wilson interval of the share."""
    low, high = wilson(k, n)
    return {f"{metric}_count": k, f"{metric}_low": low, f"{metric}_high": high}


def gate_rate(rows: Sequence[Json]) -> Json:
    """Share of questions that were gated, their number, and how large a change that made.

    `edit` is the mean over gated questions of the largest change of a token's residual, relative to its norm.
    """
    edits = [row["edit"] for row in rows if row["gated"]]
    return {"rate": len(edits) / len(rows), "n": len(rows), "edit": sum(edits) / len(edits) if edits else 0.0}
