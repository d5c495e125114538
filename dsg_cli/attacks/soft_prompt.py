"""Soft prompts: vectors that no token has are put in front of the question, and trained until it is answered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsg_cli.artifacts import Json
from dsg_cli.attacks.asking import Change
from dsg_cli.attacks.dilution import check_room, long_texts
from dsg_cli.attacks.target import SIDES, Material, Target, of_forget
from dsg_cli.attacks.training import AnswerBatch, answer_batch, answer_losses
from dsg_cli.guardrail import guarded
from dsg_cli.workers import ALONE


def attack(
    target: Target, material: Material, *, tokens: int, steps: Sequence[int], learning_rate: float
) -> list[Json]:
    """Train a prompt on the attacker's questions, with the guard on; measure as it goes.

    The prompt begins as the embeddings of benign tokens, so that 0 steps is a dilution by them. The guardrail must
    know which tokens count: it is given the ids of those benign tokens, each of which counts, and the output of the
    embedding layer is replaced in their place. Workers take one side each.

    Args:
        target: What is attacked.
        material: The attacker trains on `known`, and begins from `benign` text; `forget` is asked.
        tokens: Vectors in the prompt, which stands after BOS.
        steps: Of Adam, at which to measure, ascending; 0 is the prompt that it begins with.
        learning_rate: Of Adam, relative to the size of an entry of the first prompt (root mean square).

    Returns:
        Points whose sides also hold `loss`, which is what is minimised, on the attacker's questions.

    Raises:
        DsgError: No benign text has so many tokens, or they do not fit the model.
    """
    check_room(target, [*material.forget, *material.known], tokens, "attack.soft_prompt_tokens")
    begun = long_texts(material.benign, tokens, "attack.soft_prompt_tokens")[0][:tokens]
    measured: dict[str, list[Json]] = {}
    for number, side in enumerate(SIDES):
        if target.workers.owns(number):
            measured[side] = _one_side(target, material, begun, side, steps, learning_rate)
    of_all = {side: points for several in target.workers.gathered(measured) for side, points in several.items()}
    return [{"x": step, "variant": "", **{side: of_all[side][i] for side in SIDES}} for i, step in enumerate(steps)]


def _one_side(
    target: Target, material: Material, begun: list[int], side: str, steps: Sequence[int], learning_rate: float
) -> list[Json]:
    guards = target.guardrails if side == "guarded" else ()
    change = in_front(begun, target.bos)
    batch = answer_batch(target, material.known, change)
    with torch.no_grad():
        prompt_PD = target.model.get_input_embeddings()(torch.tensor(begun, device=target.device)).float()
    prompt_PD.requires_grad_(True)
    size = float(prompt_PD.detach().square().mean().sqrt())
    optimizer = torch.optim.Adam([prompt_PD], lr=learning_rate * size)
    n_done, points = 0, []
    with embedded(target.model, prompt_PD, first=int(target.bos is not None)):
        for step in steps:
            while n_done < step:
                with guarded(target.model, guards, allow_mismatch=True):
                    _step(target.model, optimizer, batch)
                n_done += 1
                target.report(f"soft prompt, {side}", n_done, max(steps))
            with guarded(target.model, guards, allow_mismatch=True), torch.no_grad():
                loss = float(answer_losses(target.model, batch).mean())
            found = target.ask(
                material.forget, name=f"{side}/{step}", is_guarded=bool(guards), change=change, workers=ALONE
            )
            points.append(of_forget(found) | {"loss": loss})
    return points


def _step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, batch: AnswerBatch) -> None:
    optimizer.zero_grad(set_to_none=True)
    answer_losses(model, batch).mean().backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def in_front(ids: Sequence[int], bos: int | None) -> Change:
    """Ids put in front of a context, after its BOS."""

    def change(context: tuple[int, ...], _number: int) -> tuple[int, ...]:
        n_head = int(bos is not None)
        return (*context[:n_head], *ids, *context[n_head:])

    return change


@contextmanager
def embedded(model: PreTrainedModel, prompt_PD: Tensor, *, first: int) -> Iterator[None]:
    """While the block runs, every row's P embeddings from position `first` on are those of a prompt."""
    last = first + len(prompt_PD)

    def replace(_module: nn.Module, _args: tuple[Tensor, ...], output_BLD: Tensor) -> Tensor:
        prompt_BPD = prompt_PD.to(output_BLD).expand(len(output_BLD), -1, -1)
        return torch.cat([output_BLD[:, :first], prompt_BPD, output_BLD[:, last:]], 1)

    handle = model.get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
