"""Attacks on a guarded model, by name: who could do it, and what the x of its curve counts. No torch here.

An attack is a function `attack_<name>(target, knowledge, settings)` that returns a curve (target.py). It reads those of
the settings, an `AttackSection`, that begin with its name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dsg_cli.errors import DsgError, nearest

PROMPTS = "Someone who may send prompts to the guarded model, and knows no more."
EXAMPLES = "Someone who may send prompts to the guarded model, and knows a few of the answers that it hides."
COPY = "Someone who may send prompts, and has a copy of the model and its guardrail to search on."
FINE_TUNING = "A customer of a fine-tuning API."
WEIGHTS = "Whoever holds the weights."


@dataclass(frozen=True)
class Attack:
    """One attack."""

    module: str
    """Of this package, which holds it."""
    threat_model: str
    unit: str
    """What x counts; empty where it is a name."""
    needs: tuple[str, ...] = ()
    """Of an attacker's knowledge: `known` questions, with answers, which are not asked; `benign` text."""
    on_prompts: bool = False
    """It only changes what is asked: it says nothing where the base model cannot answer that either."""


ATTACKS = {
    "dilution": Attack("prompts", PROMPTS, "benign tokens", ("benign",), on_prompts=True),
    "split": Attack("prompts", PROMPTS, "parts", ("benign",), on_prompts=True),
    "paraphrase": Attack("prompts", PROMPTS, "", on_prompts=True),
    "prefix": Attack("prompts", PROMPTS, "", on_prompts=True),
    "few-shot": Attack("prompts", EXAMPLES, "examples", ("known",), on_prompts=True),
    "encode": Attack("prompts", PROMPTS, "", on_prompts=True),
    "suffix": Attack("search", COPY, "steps", ("known", "benign"), on_prompts=True),
    "relearn": Attack("relearn", FINE_TUNING, "steps", ("known", "benign")),
    "soft-prompt": Attack("search", WEIGHTS, "steps", ("known", "benign")),
    "unhook": Attack("weights", WEIGHTS, ""),
    "quantize": Attack("weights", WEIGHTS, "bits"),
    "prune": Attack("weights", WEIGHTS, "of weights"),
    "probe": Attack("weights", WEIGHTS, "layer", ("known",)),
}
"""In the order in which `--kind all` runs them."""

ALL = "all"


def load_attack(name: str) -> Callable[..., Any]:
    """The function that attacks."""
    module = importlib.import_module(f"dsg_cli.attacks.{ATTACKS[name].module}")
    attack: Callable[..., Any] = getattr(module, f"attack_{name.replace('-', '_')}")
    return attack


def expand_attacks(names: Sequence[str]) -> list[str]:
    """The attacks that are meant, each once; `all` stands for every one."""
    if not names:
        raise DsgError("No attack is named.", "Give one with --kind: `dsg ls attacks` lists them.")
    for name in names:
        if name not in (*ATTACKS, ALL):
            raise DsgError(f"There is no attack named {name}.", nearest(name, [*ATTACKS, ALL]))
    return list(ATTACKS) if ALL in names else list(dict.fromkeys(names))
