"""Unhooking: the guard is taken off. What comes back is all that the base model knows: the weights still hold it."""

from __future__ import annotations

from dsg_cli.artifacts import Json
from dsg_cli.attacks.target import Material, Target, of_forget


def attack(target: Target, material: Material) -> list[Json]:
    """Ask the model without its guard: one point, the same on both sides.

    Args:
        target: What is attacked.
        material: Its `forget` is asked.
    """
    found = of_forget(target.ask(material.forget, name="unhooked", is_guarded=False))
    return [{"x": "guard taken off", "variant": "", "guarded": found, "unguarded": found}]
