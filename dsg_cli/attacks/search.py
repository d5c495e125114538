"""Attacks that search with gradients on a copy of model and guardrail: soft prompts, and suffixes of tokens.

A gate opens or stays shut, which has no slope. The number behind it has one, and whoever lowers it far enough keeps the
gate shut: what is minimised is the loss of right answers and, beside it, how strongly the gate is excited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsg_cli.attacks.prompts import benign_texts, check_room, cue_length, insert
from dsg_cli.attacks.relearn import AnswerBatch, answer_batch, answer_losses
from dsg_cli.attacks.target import BASE, SIDES, UNLEARNED, AttackerKnowledge, Target
from dsg_cli.data.tokens import Request, encode_pair, special_ids
from dsg_cli.evals.questions import Change, Question
from dsg_cli.guardrail.guarded import guarded
from dsg_cli.guardrail.runtime.guardrail import GuardrailModule
from dsg_cli.inference.scoring import GuardedModel
from dsg_cli.job import ALONE, Job
from dsg_cli.models.residuals import replace_residual
from dsg_cli.settings import AttackSection
from dsg_cli.workspace.body import Json

Loss = Callable[[AnswerBatch], Tensor]

Objective = Literal["loop", "gate"]

IN_WORDS: dict[Objective, str] = {"loop": "guard in loop", "gate": "against the gate"}

TOP = 64
"""Tokens that gradients propose at each position of a suffix."""


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
    """Of the bare model: the loss of each answer, [B], and the sum of the guards' soft statistics, [B]."""
    statistics: list[Tensor] = []

    def watching(guard: GuardrailModule) -> Callable[[Tensor], Tensor]:
        def watch(resid_BLD: Tensor) -> Tensor:
            guard.to(resid_BLD.device)
            statistics.append(soft_statistic(guard, resid_BLD, batch.tokens.counted_BL.to(resid_BLD.device)))
            return resid_BLD

        return watch

    with ExitStack() as hooks:
        for guard in guards:
            hooks.enter_context(replace_residual(model, guard.read, watching(guard)))
        losses_B = answer_losses(model, batch)
    sum_B = torch.zeros_like(losses_B)
    for statistic_B in statistics:
        sum_B = sum_B + statistic_B.to(losses_B.device)
    return losses_B, sum_B


def against_the_gate(model: PreTrainedModel, guards: Sequence[GuardrailModule], gate_weight: float) -> Loss:
    """The mean loss of answers without the guard, and the mean statistic relative to that of the first batch; with no
    guards, the loss alone."""
    first: list[Tensor] = []

    def loss(batch: AnswerBatch) -> Tensor:
        losses_B, statistics_B = losses_and_statistics(model, guards, batch)
        if not first:
            first.append(statistics_B.detach().mean().clamp(min=1e-6))
        return losses_B.mean() + gate_weight * statistics_B.mean() / first[0]

    return loss


def attack_soft_prompt(target: Target, knowledge: AttackerKnowledge, settings: AttackSection) -> list[Json]:
    """Soft prompts: vectors that no token has are put in front of the question, and trained until it is answered.

    A prompt of `soft_prompt_tokens` vectors, which stands after BOS, begins as the embeddings of benign tokens, so that
    0 steps is a dilution by them. The guardrail must know which tokens count: it is given the ids of those benign
    tokens, each of which counts, and the output of the embedding layer is replaced in their place.

    A point for each of `soft_prompt_steps` of Adam, whose learning rate is relative to the size of an entry of the
    first prompt (root mean square). A variant for each of `soft_prompt_objectives`: the loss of right answers with the
    guard in the `loop`, or that without the guard and, with `soft_prompt_gate_weight`, the statistic of the `gate`.
    Sides also hold `loss`, which is what is minimised, on the attacker's questions. Workers take one training each. A
    run that goes on trains again, and asks only what is missing.
    """
    n_tokens, guardrails = settings.soft_prompt_tokens, target.unlearned.guardrails
    check_room(target, [*knowledge.forget, *knowledge.known], n_tokens, "attack.soft_prompt_tokens")
    benign = benign_texts(knowledge, n_tokens)[0][:n_tokens]
    objectives = [name for name in settings.soft_prompt_objectives if name != "gate" or guardrails] or ["loop"]
    own: dict[str, list[Json]] = {}
    for number, objective in enumerate((None, *objectives)):
        if target.job.workers.owns(number):
            own[objective or BASE] = _train_prompt(target, knowledge, settings, benign, objective)
    points = {name: side for shared in target.job.workers.gathered(own) for name, side in shared.items()}
    return [
        {"x": step, "variant": IN_WORDS[objective], UNLEARNED: points[objective][i], BASE: points[BASE][i]}
        for objective in objectives
        for i, step in enumerate(settings.soft_prompt_steps)
    ]


def _train_prompt(
    target: Target,
    knowledge: AttackerKnowledge,
    settings: AttackSection,
    benign: list[int],
    objective: Objective | None,
) -> list[Json]:
    """One side of the points in the order of steps: of the unlearned model by an objective, of the base one without."""
    attacked = target.unlearned if objective else target.base
    model, guardrails = attacked.model, attacked.guardrails if objective == "loop" else ()

    def change(context: tuple[int, ...], _number: int) -> tuple[int, ...]:
        return insert(context, attacked.bos, before=benign)

    def answer_loss(batch: AnswerBatch) -> Tensor:
        with guarded(model, guardrails, allow_mismatch=True):
            return answer_losses(model, batch).mean()

    if objective == "gate":
        loss_of = against_the_gate(model, attacked.guardrails, settings.soft_prompt_gate_weight)
    else:
        loss_of = answer_loss
    batch = answer_batch(attacked, knowledge.known, change)
    with torch.no_grad():
        prompt_PD = model.get_input_embeddings()(torch.tensor(benign, device=attacked.device)).float()
    prompt_PD.requires_grad_(True)
    size = float(prompt_PD.detach().square().mean().sqrt())
    optimizer = torch.optim.Adam([prompt_PD], lr=settings.soft_prompt_learning_rate * size)
    n_done, points = 0, []
    with embedded(model, prompt_PD, benign):
        loss = loss_of(batch)
        for step in settings.soft_prompt_steps:
            while n_done < step:
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                loss = loss_of(batch)
                n_done += 1
                name = f"soft prompt, {objective or BASE}, steps"
                target.job.progress(name, n_done, max(settings.soft_prompt_steps))
            alone = replace(target.job, workers=ALONE)
            measured = target.measure(attacked, knowledge.forget, f"{objective}/{step}", change=change, job=alone)
            points.append(measured | {"loss": loss.item()})
    return points


@contextmanager
def embedded(model: PreTrainedModel, prompt_PD: Tensor, ids: Sequence[int]) -> Iterator[None]:
    """While the block runs, the embeddings of P ids in a row are those of a prompt, where a row first has them.

    Rows without them stay as they are: a filter may have put a refusal in the place of the question.
    """

    def replace_embeddings(_module: nn.Module, args: tuple[Tensor, ...], output_BLD: Tensor) -> Tensor:
        ids_BL, ids_P = args[0], torch.tensor(list(ids), device=output_BLD.device)
        if ids_BL.shape[1] < len(ids_P):
            return output_BLD
        is_there_BN = (ids_BL.unfold(1, len(ids_P), 1) == ids_P).all(-1)
        row_R = is_there_BN.any(1).nonzero()[:, 0]
        start_R = is_there_BN.int().argmax(1)[row_R]
        place_RP = start_R[:, None] + torch.arange(len(ids_P), device=output_BLD.device)
        prompt_RPD = prompt_PD.to(output_BLD).expand(len(row_R), -1, -1)
        return output_BLD.index_put((row_R[:, None], place_RP), prompt_RPD)

    handle = model.get_input_embeddings().register_forward_hook(replace_embeddings)
    try:
        yield
    finally:
        handle.remove()


def attack_suffix(target: Target, knowledge: AttackerKnowledge, settings: AttackSection) -> list[Json]:
    """Suffix: a few tokens around every question, found with gradients, that keep the gate shut or bring the answer
    back.

    Greedy coordinate gradient: in each step, gradients propose exchanges of single tokens, and the best of
    `suffix_candidates`, as the guarded model itself judges them on the attacker's questions, is made; then the other
    questions are asked with it. The tokens are fed as ids, which text may not be able to spell: what is found is an
    upper bound on what such a prompt can do. It begins as benign text, so that 0 steps is a dilution by it.

    A point for each of `suffix_steps`. A variant for each of `suffix_places`: `after` the question, before its cue, or
    `before` it, where also a gate that stays open once it has opened can be kept from opening. Beside the loss of right
    answers stands, with `suffix_gate_weight`, the gate's statistic relative to what it is at first: where the gate
    stays open, the loss alone does not tell which exchange brings it nearer to shutting. Sides also hold `loss`, which
    is what is minimised. Workers share every step. A run that goes on searches again, and asks only what is missing.
    """
    n_tokens, questions = settings.suffix_tokens, [*knowledge.forget, *knowledge.known]
    check_room(target, questions, n_tokens, "attack.suffix_tokens")
    benign = tuple(benign_texts(knowledge, n_tokens)[0][:n_tokens])
    n_cue = cue_length(target.unlearned, questions)
    curve = []
    for place in settings.suffix_places:
        points = {
            side: _SuffixSearch(target, model, knowledge.known, place, n_cue, settings).points(
                knowledge.forget, benign, f"{place}/{side}"
            )
            for side, model in target.models.items()
        }
        for i, step in enumerate(settings.suffix_steps):
            curve.append({"x": step, "variant": place, **{side: points[side][i] for side in SIDES}})
    return curve


@dataclass(frozen=True)
class _Candidate:
    """A suffix and what comes of it, in the mean over the attacker's questions."""

    suffix: tuple[int, ...]
    loss: float
    """Of the right answer."""
    statistic: float
    """Of the gate nearest to opening."""


@dataclass(frozen=True)
class _SuffixSearch:
    """A search against one of the models."""

    target: Target
    model: GuardedModel
    known: Sequence[Question]
    place: Literal["after", "before"]
    n_cue: int
    settings: AttackSection

    def points(self, questions: Sequence[Question], benign: tuple[int, ...], name: str) -> list[Json]:
        """One side of the points in the order of steps."""
        settings, gate_weight = self.settings, self.settings.suffix_gate_weight
        generator = torch.Generator().manual_seed(self.target.seed)
        loss = against_the_gate(self.model.model, self.model.guardrails, gate_weight)
        (best,) = self.judge([benign])
        size = max(best.statistic, 1e-6)

        def total(candidate: _Candidate) -> float:
            return candidate.loss + gate_weight * candidate.statistic / size

        n_done, points = 0, []
        for step in settings.suffix_steps:
            while n_done < step:
                scores_SV = self.exchange_scores(best.suffix, loss)
                suffixes = exchanges(scores_SV, best.suffix, settings.suffix_candidates, generator)
                best = min([best, *self.judge(suffixes)], key=total)
                n_done += 1
                self.target.job.progress(f"suffix, {name}, steps", n_done, max(settings.suffix_steps))
            measured = self.target.measure(self.model, questions, f"{name}/{step}", change=self.insertion(best.suffix))
            points.append(measured | {"loss": total(best)})
        return points

    def insertion(self, suffix: tuple[int, ...]) -> Change:
        """Put the suffix in its place in a question."""
        bos, n_cue = self.model.bos, self.n_cue

        def change(context: tuple[int, ...], _number: int) -> tuple[int, ...]:
            if self.place == "before":
                return insert(context, bos, before=suffix)
            return insert(context, bos, after=suffix, n_cue=n_cue)

        return change

    def judge(self, suffixes: Sequence[tuple[int, ...]]) -> list[_Candidate]:
        """What comes of each suffix under the guards, on the attacker's questions."""
        tokenizer, bos, n = self.model.tokenizer, self.model.bos, len(self.known)
        pairs = [encode_pair(tokenizer, q.context, q.choices[q.answer], bos=bos) for q in self.known]
        requests = [
            Request(self.insertion(suffix)(pair.context, 0), pair.continuation) for suffix in suffixes for pair in pairs
        ]
        within = replace(self.model, wrappers=())
        scores = within.loglikelihoods(requests, Job(self.target.job.workers, name="suffixes"))
        candidates = []
        for i, suffix in enumerate(suffixes):
            own = scores[i * n : (i + 1) * n]
            loss = -sum(score.loglikelihood for score in own)
            statistic = sum(score.decision.statistic if score.decision else 0.0 for score in own)
            candidates.append(_Candidate(suffix, loss / n, statistic / n))
        return candidates

    def exchange_scores(self, suffix: tuple[int, ...], loss: Loss) -> Tensor:
        """How much each token of the vocabulary should help in each place, [S, V]; special ones never do."""
        batch = answer_batch(self.model, self.known, self.insertion(suffix))
        start_B = batch.tokens.mask_BL.sum(-1) - batch.answer_BL.sum(-1) - self.n_cue - len(suffix)
        if self.place == "before":
            start_B = torch.full_like(start_B, int(self.model.bos is not None))
        model, tokenizer = self.model.model, self.model.tokenizer
        slope_SD = slope_of_embeddings(model, loss, batch, start_B, len(suffix))
        with torch.no_grad():
            words = torch.arange(len(tokenizer), device=slope_SD.device)
            scores_SV = -slope_SD @ model.get_input_embeddings()(words).float().T
        scores_SV[:, sorted({*special_ids(tokenizer), *tokenizer.all_special_ids})] = -torch.inf
        return scores_SV


def slope_of_embeddings(
    model: PreTrainedModel, loss: Loss, batch: AnswerBatch, start_B: Tensor, n_tokens: int
) -> Tensor:
    """The gradient of a loss with respect to the embeddings of S tokens that all rows share, float32, [S, D].

    Args:
        model: A causal language model.
        loss: What the batch is judged by.
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
        (slope_SD,) = torch.autograd.grad(loss(batch), added)
    finally:
        handle.remove()
    return slope_SD


def exchanges(
    scores_SV: Tensor, suffix: tuple[int, ...], n_candidates: int, generator: torch.Generator
) -> list[tuple[int, ...]]:
    """Suffixes in which one token is another, drawn among the best of a random position; each once."""
    proposed = scores_SV.topk(min(TOP, scores_SV.shape[1])).indices.tolist()
    suffixes: dict[tuple[int, ...], None] = {}
    for _ in range(n_candidates):
        place = int(torch.randint(len(suffix), (), generator=generator))
        word = proposed[place][int(torch.randint(len(proposed[place]), (), generator=generator))]
        suffixes[(*suffix[:place], word, *suffix[place + 1 :])] = None
    suffixes.pop(suffix, None)
    return list(suffixes)
