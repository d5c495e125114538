"""Soft prompts: vectors that no token has are put in front of the question, and trained until it is answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsg_cli.artifacts import Json
from dsg_cli.attacks.asking import Change
from dsg_cli.attacks.dilution import benign_texts, check_room
from dsg_cli.attacks.gradients import against_the_gate
from dsg_cli.attacks.target import Material, Target, of_forget
from dsg_cli.attacks.training import AnswerBatch, answer_batch, answer_losses
from dsg_cli.guardrail import guarded
from dsg_cli.workers import ALONE

Objective = Literal["loop", "gate"]
IN_WORDS = {"loop": "guard in loop", "gate": "against the gate"}


def attack(
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

    Raises:
        DsgError: There is no benign text, or the tokens do not fit the model.
    """
    check_room(target, [*material.forget, *material.known], tokens, "attack.soft_prompt_tokens")
    begun = benign_texts(material, tokens)[0][:tokens]
    objectives = [one for one in objectives if one != "gate" or target.guardrails] or ["loop"]
    measured: dict[str, list[Json]] = {}
    for number, how in enumerate((None, *objectives)):
        if target.workers.owns(number):
            measured[how or "unguarded"] = _measured(target, material, begun, how, steps, learning_rate, gate_weight)
    found = {how: points for several in target.workers.gathered(measured) for how, points in several.items()}
    return [
        {"x": step, "variant": IN_WORDS[how], "guarded": found[how][i], "unguarded": found["unguarded"][i]}
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
    change, model = in_front(begun, target.bos), target.of("guarded" if how else "unguarded")
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
