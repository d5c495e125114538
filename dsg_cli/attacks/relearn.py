"""Relearning: fine-tune the guarded model on a few forgotten facts, or on anything, and ask for the other facts.

What comes back was hidden, not gone. Beside every way to train and to guard, the same training on the model without
any guard.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsg_cli.attacks.target import Material, Target, of_forget
from dsg_cli.attacks.weights import copied, linear_layers
from dsg_cli.data.batches import TokenBatch, pad_rows
from dsg_cli.data.tokens import encode_pair, special_ids, with_bos
from dsg_cli.errors import DsgError
from dsg_cli.evals.questions import Change, Question
from dsg_cli.guardrail.guarded import guarded, protected_parameters
from dsg_cli.guardrail.runtime.sites import decoder_layers
from dsg_cli.job import ALONE
from dsg_cli.workspace.results import Json

SCALE = 2.0
"""What the product is multiplied with, as is customary (alpha = 2 r)."""


class LowRank(nn.Module):
    """A forward hook that adds x A B to what a linear layer makes of x. B begins as 0: nothing is changed yet."""

    def __init__(self, n_in: int, n_out: int, rank: int, generator: torch.Generator, device: torch.device) -> None:
        super().__init__()
        self.A_DR = nn.Parameter((torch.randn(n_in, rank, generator=generator) / n_in**0.5).to(device))
        self.B_RD = nn.Parameter(torch.zeros(rank, n_out, device=device))

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + SCALE * (args[0] @ self.A_DR) @ self.B_RD


def add_adapters(model: Any, rank: int, *, frozen: Sequence[nn.Parameter], seed: int) -> list[nn.Parameter]:
    """Put an adapter on every linear layer of the decoder; their parameters.

    Args:
        model: A causal language model that is the attack's own; adapters stay on it.
        rank: Of the product.
        frozen: Weights whose layers get none.
        seed: Of the first matrices.
    """
    generator = torch.Generator().manual_seed(seed)
    without = {id(one) for one in frozen}
    added: list[nn.Parameter] = []
    for module, weight, outputs in list(linear_layers(model)):
        if id(weight) in without:
            continue
        adapter = LowRank(weight.shape[1 - outputs], weight.shape[outputs], rank, generator, weight.device)
        module.register_forward_hook(adapter)
        added += adapter.parameters()
    return added


UNRELATED_TOKENS = 128
"""Of each benign text, at most."""


def training_batch(target: Target, material: Material) -> TokenBatch:
    """The attacker's questions with their right answers in one right-padded batch."""
    pairs = [encode_pair(target.tokenizer, q.context, q.choices[q.answer], bos=target.bos) for q in material.known]
    return _padded(target, [list(pair.context + pair.continuation)[-target.max_length :] for pair in pairs])


def unrelated_batch(target: Target, material: Material) -> TokenBatch:
    """As many benign texts as the attacker knows questions, drawn with the seed."""
    length = min(UNRELATED_TOKENS, target.max_length - 1)
    texts = [text[:length] for text in material.benign if len(text) > 1]
    if not texts:
        raise DsgError("There is no benign text to train on.", "Take `unrelated` out of attack.relearn_data.")
    drawn = random.Random(target.seed).sample(texts, min(len(texts), len(material.known)))
    return _padded(target, [with_bos(text, target.bos) for text in drawn])


def _padded(target: Target, rows: Sequence[list[int]]) -> TokenBatch:
    return pad_rows(rows, target.tokenizer.pad_token_id or 0, special_ids(target.tokenizer), target.device)


@dataclass(frozen=True)
class AnswerBatch:
    """Questions with their right answers."""

    tokens: TokenBatch
    answer_BL: Tensor
    """True for tokens of the answer."""


def answer_batch(target: Target, questions: Sequence[Question], change: Change) -> AnswerBatch:
    """Questions whose contexts are changed as they will be when they are asked, with their right answers."""
    rows, starts = [], []
    for number, question in enumerate(questions):
        pair = encode_pair(target.tokenizer, question.context, question.choices[question.answer], bos=target.bos)
        context = change(pair.context, number)
        rows.append([*context, *pair.continuation])
        starts.append(len(context))
    tokens = _padded(target, rows)
    position_L = torch.arange(tokens.ids_BL.shape[1], device=target.device)
    return AnswerBatch(tokens, tokens.mask_BL & (position_L >= torch.tensor(starts, device=target.device)[:, None]))


def answer_losses(model: PreTrainedModel, batch: AnswerBatch) -> Tensor:
    """Negative log-likelihood of each answer, [B]."""
    tokens = batch.tokens
    logits_BLV = model(input_ids=tokens.ids_BL, attention_mask=tokens.mask_BL.long(), use_cache=False).logits[:, :-1]
    wanted_BL = tokens.ids_BL[:, 1:].masked_fill(~batch.answer_BL[:, 1:], -100)
    return F.cross_entropy(logits_BLV.float().transpose(1, 2), wanted_BL, reduction="none").sum(-1)


def next_token_loss(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """Mean cross-entropy of every token but the first of each row."""
    logits_BLV = model(input_ids=batch.ids_BL, attention_mask=batch.mask_BL.long(), use_cache=False).logits[:, :-1]
    target_BL = batch.ids_BL[:, 1:].masked_fill(~batch.mask_BL[:, 1:], -100)
    return F.cross_entropy(logits_BLV.flatten(0, 1).float(), target_BL.flatten())


def training_step(
    model: PreTrainedModel, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, batch: TokenBatch
) -> float:
    """One step of next-token prediction on a batch; its loss before the step."""
    loss = next_token_loss(model, batch)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return loss.item()


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


def attack_relearn(
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
        return ("unlearned",)
    if target.base is None or not training.is_base:
        is_asked_under = "test" in guard or ("loop" in guard and not target.guardrails)
        is_asked_without = training.is_base or "removed" in guard
        return tuple(side for side, is_asked in (("base", is_asked_without), ("unlearned", is_asked_under)) if is_asked)
    return ("base",)


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
    guarded_points = found[training.name]["base" if guarding == "removed" else "unlearned"]
    words = [training.trained, f"lr {training.learning_rate:g}", IN_WORDS[guarding]]
    words += ["unrelated text"] if training.data == "unrelated" else []
    words += ["frozen below"] if frozen_below else []
    return [
        {"x": step, "variant": ", ".join(words), "unlearned": guarded_points[i], "base": alone["base"][i]}
        for i, step in enumerate(steps)
    ]


def _remembered(
    target: Target, material: Material, batch: TokenBatch, chosen: _Chosen, before: dict[str, Json]
) -> dict[str, list[Json]]:
    """Points of each side; a training that no guard has to do with is done once for all guards on a model."""
    is_same = chosen.sides == ("base",) and chosen.training.is_base and not chosen.frozen_below
    key = f"relearn/{chosen.training.name}/rank {chosen.rank}/{list(chosen.steps)}"
    if is_same and key in target.remembered:
        return {"base": target.remembered[key]}
    points = _measured(target, material, batch, chosen, before)
    if is_same:
        target.remembered[key] = points["base"]
    return points


def _measured(
    target: Target, material: Material, batch: TokenBatch, chosen: _Chosen, before: dict[str, Json]
) -> dict[str, list[Json]]:
    """Points of each side, in the order of steps. Those before the first step, which all trainings share, go through
    `before`."""
    training = chosen.training
    attacked = copied(target.of("base" if training.is_base else "unlearned")).float()
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
                point = _asked(target, material, attacked, f"{training.name}/{side}/{step}", side == "unlearned")
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
    """The parameters that are trained, all others frozen."""
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
