"""Read or replace what a module of a Hugging Face model reads or writes; hooks never outlive their block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dsg_cli.data.batches import TokenBatch, pad_rows
from dsg_cli.data.tokens import special_ids
from dsg_cli.errors import NO_MEMORY, DsgError
from dsg_cli.guardrail.runtime.sites import HookSite, edit_site
from dsg_cli.job import PLAIN_JOB, Job
from dsg_cli.models.language_model import text_config


class _ReachedError(Exception):
    """Raised inside the forward pass once the residual is known: nothing above it needs to run."""


def read_residual(model: nn.Module, site: HookSite, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """The activations at `site`, [B, L, D] in the model's dtype, on the ids' device; layers above it are not run."""
    residuals: list[Tensor] = []

    def keep(resid_BLD: Tensor) -> Tensor:
        residuals.append(resid_BLD)
        raise _ReachedError

    with replace_residual(model, site, keep), suppress(_ReachedError):
        model(input_ids=ids_BL, attention_mask=mask_BL.long(), use_cache=False)
    return residuals[0].to(ids_BL.device)


@contextmanager
def replace_residual(model: nn.Module, site: HookSite, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While the block runs, the activation at `site` is `edit(activation)`."""
    handle = edit_site(model, site, edit)
    try:
        yield
    finally:
        handle.remove()


Result = TypeVar("Result")
Work = TypeVar("Work")


class OomSplitter:
    """Runs one pass over batches, each in parts that fit in memory; remembers what was too large."""

    def __init__(self) -> None:
        self.too_large: int | None = None
        """Tokens, padding included, of the smallest batch that did not fit: no larger one is tried again."""

    def __call__(
        self, batch: TokenBatch, compute: Callable[[TokenBatch], Result]
    ) -> Iterator[tuple[TokenBatch, Result]]:
        """`compute(batch)`, or of parts of it that fit, in order."""
        pending = [batch]
        while pending:
            part = pending.pop()
            n_rows, n_tokens = len(part.index), part.ids_BL.numel()
            if n_rows == 1 or self.too_large is None or n_tokens < self.too_large:
                if (result := _attempt(part, compute)) is not None:
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
            pending += [part.rows(n_rows // 2, n_rows), part.rows(0, n_rows // 2)]


def split_rows_on_oom(rows: Tensor, compute: Callable[[Tensor], Result]) -> Iterator[Result]:
    """`compute` of rows of a tensor, or of their halves where memory runs out."""
    if (result := _attempt(rows, compute)) is not None:
        yield result[0]
    elif len(rows) == 1:
        raise DsgError("A single token does not fit in memory.", "Choose a smaller SAE, or another --device.")
    else:
        for half in torch.split(rows, (len(rows) + 1) // 2):
            yield from split_rows_on_oom(half, compute)


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


@torch.inference_mode()
def mean_residuals(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    *,
    layer: int,
    batch_size: int,
    job: Job = PLAIN_JOB,
) -> Tensor:
    """The mean residual of each row after a decoder layer, [N, D] in float32 on the CPU; 0 where no token counts.

    Layers above it are not run. Batches are of similar lengths, longest first, and shared among workers; a row whose
    residual is not finite stays so.
    """
    site, split_on_oom = HookSite(layer, "resid_post"), OomSplitter()
    special, device = special_ids(tokenizer), str(next(model.parameters()).device)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    mean_ND = torch.zeros(len(rows), int(text_config(model.config).hidden_size))
    n_tokens, total = 0, sum(map(len, rows))

    def pooled(batch: TokenBatch) -> Tensor:
        resid_BLD = read_residual(model, site, batch.ids_BL, batch.mask_BL).float()
        counted_BL = batch.counted_BL
        sum_BD = torch.where(counted_BL[..., None], resid_BLD, 0.0).sum(1)
        return (sum_BD / counted_BL.sum(1, keepdim=True).clamp(min=1)).cpu()

    for number, start in enumerate(range(0, len(order), batch_size)):
        index = order[start : start + batch_size]
        n_tokens += sum(len(rows[i]) for i in index)
        if job.workers.owns(number):
            whole = pad_rows([list(rows[i]) for i in index], tokenizer.pad_token_id or 0, special, device, index=index)
            for batch, mean_BD in split_on_oom(whole, pooled):
                mean_ND[list(batch.index)] = mean_BD
        job.progress(f"{job.name}, tokens", n_tokens, total)
    return job.workers.total([mean_ND])[0] if job.workers.n > 1 else mean_ND
