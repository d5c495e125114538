"""Batches that do not fit in memory are halved, and the work goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from dsg_cli.errors import DsgError
from dsg_cli.tokens import TokenBatch

Result = TypeVar("Result")
Work = TypeVar("Work")


NO_MEMORY = ("not enough memory", "can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""How it is said where it has no type of its own: on a CPU, and inside a library of the GPU."""


class Fitting:
    """Runs work on batches; remembers what was too large, so that it is tried once."""

    def __init__(self) -> None:
        self.too_large: int | None = None
        """Tokens, padding included, of the smallest batch that did not fit."""

    def __call__(
        self, batch: TokenBatch, compute: Callable[[TokenBatch], Result]
    ) -> Iterator[tuple[TokenBatch, Result]]:
        """`compute(batch)`, or of parts of it that fit, in order.

        Raises:
            DsgError: A single sequence does not fit.
        """
        pending = [batch]
        while pending:
            part = pending.pop()
            n_rows, n_tokens = len(part.index), part.ids_BL.numel()
            if n_rows > 1 and self.too_large is not None and n_tokens >= self.too_large:
                pending += _halves(part)[::-1]
                continue
            result = _attempt(part, compute)
            if result is not None:
                yield part, result[0]
                continue
            if n_rows == 1:
                raise DsgError(
                    f"A single sequence of {n_tokens} tokens does not fit in memory.",
                    "Try --dtype bfloat16, or shorter rows (--set select.seq_len=512).",
                )
            self.too_large = n_tokens
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            pending += _halves(part)[::-1]


def in_halves(rows: Tensor, compute: Callable[[Tensor], Result]) -> Iterator[Result]:
    """`compute` of rows of a tensor, or of their halves where memory runs out.

    Raises:
        DsgError: A single row does not fit.
    """
    result = _attempt(rows, compute)
    if result is not None:
        yield result[0]
    elif len(rows) == 1:
        raise DsgError("A single token does not fit in memory.", "Choose a smaller SAE, or another --device.")
    else:
        for half in torch.split(rows, (len(rows) + 1) // 2):
            yield from in_halves(half, compute)


def _attempt(batch: Work, compute: Callable[[Work], Result]) -> tuple[Result] | None:
    """None where memory ran out; the exception, which holds every tensor on its way, is gone on return."""
    try:
        return (compute(batch),)
    except torch.OutOfMemoryError:
        return None
    except RuntimeError as error:
        if any(words in str(error) for words in NO_MEMORY):
            return None
        raise


def _halves(batch: TokenBatch) -> list[TokenBatch]:
    middle = len(batch.index) // 2
    return [batch.rows(0, middle), batch.rows(middle, len(batch.index))]
