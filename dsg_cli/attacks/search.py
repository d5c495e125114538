"""Suffix: a few tokens around every question, found with gradients, that keep the gate shut or bring the answer back.

Greedy coordinate gradient: in each step, gradients propose exchanges of single tokens, and the best of them, as the
guarded model itself judges, is made. The attacker needs a copy of model and guardrail to search on. The tokens are fed
as ids, which text may not be able to spell: what is found is an upper bound on what such a prompt can do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsg_cli.attacks.prompts import benign_texts, check_room, cue_length
from dsg_cli.attacks.relearn import AnswerBatch, answer_batch, answer_losses
from dsg_cli.attacks.target import SIDES, Material, Target, of_forget
from dsg_cli.data.tokens import Request, encode_pair, special_ids
from dsg_cli.evals.questions import Change, Question
from dsg_cli.guardrail.guarded import guarded
from dsg_cli.guardrail.runtime.guardrail import GuardrailModule
from dsg_cli.inference.scoring import GuardedModel
from dsg_cli.job import ALONE, Job
from dsg_cli.models.residuals import replace_residual
from dsg_cli.workspace.results import Json


def soft_statistic(guard: GuardrailModule, resid_BLD: Tensor, counted_BL: Tensor) -> Tensor:
    """The gate's statistic of whole sequences, [B], as a function with a slope.

    That of a `window` gate is as it is; in the others activations stand in the place of active or not.
    """
    strength_BLK = guard.slice(resid_BLD).acts.abs()
    signal_BL = strength_BLK @ (guard.detect if guard.gate.form == "window" else guard.clamp.triggers)
    before_BC = guard.gate.initial_state(len(signal_BL), signal_BL.device)
    statistic_BL: Tensor = guard.gate.scan(signal_BL, counted_BL, before_BC)[0]
    return statistic_BL.amax(-1)


def losses_and_statistics(
    model: PreTrainedModel, guards: Sequence[GuardrailModule], batch: AnswerBatch
) -> tuple[Tensor, Tensor]:
    """Of the unguarded model: the loss of each answer, [B], and the sum of the guards' soft statistics, [B]."""
    found: list[Tensor] = []

    def watching(guard: GuardrailModule) -> Callable[[Tensor], Tensor]:
        def watch(resid_BLD: Tensor) -> Tensor:
            guard.to(resid_BLD.device)
            found.append(soft_statistic(guard, resid_BLD, batch.tokens.counted_BL.to(resid_BLD.device)))
            return resid_BLD

        return watch

    with ExitStack() as hooks:
        for guard in guards:
            hooks.enter_context(replace_residual(model, guard.read, watching(guard)))
        losses_B = answer_losses(model, batch)
    statistics_B = torch.zeros_like(losses_B)
    for one in found:
        statistics_B = statistics_B + one.to(losses_B.device)
    return losses_B, statistics_B


def against_the_gate(
    model: PreTrainedModel, guards: Sequence[GuardrailModule], gate_weight: float
) -> Callable[[AnswerBatch], Tensor]:
    """The mean loss of answers without the guard, and the mean statistic relative to that of the first batch; with no
    guards, the loss alone."""
    begun: list[Tensor] = []

    def objective(batch: AnswerBatch) -> Tensor:
        losses_B, statistics_B = losses_and_statistics(model, guards, batch)
        if not begun:
            begun.append(statistics_B.detach().mean().clamp(min=1e-6))
        return losses_B.mean() + gate_weight * statistics_B.mean() / begun[0]

    return objective


Objective = Literal["loop", "gate"]

IN_WORDS = {"loop": "guard in loop", "gate": "against the gate"}


def attack_soft_prompt(
    target: Target,
    material: Material,
    *,
    tokens: int,
    steps: Sequence[int],
    learning_rate: float,
    objectives: Sequence[Objective],
    gate_weight: float,
) -> list[Json]:
    """Train prompts on the attacker's questions; measure as it goes.

    A prompt begins as the embeddings of benign tokens, so that 0 steps is a dilution by them. The guardrail must
    know which tokens count: it is given the ids of those benign tokens, each of which counts, and the output of the
    embedding layer is replaced in their place. Workers take one training each. A run that goes on trains again, and
    asks only what is missing.

    Args:
        target: What is attacked.
        material: The attacker trains on `known`, and begins from `benign` text; `forget` is asked.
        tokens: Vectors in the prompt, which stands after BOS.
        steps: Of Adam, at which to measure, ascending; 0 is the prompt that it begins with.
        learning_rate: Of Adam, relative to the size of an entry of the first prompt (root mean square).
        objectives: What is minimised: the loss of the right answers with the guard in the `loop`, or that without the
            guard and, with it, the statistic of the `gate` (gradients.py). A variant each.
        gate_weight: Of the statistic, relative to what it is at first.

    Returns:
        Points whose sides also hold `loss`, which is what is minimised, on the attacker's questions.
    """
    check_room(target, [*material.forget, *material.known], tokens, "attack.soft_prompt_tokens")
    begun = benign_texts(material, tokens)[0][:tokens]
    objectives = [one for one in objectives if one != "gate" or target.guardrails] or ["loop"]
    measured: dict[str, list[Json]] = {}
    for number, how in enumerate((None, *objectives)):
        if target.workers.owns(number):
            measured[how or "base"] = _measured(target, material, begun, how, steps, learning_rate, gate_weight)
    found = {how: points for several in target.workers.gathered(measured) for how, points in several.items()}
    return [
        {"x": step, "variant": IN_WORDS[how], "unlearned": found[how][i], "base": found["base"][i]}
        for how in objectives
        for i, step in enumerate(steps)
    ]


def _measured(
    target: Target,
    material: Material,
    begun: list[int],
    how: Objective | None,
    steps: Sequence[int],
    learning_rate: float,
    gate_weight: float,
) -> list[Json]:
    """One training: points in the order of steps. Without an objective of its own, the guard is nowhere."""
    change, model = in_front(begun, target.bos), target.of("unlearned" if how else "base")
    batch = answer_batch(target, material.known, change)
    with torch.no_grad():
        prompt_PD = model.get_input_embeddings()(torch.tensor(begun, device=target.device)).float()
    prompt_PD.requires_grad_(True)
    size = float(prompt_PD.detach().square().mean().sqrt())
    optimizer = torch.optim.Adam([prompt_PD], lr=learning_rate * size)
    objective = _objective(target, model, how, gate_weight)
    n_done, points = 0, []
    with embedded(model, prompt_PD, begun):
        loss = objective(batch)
        for step in steps:
            while n_done < step:
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                loss = objective(batch)
                n_done += 1
                target.report(f"soft prompt, {how or 'unguarded'}, steps", n_done, max(steps))
            found = target.ask(
                material.forget, name=f"{how}/{step}", is_guarded=how is not None, change=change, workers=ALONE
            )
            points.append(of_forget(found) | {"loss": loss.item()})
    return points


def _objective(
    target: Target, model: PreTrainedModel, how: Objective | None, gate_weight: float
) -> Callable[[AnswerBatch], Tensor]:
    if how == "gate":
        return against_the_gate(model, target.guardrails, gate_weight)

    def answers(batch: AnswerBatch) -> Tensor:
        with guarded(model, target.guardrails if how == "loop" else (), allow_mismatch=True):
            return answer_losses(model, batch).mean()

    return answers


def in_front(ids: Sequence[int], bos: int | None) -> Change:
    """Ids put in front of a context, after its BOS."""

    def change(context: tuple[int, ...], _number: int) -> tuple[int, ...]:
        n_head = int(bos is not None)
        return (*context[:n_head], *ids, *context[n_head:])

    return change


@contextmanager
def embedded(model: PreTrainedModel, prompt_PD: Tensor, ids: Sequence[int]) -> Iterator[None]:
    """While the block runs, the embeddings of P ids in a row are those of a prompt, where a row first has them.

    Rows without them stay as they are: a filter may have put a refusal in the place of the question.
    """

    def replace(_module: nn.Module, args: tuple[Tensor, ...], output_BLD: Tensor) -> Tensor:
        ids_BL, wanted_P = args[0], torch.tensor(list(ids), device=output_BLD.device)
        if ids_BL.shape[1] < len(wanted_P):
            return output_BLD
        is_there_BN = (ids_BL.unfold(1, len(wanted_P), 1) == wanted_P).all(-1)
        row_R = is_there_BN.any(1).nonzero()[:, 0]
        start_R = is_there_BN.int().argmax(1)[row_R]
        place_RP = start_R[:, None] + torch.arange(len(wanted_P), device=output_BLD.device)
        prompt_RPD = prompt_PD.to(output_BLD).expand(len(row_R), -1, -1)
        return output_BLD.index_put((row_R[:, None], place_RP), prompt_RPD)

    handle = model.get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


TOP = 64
"""Tokens that gradients propose at each position."""

Place = Literal["after", "before"]


def attack_suffix(
    target: Target,
    material: Material,
    *,
    tokens: int,
    steps: Sequence[int],
    candidates: int,
    gate_weight: float,
    places: Sequence[Place],
) -> list[Json]:
    """Search one suffix for all of the attacker's questions; ask the others with it as it goes.

    Workers share every step. A run that goes on searches again, and asks only what is missing.

    Args:
        target: What is attacked.
        material: The attacker searches on `known`, and begins from `benign` text; `forget` is asked.
        tokens: In the suffix.
        steps: At which to measure, ascending; 0 is the benign text that it begins with.
        candidates: Exchanges that are tried in each step, with the guard on.
        gate_weight: Of the gate's statistic, relative to what it is at first, beside the loss of the right answers:
            where the gate stays open, the loss alone does not tell which exchange brings it nearer to shutting.
        places: `after` the question (before the words with which every question ends, such as `Answer:`), or `before`
            it, where also a gate that stays open once it has opened can be kept from opening. A variant each.

    Returns:
        Points whose sides also hold `loss`, which is what is minimised, on the attacker's questions.
    """
    check_room(target, [*material.forget, *material.known], tokens, "attack.suffix_tokens")
    begun = benign_texts(material, tokens)[0][:tokens]
    n_cue = cue_length(target, [*material.forget, *material.known])
    curve = []
    for place in places:
        found = {}
        for side in SIDES:
            search = _Search(target, side, material.known, place, n_cue, candidates, gate_weight)
            found[side] = search.measured(material.forget, tuple(begun), steps, f"{place}/{side}")
        for i, step in enumerate(steps):
            curve.append({"x": step, "variant": place, **{side: found[side][i] for side in SIDES}})
    return curve


@dataclass(frozen=True)
class _Tried:
    """A suffix and what comes of it, in the mean over the attacker's questions."""

    suffix: tuple[int, ...]
    loss: float
    """Of the right answer."""
    statistic: float
    """Of the gate nearest to opening."""


@dataclass(frozen=True)
class _Search:
    """A search against the guarded model, or with no guards against the unguarded one."""

    target: Target
    side: str
    known: Sequence[Question]
    place: Place
    n_cue: int
    n_candidates: int
    gate_weight: float

    @property
    def model(self) -> PreTrainedModel:
        return self.target.of(self.side)

    @property
    def guards(self) -> Sequence[GuardrailModule]:
        return self.target.guardrails if self.side == "unlearned" else ()

    def measured(
        self, asked: Sequence[Question], begun: tuple[int, ...], steps: Sequence[int], name: str
    ) -> list[Json]:
        """Points in the order of steps."""
        target = self.target
        generator = torch.Generator().manual_seed(target.seed)
        objective = against_the_gate(self.model, self.guards, self.gate_weight)
        (first,) = self.tried([begun])
        size = max(first.statistic, 1e-6)

        def worth(one: _Tried) -> float:
            return one.loss + self.gate_weight * one.statistic / size

        best, points, n_done = first, [], 0
        for step in steps:
            while n_done < step:
                scores_SV = self.scores(best.suffix, objective)
                proposed = exchanges(scores_SV, best.suffix, self.n_candidates, generator)
                best = min([best, *self.tried(proposed)], key=worth)
                n_done += 1
                target.report(f"suffix, {name}, steps", n_done, max(steps))
            change, is_guarded = self.change(best.suffix), self.side == "unlearned"
            found = target.ask(asked, name=f"{name}/{step}", is_guarded=is_guarded, change=change)
            points.append(of_forget(found) | {"loss": worth(best)})
        return points

    def change(self, suffix: tuple[int, ...]) -> Change:
        """Questions with that suffix in its place."""
        return in_front(suffix, self.target.bos) if self.place == "before" else before_cue(suffix, self.n_cue)

    def tried(self, suffixes: Sequence[tuple[int, ...]]) -> list[_Tried]:
        """What comes of each suffix under the guards, on the attacker's questions."""
        target, questions = self.target, self.known
        pairs = [encode_pair(target.tokenizer, q.context, q.choices[q.answer], bos=target.bos) for q in questions]
        requests = [
            Request(self.change(suffix)(pair.context, 0), pair.continuation) for suffix in suffixes for pair in pairs
        ]
        asked = GuardedModel(
            self.model,
            target.tokenizer,
            target.bos,
            self.guards,
            batch_size=target.batch_size,
            max_length=target.max_length,
        )
        scores = asked.loglikelihoods(requests, Job(target.workers, name="suffixes"))
        found = []
        for i, suffix in enumerate(suffixes):
            own = scores[i * len(pairs) : (i + 1) * len(pairs)]
            loss = -sum(score.loglikelihood for score in own)
            statistic = sum(score.decision.statistic for score in own if score.decision is not None)
            found.append(_Tried(suffix, loss / len(own), statistic / len(own)))
        return found

    def scores(self, suffix: tuple[int, ...], objective: Callable[[AnswerBatch], Tensor]) -> Tensor:
        """How much each token of the vocabulary should help in each place, [S, V]; special ones never do."""
        batch = answer_batch(self.target, self.known, self.change(suffix))
        start_B = batch.tokens.mask_BL.sum(-1) - batch.answer_BL.sum(-1) - self.n_cue - len(suffix)
        if self.place == "before":
            start_B = torch.full_like(start_B, int(self.target.bos is not None))
        slope_SD = slope_of_embeddings(self.model, objective, batch, start_B, len(suffix))
        tokenizer = self.target.tokenizer
        with torch.no_grad():
            words = torch.arange(len(tokenizer), device=slope_SD.device)
            scores_SV = -slope_SD @ self.model.get_input_embeddings()(words).float().T
        scores_SV[:, sorted({*special_ids(tokenizer), *tokenizer.all_special_ids})] = -torch.inf
        return scores_SV


def before_cue(suffix: Sequence[int], n_cue: int) -> Change:
    """A suffix between a question and the words with which every question ends."""

    def change(context: tuple[int, ...], _number: int) -> tuple[int, ...]:
        cut = len(context) - n_cue
        return (*context[:cut], *suffix, *context[cut:])

    return change


def slope_of_embeddings(
    model: PreTrainedModel,
    objective: Callable[[AnswerBatch], Tensor],
    batch: AnswerBatch,
    start_B: Tensor,
    n_tokens: int,
) -> Tensor:
    """The gradient of an objective with respect to the embeddings of S tokens that all rows share, float32, [S, D].

    Args:
        model: A causal language model.
        objective: What the batch is judged by.
        batch: Questions with those tokens in them, and their answers.
        start_B: Where they begin.
        n_tokens: S.
    """
    place_BS = start_B[:, None] + torch.arange(n_tokens, device=start_B.device)
    row_B1 = torch.arange(len(start_B), device=start_B.device)[:, None]
    added: list[Tensor] = []

    def add(_module: nn.Module, _args: tuple[Tensor, ...], output_BLD: Tensor) -> Tensor:
        added.append(torch.zeros(n_tokens, output_BLD.shape[-1], device=output_BLD.device, requires_grad=True))
        change_BSD = added[-1].to(output_BLD.dtype).expand(len(output_BLD), -1, -1)
        return output_BLD + torch.zeros_like(output_BLD).index_put((row_B1, place_BS), change_BSD)

    handle = model.get_input_embeddings().register_forward_hook(add)
    try:
        (slope_SD,) = torch.autograd.grad(objective(batch), added)
    finally:
        handle.remove()
    return slope_SD


def exchanges(
    scores_SV: Tensor, suffix: tuple[int, ...], n_candidates: int, generator: torch.Generator
) -> list[tuple[int, ...]]:
    """Suffixes in which one token is another, drawn among the best of a random position; each once."""
    proposed = scores_SV.topk(min(TOP, scores_SV.shape[1])).indices.tolist()
    found: dict[tuple[int, ...], None] = {}
    for _ in range(n_candidates):
        place = int(torch.randint(len(suffix), (), generator=generator))
        word = proposed[place][int(torch.randint(len(proposed[place]), (), generator=generator))]
        found[(*suffix[:place], word, *suffix[place + 1 :])] = None
    found.pop(suffix, None)
    return list(found)
