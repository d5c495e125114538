"""Relearning: fine-tune the guarded model on a few forgotten facts, or on anything, and ask for the other facts.

What comes back was hidden, not gone. Beside every way to train and to guard, the same training on the model without
any guard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from dsg_cli.artifacts import Json
from dsg_cli.attacks.adapters import add_adapters
from dsg_cli.attacks.target import Material, Target, of_forget
from dsg_cli.attacks.training import training_batch, training_step, unrelated_batch
from dsg_cli.attacks.weights import copied
from dsg_cli.errors import DsgError
from dsg_cli.guardrail import guarded
from dsg_cli.protection import protected_parameters
from dsg_cli.runtime.sites import decoder_layers
from dsg_cli.tokens import TokenBatch
from dsg_cli.workers import ALONE

Data = Literal["forget", "unrelated"]
Trained = Literal["all", "lora", "above"]
Guarding = Literal["loop", "test", "removed"]
IN_WORDS = {"loop": "guard in loop", "test": "guard at test", "removed": "guard removed"}


@dataclass(frozen=True)
class _Training:
    """One fine-tuning, whoever is asked afterwards."""

    data: Data
    trained: Trained
    learning_rate: float
    has_guard: bool
    is_base: bool = True
    """Of the model that no method has changed; one training where that is the guarded one without its guard."""

    @property
    def name(self) -> str:
        begun = ("guard" if self.has_guard else "none") + ("" if self.is_base else "/changed")
        return f"{self.data}/{self.trained}/{self.learning_rate:g}/{begun}"


def attack(
    target: Target,
    material: Material,
    *,
    steps: Sequence[int],
    learning_rates: Sequence[float],
    parameters: Sequence[Trained],
    rank: int,
    frozen_below: bool,
    guard: Sequence[Guarding],
    data: Sequence[Data],
) -> list[Json]:
    """Train copies of the model in every combination of the settings; measure as it goes.

    Workers take one training each, for a training cannot be shared. A run that goes on trains again, and asks only
    what is missing.

    Args:
        target: What is attacked.
        material: The attacker trains on `known`, or on `benign` text; `forget` and, if there is any, `utility` are
            asked.
        steps: Optimiser steps at which to measure, ascending; 0 is before the attack.
        learning_rates: Of AdamW.
        parameters: What is trained: `all`, low-rank adapters (`lora`), or only layers `above` the hook.
        rank: Of the adapters.
        frozen_below: A defence: what the guardrail reads depends on is frozen (`protected_parameters`).
        guard: Guarded in the training `loop` and when asked, only when asked (`test`), or never (`removed`).
        data: Trained on `forget` questions with their answers, or on `unrelated` text.

    Returns:
        Points whose sides also hold `utility_acc`, `gate_rate` and, after the first step, `loss`.

    Raises:
        DsgError: Nothing is left to train, or the model is spread over several devices.
    """
    makers = {"forget": training_batch, "unrelated": unrelated_batch}
    batches = {one: makers[one](target, material) for one in data}
    combinations = [(one, trained, rate) for one in data for trained in parameters for rate in learning_rates]
    trainings = list(
        dict.fromkeys(
            training
            for combination in combinations
            for training in (_Training(*combination, False), *(_beside(target, combination, one) for one in guard))
        )
    )
    found: dict[str, dict[str, list[Json]]] = {}
    before: dict[str, Json] = {}
    for number, training in enumerate(trainings):
        if target.workers.owns(number):
            chosen = _Chosen(training, rank, frozen_below, steps, _sides(target, training, guard))
            found[training.name] = _remembered(target, material, batches[training.data], chosen, before)
    of_all = {name: sides for several in target.workers.gathered(found) for name, sides in several.items()}
    return [
        point
        for combination in combinations
        for guarding in guard
        for point in _curve(_beside(target, combination, guarding), of_all, guarding, steps, frozen_below)
    ]


def _beside(target: Target, combination: tuple[Data, Trained, float], guarding: Guarding) -> _Training:
    """The training of the guarded side: of weights that a method changed if it did, the guard in the loop or not."""
    has_guard = guarding == "loop" and bool(target.guardrails)
    return _Training(*combination, has_guard, is_base=target.base is None)


def _sides(target: Target, training: _Training, guard: Sequence[Guarding]) -> tuple[str, ...]:
    """Who is asked after a training: under the guard, without it, or both."""
    if training.has_guard:
        return ("guarded",)
    if target.base is None or not training.is_base:
        is_asked_under = "test" in guard or ("loop" in guard and not target.guardrails)
        is_asked_without = training.is_base or "removed" in guard
        return tuple(
            side for side, is_asked in (("unguarded", is_asked_without), ("guarded", is_asked_under)) if is_asked
        )
    return ("unguarded",)


@dataclass(frozen=True)
class _Chosen:
    """A training, and when and how the model is asked."""

    training: _Training
    rank: int
    frozen_below: bool
    steps: Sequence[int]
    sides: Sequence[str]


def _curve(
    training: _Training,
    found: dict[str, dict[str, list[Json]]],
    guarding: Guarding,
    steps: Sequence[int],
    frozen_below: bool,
) -> list[Json]:
    """One variant: what was measured under that guard, beside the same training without any."""
    alone = found[_Training(training.data, training.trained, training.learning_rate, False).name]
    guarded_points = found[training.name]["unguarded" if guarding == "removed" else "guarded"]
    words = [training.trained, f"lr {training.learning_rate:g}", IN_WORDS[guarding]]
    words += ["unrelated text"] if training.data == "unrelated" else []
    words += ["frozen below"] if frozen_below else []
    return [
        {"x": step, "variant": ", ".join(words), "guarded": guarded_points[i], "unguarded": alone["unguarded"][i]}
        for i, step in enumerate(steps)
    ]


def _remembered(
    target: Target, material: Material, batch: TokenBatch, chosen: _Chosen, before: dict[str, Json]
) -> dict[str, list[Json]]:
    """Points of each side; a training that no guard has to do with is done once for all guards on a model."""
    is_same = chosen.sides == ("unguarded",) and chosen.training.is_base and not chosen.frozen_below
    key = f"relearn/{chosen.training.name}/rank {chosen.rank}/{list(chosen.steps)}"
    if is_same and key in target.remembered:
        return {"unguarded": target.remembered[key]}
    points = _measured(target, material, batch, chosen, before)
    if is_same:
        target.remembered[key] = points["unguarded"]
    return points


def _measured(
    target: Target, material: Material, batch: TokenBatch, chosen: _Chosen, before: dict[str, Json]
) -> dict[str, list[Json]]:
    """Points of each side, in the order of steps. Those before the first step, which all trainings share, go through
    `before`."""
    training = chosen.training
    attacked = copied(target.of("unguarded" if training.is_base else "guarded")).float()
    parameters = _trained(target, attacked, chosen)
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate)
    loss, n_done = float("nan"), 0
    points: dict[str, list[Json]] = {side: [] for side in chosen.sides}
    for step in chosen.steps:
        while n_done < step:
            with guarded(attacked, target.guardrails if training.has_guard else (), allow_mismatch=True):
                loss = training_step(attacked, parameters, optimizer, batch)
            n_done += 1
            target.report(f"relearning, {training.name}, steps", n_done, max(chosen.steps))
        for side in chosen.sides:
            key = f"{side}/{training.is_base}"
            point = before.get(key) if n_done == 0 else None
            if point is None:
                point = _asked(target, material, attacked, f"{training.name}/{side}/{step}", side == "guarded")
            if n_done == 0:
                before[key] = point
            points[side].append(point | ({"loss": loss} if n_done else {}))
    return points


def _asked(target: Target, material: Material, attacked: PreTrainedModel, name: str, is_guarded: bool) -> Json:
    """What the trained model answers."""

    def ask(role: Literal["forget", "utility"]) -> Json:
        questions = material.forget if role == "forget" else material.utility
        return target.ask(questions, name=f"{name}/{role}", is_guarded=is_guarded, model=attacked, workers=ALONE)

    return of_forget(ask("forget")) | ({"utility_acc": ask("utility")["acc"]} if material.utility else {})


def _trained(target: Target, attacked: PreTrainedModel, chosen: _Chosen) -> list[nn.Parameter]:
    """The parameters that are trained, all others frozen.

    Raises:
        DsgError: There is none.
    """
    protected = [one for _, one in protected_parameters(attacked, target.guardrails)]
    frozen = protected if chosen.frozen_below else []
    attacked.requires_grad_(False)
    if chosen.training.trained == "lora":
        found = add_adapters(attacked, chosen.rank, frozen=frozen, seed=target.seed)
    else:
        is_above = chosen.training.trained == "above"
        candidates = decoder_layers(attacked).parameters() if is_above else attacked.parameters()
        without = {id(one) for one in (protected if is_above else frozen)}
        found = [one for one in candidates if id(one) not in without]
    if not found:
        raise DsgError(
            "The guardrail's hook is at the last layer: above it, nothing is left to train.",
            "Leave `above` out of attack.relearn_parameters, or set attack.relearn_frozen_below to false.",
        )
    for one in found:
        one.requires_grad_(True)
    return found
