"""Paraphrase: the same knowledge asked in words that the guard was not made with."""

from __future__ import annotations

from dsg_cli.artifacts import Json
from dsg_cli.attacks.target import Material, Target


def attack(target: Target, material: Material) -> list[Json]:
    """Ask what is forgotten in other words, a point for each place that the words are from.

    Args:
        target: What is attacked.
        material: Each list of `rephrased` is asked.
    """
    return [target.point(source, questions) for source, questions in material.rephrased.items()]
