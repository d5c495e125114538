"""Relearning: fine-tune the unlearned model on a few forgotten facts, or on anything, and ask for the other facts.

What comes back was hidden, not gone. Beside every way to train and to guard, the same training on the base model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsg_cli.attacks.target import BASE, UNLEARNED, AttackerKnowledge, Target
from dsg_cli.attacks.weights import copied
from dsg_cli.data.batches import TokenBatch, pad_rows
from dsg_cli.data.tokens import encode_pair, special_ids, with_bos
from dsg_cli.errors import DsgError
from dsg_cli.evals.questions import Change, Question
from dsg_cli.guardrail.guarded import guarded, protected_parameters
from dsg_cli.guardrail.runtime.sites import decoder_layers
from dsg_cli.inference.scoring import GuardedModel
from dsg_cli.job import ALONE
from dsg_cli.models.language_model import add_adapters, linear_layers
from dsg_cli.settings import AttackSection
from dsg_cli.workspace.body import Json

UNRELATED_TOKENS = 128
"""Of each benign text, at most."""

Data = Literal["forget", "unrelated"]
Parameters = Literal["all", "lora", "above"]
Guard = Literal["loop", "test", "removed"]

IN_WORDS: dict[Guard, str] = {"loop": "guard in loop", "test": "guard at test", "removed": "guard removed"}


@dataclass(frozen=True)
class _Training:
    """One fine-tuning, whoever is asked afterwards."""

    data: Data
    parameters: Parameters
    learning_rate: float
    has_guard: bool
    """Whether the guard is in the training loop."""
    is_base: bool = True
    """Of the base model; one training where the unlearned one without its guard is the same."""

    @property
    def name(self) -> str:
        begun = ("guard" if self.has_guard else "none") + ("" if self.is_base else "/changed")
        return f"{self.data}/{self.parameters}/{self.learning_rate:g}/{begun}"


def attack_relearn(target: Target, knowledge: AttackerKnowledge, settings: AttackSection) -> list[Json]:
    """Train copies of the model in every combination of the settings; measure as it goes.

    A point for each of `relearn_steps` of AdamW; 0 is before the attack. A variant for each of `relearn_data` (the
    attacker's questions with their answers, or benign text), `relearn_parameters` (all, low-rank adapters, or layers
    above the hook), `relearn_learning_rates` and `relearn_guard` (in the training loop and when asked, only when asked,
    or never). With `relearn_frozen_below`, a defence, what the guardrail reads depends on is frozen.

    Workers take one training each, for a training cannot be shared. A run that goes on trains again, and asks only
    what is missing. The sides of points also hold `utility_acc`, if there are questions for it, and after the first
    step `loss`.
    """
    makers = {"forget": training_batch, "unrelated": unrelated_batch}
    batches = {data: makers[data](target, knowledge) for data in settings.relearn_data}
    combinations = [
        (data, parameters, rate)
        for data in settings.relearn_data
        for parameters in settings.relearn_parameters
        for rate in settings.relearn_learning_rates
    ]

    def of_unlearned(combination: tuple[Data, Parameters, float], guard: Guard) -> _Training:
        has_guard = guard == "loop" and bool(target.unlearned.guardrails)
        return _Training(*combination, has_guard, is_base=target.is_same_model)

    trainings = dict.fromkeys(
        training
        for combination in combinations
        for training in (
            _Training(*combination, has_guard=False),
            *(of_unlearned(combination, guard) for guard in settings.relearn_guard),
        )
    )
    own: dict[str, dict[str, list[Json]]] = {}
    before: dict[str, Json] = {}
    """What is asked before the first step, which all trainings share."""
    for number, training in enumerate(trainings):
        if target.job.workers.owns(number):
            own[training.name] = _train_once(target, knowledge, settings, training, batches[training.data], before)
    points = {name: sides for shared in target.job.workers.gathered(own) for name, sides in shared.items()}
    curve: list[Json] = []
    for combination in combinations:
        data, parameters, rate = combination
        base = points[_Training(*combination, has_guard=False).name][BASE]
        for guard in settings.relearn_guard:
            unlearned = points[of_unlearned(combination, guard).name][BASE if guard == "removed" else UNLEARNED]
            words = [parameters, f"lr {rate:g}", IN_WORDS[guard]]
            words += ["unrelated text"] if data == "unrelated" else []
            words += ["frozen below"] if settings.relearn_frozen_below else []
            curve += [
                {"x": step, "variant": ", ".join(words), UNLEARNED: unlearned[i], BASE: base[i]}
                for i, step in enumerate(settings.relearn_steps)
            ]
    return curve


def _train_once(
    target: Target,
    knowledge: AttackerKnowledge,
    settings: AttackSection,
    training: _Training,
    batch: TokenBatch,
    before: dict[str, Json],
) -> dict[str, list[Json]]:
    """Points of each side that is asked; a training that no guard has to do with is done once for all guards."""
    sides = _sides_to_ask(target, training, settings.relearn_guard)
    is_same = sides == [BASE] and training.is_base and not settings.relearn_frozen_below
    key = f"relearn/{training.name}/rank {settings.relearn_rank}/{list(settings.relearn_steps)}"
    if is_same and key in target.base_curves:
        return {BASE: target.base_curves[key]}
    attacked = copied((target.base if training.is_base else target.unlearned).model).float()
    models = {UNLEARNED: replace(target.unlearned, model=attacked), BASE: replace(target.base, model=attacked)}
    parameters = _trained_parameters(target, attacked, training.parameters, settings)
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate)
    loss, n_done = float("nan"), 0
    points: dict[str, list[Json]] = {side: [] for side in sides}
    for step in settings.relearn_steps:
        while n_done < step:
            with guarded(attacked, target.unlearned.guardrails if training.has_guard else (), allow_mismatch=True):
                loss = training_step(attacked, parameters, optimizer, batch)
            n_done += 1
            target.job.progress(f"relearning, {training.name}, steps", n_done, max(settings.relearn_steps))
        for side in sides:
            before_key = f"{side}/{training.is_base}"
            point = before.get(before_key) if n_done == 0 else None
            if point is None:
                name, alone = f"{training.name}/{side}/{step}", replace(target.job, workers=ALONE)
                point = target.measure(models[side], knowledge.forget, name, utility=knowledge.utility, job=alone)
            if n_done == 0:
                before[before_key] = point
            points[side].append(point | ({"loss": loss} if n_done else {}))
    if is_same:
        target.base_curves[key] = points[BASE]
    return points


def _sides_to_ask(target: Target, training: _Training, guards: Sequence[Guard]) -> list[str]:
    """Who is asked after a training: under the guard, without it, or both."""
    if training.has_guard:
        return [UNLEARNED]
    if training.is_base and not target.is_same_model:
        return [BASE]
    is_asked = {
        BASE: training.is_base or "removed" in guards,
        UNLEARNED: "test" in guards or ("loop" in guards and not target.unlearned.guardrails),
    }
    return [side for side, is_needed in is_asked.items() if is_needed]


def _trained_parameters(
    target: Target, attacked: PreTrainedModel, parameters: Parameters, settings: AttackSection
) -> list[nn.Parameter]:
    """The parameters that are trained, all others frozen."""
    protected = {id(parameter) for _, parameter in protected_parameters(attacked, target.unlearned.guardrails)}
    frozen = protected if settings.relearn_frozen_below else set()
    attacked.requires_grad_(False)
    trained: list[nn.Parameter] = []
    if parameters == "lora":
        names = [name for name, module in linear_layers(attacked).items() if id(module.weight) not in frozen]
        if names:
            rank = settings.relearn_rank  # The product is multiplied with alpha / rank = 2, as is customary.
            adapter = add_adapters(attacked, names, rank=rank, alpha=2 * rank, seed=target.seed)
            trained = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    elif parameters == "above":
        trained = [weight for weight in decoder_layers(attacked).parameters() if id(weight) not in protected]
    else:
        trained = [weight for weight in attacked.parameters() if id(weight) not in frozen]
    if not trained:
        raise DsgError(
            "The guardrail's hook is at the last layer: above it, nothing is left to train.",
            "Leave `above` out of attack.relearn_parameters, or set attack.relearn_frozen_below to false.",
        )
    for parameter in trained:
        parameter.requires_grad_(True)
    return trained


def training_batch(target: Target, knowledge: AttackerKnowledge) -> TokenBatch:
    """The attacker's questions with their right answers in one right-padded batch."""
    model = target.unlearned
    pairs = [encode_pair(model.tokenizer, q.context, q.choices[q.answer], bos=model.bos) for q in knowledge.known]
    return _padded(model, [list(pair.context + pair.continuation)[-model.max_length :] for pair in pairs])


def unrelated_batch(target: Target, knowledge: AttackerKnowledge) -> TokenBatch:
    """As many benign texts as the attacker knows questions, drawn with the seed."""
    model = target.unlearned
    length = min(UNRELATED_TOKENS, model.max_length - 1)
    texts = [text[:length] for text in knowledge.benign if len(text) > 1]
    if not texts:
        raise DsgError("There is no benign text to train on.", "Take `unrelated` out of attack.relearn_data.")
    drawn = random.Random(target.seed).sample(texts, min(len(texts), len(knowledge.known)))
    return _padded(model, [with_bos(text, model.bos) for text in drawn])


def training_step(
    model: PreTrainedModel, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, batch: TokenBatch
) -> float:
    """One step of next-token prediction on a batch; its loss before the step."""
    logits_BLV = model(input_ids=batch.ids_BL, attention_mask=batch.mask_BL.long(), use_cache=False).logits[:, :-1]
    target_BL = batch.ids_BL[:, 1:].masked_fill(~batch.mask_BL[:, 1:], -100)
    loss = F.cross_entropy(logits_BLV.flatten(0, 1).float(), target_BL.flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return loss.item()


@dataclass(frozen=True)
class AnswerBatch:
    """Questions with their right answers."""

    tokens: TokenBatch
    answer_BL: Tensor
    """True for tokens of the answer."""


def answer_batch(model: GuardedModel, questions: Sequence[Question], change: Change) -> AnswerBatch:
    """Questions whose contexts are changed as they will be when they are asked, with their right answers."""
    rows, starts = [], []
    for number, question in enumerate(questions):
        pair = encode_pair(model.tokenizer, question.context, question.choices[question.answer], bos=model.bos)
        context = change(pair.context, number)
        rows.append([*context, *pair.continuation])
        starts.append(len(context))
    tokens = _padded(model, rows)
    position_L = torch.arange(tokens.ids_BL.shape[1], device=model.device)
    return AnswerBatch(tokens, tokens.mask_BL & (position_L >= torch.tensor(starts, device=model.device)[:, None]))


def answer_losses(model: PreTrainedModel, batch: AnswerBatch) -> Tensor:
    """Negative log-likelihood of each answer, [B]."""
    tokens = batch.tokens
    logits_BLV = model(input_ids=tokens.ids_BL, attention_mask=tokens.mask_BL.long(), use_cache=False).logits[:, :-1]
    target_BL = tokens.ids_BL[:, 1:].masked_fill(~batch.answer_BL[:, 1:], -100)
    return F.cross_entropy(logits_BLV.float().transpose(1, 2), target_BL, reduction="none").sum(-1)


def _padded(model: GuardedModel, rows: Sequence[list[int]]) -> TokenBatch:
    tokenizer = model.tokenizer
    return pad_rows(rows, tokenizer.pad_token_id or 0, special_ids(tokenizer), model.device)
