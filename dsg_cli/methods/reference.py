"""The model as it was before training, without a second copy of it: only what is trained is kept, and put back for a
forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Reference:
    """The values of some parameters at the time when this was made.

    `with reference():` a model that holds them computes as it did then, without gradients. They are exchanged by
    reference, so that it costs no time; of adapters, which begin as 0, it is the base model.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.values: list[Tensor] = [one.detach().clone() for one in self.parameters]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The block runs on the values of then."""
        now = [one.data for one in self.parameters]
        try:
            for one, value in zip(self.parameters, self.values, strict=True):
                one.data = value
            with torch.no_grad():
                yield
        finally:
            for one, value in zip(self.parameters, now, strict=True):
                one.data = value
