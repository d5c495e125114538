"""Attacks on a guarded model: each a function from model and questions to a curve; here is what they are called."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dsg_cli.errors import DsgError, nearest

PROMPTS = "Someone who may send prompts to the guarded model, and knows no more."

EXAMPLES = "Someone who may send prompts to the guarded model, and knows a few of the answers that it hides."

LOGITS = "Someone who may send prompts, and sees the log-probabilities of answers and whether the gate opened."

COPY = "Someone who may send prompts, and has a copy of the model and its guardrail to search on."

FINE_TUNING = "A customer of a fine-tuning API."

WEIGHTS = "Whoever holds the weights."


@dataclass(frozen=True)
class Kind:
    """One attack; its function is `attack_<kind>`."""

    module: str
    """Of this package, which holds it."""
    threat_model: str
    unit: str
    """What x counts; empty where it is a name."""
    needs: tuple[str, ...] = ()
    """Of the material: `known` questions, whose answers the attacker has and which are not asked; `benign` text."""
    on_prompts: bool = False
    """It only changes what is asked: it says nothing where the unguarded model cannot answer that either."""
    sources: tuple[str, ...] = ()
    """Its settings that name files or benches: what they hold is in the material, and they are not handed on."""


ATTACKS = {
    "dilution": Kind("prompts", PROMPTS, "benign tokens", ("benign",), on_prompts=True),
    "split": Kind("prompts", PROMPTS, "parts", ("benign",), on_prompts=True),
    "paraphrase": Kind("prompts", PROMPTS, "", on_prompts=True, sources=("benches", "file")),
    "prefix": Kind("prompts", PROMPTS, "", on_prompts=True, sources=("file",)),
    "few-shot": Kind("prompts", EXAMPLES, "examples", ("known",), on_prompts=True),
    "encode": Kind("prompts", PROMPTS, "", on_prompts=True, sources=("file",)),
    "suffix": Kind("search", COPY, "steps", ("known", "benign"), on_prompts=True),
    "relearn": Kind("relearn", FINE_TUNING, "steps", ("known", "benign")),
    "soft-prompt": Kind("search", WEIGHTS, "steps", ("known", "benign")),
    "unhook": Kind("weights", WEIGHTS, ""),
    "quantize": Kind("weights", WEIGHTS, "bits"),
    "prune": Kind("weights", WEIGHTS, "of weights"),
    "probe": Kind("weights", WEIGHTS, "layer", ("known",)),
}
"""In the order in which `--kind all` runs them."""

ALL = "all"


def load_attack(kind: str) -> Callable[..., Any]:
    """The function that attacks: `attack_<kind>` of its module."""
    module = importlib.import_module(f"dsg_cli.attacks.{ATTACKS[kind].module}")
    attack: Callable[..., Any] = getattr(module, f"attack_{kind.replace('-', '_')}")
    return attack


def options_of(kind: str, settings: dict[str, object]) -> dict[str, object]:
    """The settings that an attack takes: those whose names begin with its own, without that beginning."""
    prefix = f"{kind.replace('-', '_')}_"
    own = {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
    return {key: value for key, value in own.items() if key not in ATTACKS[kind].sources}


def expand_attacks(kinds: Sequence[str]) -> list[str]:
    """The attacks that are meant, each once; `all` stands for every one."""
    if not kinds:
        raise DsgError("No attack is named.", "Give one with --kind: `dsg ls attacks` lists them.")
    for kind in kinds:
        if kind not in (*ATTACKS, ALL):
            raise DsgError(f"There is no attack named {kind}.", nearest(kind, [*ATTACKS, ALL]))
    return list(ATTACKS) if ALL in kinds else list(dict.fromkeys(kinds))
