"""What does a guarded forward pass cost beside a plain one?

The two take turns on the same tokens in one process, so that whatever else the machine does falls on both; what is
reported is the median of the ratios of pairs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dsg_cli.artifacts import Json
from dsg_cli.errors import DsgError
from dsg_cli.guardrail import GuardrailModule, guarded
from dsg_cli.model import context_length
from dsg_cli.studies.rig import Rig
from dsg_cli.studies.rows import median_row
from dsg_cli.tokens import pad_rows, special_ids

WARM_UP = 2
"""Pairs that are not counted."""


def rows_of(point: Json, rig: Rig) -> list[Json]:
    """Seconds of both, and by how much of the plain one the guarded one takes longer.

    Raises:
        DsgError: The guardrail cannot be made, or the model or the text is too short.
    """
    guards = rig.guards_at({})
    ground, length, batch_size = guards.ground, point["length"], point["batch_size"]
    longest = context_length(ground.loaded.model.config)
    n_body = length - (ground.bos is not None)
    if n_body < 1 or length > longest:
        raise DsgError(f"A pass over {length} tokens is not possible: the model reads {longest}, BOS among them.")
    rows = [piece.ids for piece in rig.pieces("fresh", n_body, True)]
    if not rows:
        raise DsgError(f"The retain text has no {length} tokens in a row.", "Give shorter lengths.")
    tokenizer, device = ground.loaded.tokenizer, str(ground.loaded.model.device)
    batch = pad_rows(
        [rows[i % len(rows)] for i in range(batch_size)], tokenizer.pad_token_id or 0, special_ids(tokenizer), device
    )
    module = guards.make(rig.wanted.at(point)).module
    plain, under = paired_seconds(ground.loaded.model, module, batch.ids_BL, batch.mask_BL, repeats=rig.repeats)
    return [
        median_row(point, "plain_seconds", plain),
        median_row(point, "guarded_seconds", under),
        median_row(point, "overhead", [two / one - 1 for one, two in zip(plain, under, strict=True)]),
    ]


@torch.inference_mode()
def paired_seconds(
    model: nn.Module, guard: GuardrailModule, ids_BL: Tensor, mask_BL: Tensor, *, repeats: int
) -> tuple[list[float], list[float]]:
    """Seconds of plain and of guarded forward passes over the same tokens, pair by pair; each goes first in turn."""

    def forward() -> float:
        begun = _now(ids_BL)
        model(input_ids=ids_BL, attention_mask=mask_BL.long(), use_cache=False)
        return _now(ids_BL) - begun

    def under() -> float:
        # Putting hooks on is no part of a pass.
        with guarded(model, guard, allow_mismatch=True):
            return forward()

    ways: Sequence[Callable[[], float]] = (forward, under)
    found: list[list[float]] = [[], []]
    for number in range(WARM_UP + repeats):
        for way in (0, 1) if number % 2 else (1, 0):
            seconds = ways[way]()
            if number >= WARM_UP:
                found[way].append(seconds)
    return found[0], found[1]


def _now(on: Tensor) -> float:
    """A clock that has waited for the device."""
    if on.is_cuda:
        torch.cuda.synchronize(on.device)
    return time.perf_counter()
