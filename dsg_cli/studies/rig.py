"""What every study begins with: ways to guardrails, questions and text, each of which computes nothing twice.

A study is a module of this package with one function, `rows_of(point, rig) -> rows`, whose rows are those of one point
of its grid (rows.py); it may have another, `prepare(points, rig)`, for what serves all points together. The stage makes
the rig: studies know nothing of recipes and workspaces.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsg_cli.artifacts import Json
from dsg_cli.corpora import Corpus
from dsg_cli.pieces import Piece
from dsg_cli.studies.asking import Asker
from dsg_cli.studies.guards import Guard, Guards, Wanted
from dsg_cli.studies.rows import accuracy_rows, rate_row, row_of


@dataclass(frozen=True)
class Rig:
    """All that a study measures with."""

    wanted: Wanted
    """The recipe's own settings, for what a grid does not vary."""
    guards_at: Callable[[Mapping[str, Any]], Guards]
    """Guardrails where a recipe has these values at dotted keys."""
    guards_on: Callable[[Sequence[Corpus]], Guards]
    """Guardrails made with other forget text."""
    asker: Callable[[Guards], Asker]
    """Questions that begin as the text did on which they were made."""
    pieces: Callable[[str, int, bool], list[Piece]]
    """Pieces of so many tokens: of `calibrate` or `fresh` retain text or of `forget` text; packed, or each from one
    document."""
    forget: Sequence[Corpus]
    retain: Sequence[str]
    """Retain corpora by name, with weights."""
    names: Sequence[str]
    """Entities that forget text is about; empty where none are known."""
    requests: Sequence[str]
    """Corpora that are to be forgotten one after another, the first one first."""
    forget_bench: str
    repeats: int
    seed: int


def guarded_rows(point: Json, rig: Rig, guards: Guards) -> list[Json]:
    """The guardrail of a point on every bench, its threshold and its false positives.

    Raises:
        DsgError: It cannot be made.
    """
    guard = guards.make(rig.wanted.at(point))
    return [*accuracy_rows(point, rig.asker(guards).under([guard])), *gate_rows(point, guard)]


def gate_rows(point: Json, guard: Guard) -> list[Json]:
    """What is known of a gate from retain text."""
    return [
        rate_row(point, "false_positive_rate", guard.n_false, guard.n_fresh),
        row_of(point, "threshold", value=guard.threshold),
    ]
