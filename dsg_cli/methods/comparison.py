"""What makes a comparison of methods fair: as many trials for each, on dev questions, judged by one number.

No torch here. A trial's *forgetting* is how far the accuracy on forget questions fell from that of the base model
towards chance; its *utility* is the accuracy on all other benches relative to that of the base model; its score is the
harmonic mean of the two, so that neither makes up for the other.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsg_cli.artifacts import Json
from dsg_cli.methods.names import METHODS, section_of, teaches

CRITERION = "harmonic mean of forgetting (fall of forget accuracy to chance) and utility (other accuracy over base)"
Values = dict[str, Any]
"""Dotted keys of a recipe, and what they are set to."""


@dataclass(frozen=True)
class CompareSection:
    """Which methods are compared, on what, and how their settings are searched."""

    methods: list[str] = field(default_factory=list)
    """None means all."""
    budget: int = 4
    """Trials of each method, at most, on dev questions."""
    grids: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    """Method -> setting -> values. A key without a dot is one of the method's own; others are keys of a recipe."""
    forget: str | None = None
    """Bench on what is to be forgotten; by default the one named like the first forget corpus."""
    near: list[str] = field(default_factory=list)
    """Benches near it, which must stay answered."""
    other: list[str] = field(default_factory=list)
    """Further benches, which must too."""
    dev: dict[str, str] = field(default_factory=dict)
    """Bench -> another on the same, whose questions settings are searched on; the lab's benches have dev questions."""
    saes: list[str] = field(default_factory=list)
    """Further SAEs on which methods that need one are run, with the settings that were chosen on the first."""
    relearn_steps: list[int] = field(default_factory=lambda: [0, 10, 20, 40])
    """Of the attack by relearning; empty leaves it out."""
    relearn_learning_rate: float = 3e-4
    sequence: list[str] = field(default_factory=list)
    """Corpora that are to be forgotten after the first, one request after another; each has a bench of its name."""


def compared(section: CompareSection) -> list[str]:
    """The methods that are meant, each once, in their order."""
    return [name for name in METHODS if not teaches(name) and (not section.methods or name in section.methods)]


def checks(section: CompareSection) -> tuple[tuple[bool, str], ...]:
    """What has the right type and still makes no sense."""
    unknown = [name for name in (*section.methods, *section.grids) if name not in METHODS]
    teaching = [name for name in (*section.methods, *section.grids) if teaches(name)]
    steps = section.relearn_steps
    return (
        (section.budget >= 1, f"compare.budget is {section.budget}; give each method at least 1 trial."),
        (not unknown, f"compare names no method {unknown[0] if unknown else ''}; dsg ls methods lists them."),
        (not teaching, f"compare names {teaching[0] if teaching else ''}, which teaches and is compared with nothing."),
        (
            not steps or (steps[0] == 0 and sorted(set(steps)) == steps),
            f"compare.relearn_steps is {steps}; give ascending whole numbers that begin with 0, or none.",
        ),
        (
            0 < section.relearn_learning_rate < 1,
            f"compare.relearn_learning_rate is {section.relearn_learning_rate:g}; it must lie between 0 and 1.",
        ),
        (
            all(values for grid in section.grids.values() for values in grid.values()),
            "compare.grids: a setting has no value.",
        ),
    )


def trials_of(method: str, section: CompareSection, seed: int) -> list[Values]:
    """The settings that are tried: the whole grid, or as many points of it, drawn with the seed, as the budget has."""
    grid = section.grids.get(method, {})
    keys = [key if "." in key else f"methods.{section_of(method)}.{key}" for key in grid]
    points = [dict(zip(keys, values, strict=True)) for values in itertools.product(*grid.values())]
    if len(points) <= section.budget:
        return points
    drawn = random.Random(f"{seed}/{method}").sample(range(len(points)), section.budget)
    return [points[i] for i in sorted(drawn)]


def judged(forget: str, found: Mapping[str, float], base: Mapping[str, float], chance: float) -> Json:
    """`{forgetting, utility, score}` of accuracies by bench.

    Args:
        forget: The bench on what is to be forgotten.
        found: Accuracies of the unlearned model.
        base: Those of the base model.
        chance: Accuracy on forget questions without any knowledge.
    """
    span = base[forget] - chance
    forgetting = min(1.0, max(0.0, (base[forget] - found[forget]) / span)) if span > 0 else 0.0
    shares = [min(1.0, found[bench] / base[bench]) for bench in found if bench != forget and base[bench] > 0]
    utility = sum(shares) / len(shares) if shares else 1.0
    both = forgetting + utility
    return {"forgetting": forgetting, "utility": utility, "score": 2 * forgetting * utility / both if both else 0.0}


def best_of(trials: Sequence[Json]) -> int | None:
    """The number of the trial with the highest score, of several the first; None if every one failed."""
    whole = [number for number, trial in enumerate(trials) if trial["score"] is not None]
    return max(whole, key=lambda number: trials[number]["score"], default=None)
