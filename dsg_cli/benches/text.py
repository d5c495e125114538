"""Benches whose answers are free text or the likelihood of given text: what all of them have in common.

Each is a list of items that a model writes or reads, and a few functions that make metrics of what came of them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from dsg_cli.artifacts import Json


@dataclass(frozen=True)
class Item:
    """One thing that is asked of a model: to write on from a context, or to read a text after it."""

    id: str
    part: str
    """Of the bench, such as `knowmem_forget`."""
    context: str
    target: str
    """What should be written, or what is read."""
    role: str = ""
    """What it is within its question, where a question has several items."""
    n_new: int = 0
    """Tokens to write at most; 0 reads the target."""
    stop: tuple[str, ...] = ()
    """What is written ends before the first of these."""
    is_free: bool = False
    """Whether what is written is judged as language, too."""
    is_forget: bool = False
    """Whether it asks for what should be forgotten: a guardrail's gate should open."""


Found = Mapping[str, Sequence[tuple[Item, Json]]]
"""Part -> its items with what came of each (text_evaluation.py), of one side."""


class TextBench(Protocol):
    """A bench."""

    @property
    def name(self) -> str: ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what it measures."""
        ...

    @property
    def relative(self) -> tuple[str, ...]:
        """Those of them that need a model that never saw what is to be forgotten."""
        ...

    def items(self) -> Sequence[Item]: ...

    def measured(self, found: Found) -> Json:
        """Metrics of one side, with intervals where there are any."""
        ...

    def scores(self, found: Found) -> Json:
        """What later evaluations need of a model that never saw what is to be forgotten."""
        ...

    def relative_to(self, found: Found, scores: Json) -> Json:
        """Metrics of one side that need such scores."""
        ...


def digest_of(items: Sequence[Item], how: str) -> str:
    """Of everything that is asked, and of how it is."""
    content = json.dumps([how, *(asdict(item) for item in items)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def mean_of(name: str, values: Sequence[float], *, factor: float = 1.0) -> Json:
    """`{name, name_low, name_high}`: the mean and its 95 % interval by the normal approximation."""
    n = len(values)
    mean = sum(values) / n
    variance = sum((value - mean) ** 2 for value in values) / (n - 1) if n > 1 else math.nan
    half = 1.96 * math.sqrt(variance / n) if n > 1 else 0.0
    return {
        name: factor * mean,
        f"{name}_low": factor * (mean - half),
        f"{name}_high": factor * (mean + half),
    }
