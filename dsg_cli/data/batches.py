"""Token ids to padded batches, and texts to batches on the device, a little ahead of whoever computes on them.

A GPU never waits for the tokenizer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dsg_cli.data.tokens import chunks, counted_tokens, encode, packed, special_ids
from dsg_cli.errors import DsgError

BATCH_TOKENS = 8192  # Tokens, padding included, in a batch of a pass over a corpus.


@dataclass(frozen=True)
class TokenBatch:
    """Right-padded token ids."""

    ids_BL: Tensor
    mask_BL: Tensor  # True for tokens, False for padding.
    special: tuple[int, ...]
    index: tuple[int, ...]  # Position of each row in the list that was batched.

    def rows(self, start: int, stop: int) -> TokenBatch:
        """Some of its rows, without the padding that only the others need."""
        mask_BL = self.mask_BL[start:stop]
        length = int(mask_BL.sum(-1).max())
        ids_BL = self.ids_BL[start:stop, :length]
        return replace(self, ids_BL=ids_BL, mask_BL=mask_BL[:, :length], index=self.index[start:stop])

    def pinned(self) -> TokenBatch:
        """In memory that an accelerator reads while the processor goes on."""
        return replace(self, ids_BL=self.ids_BL.pin_memory(), mask_BL=self.mask_BL.pin_memory())

    def to(self, device: str) -> TokenBatch:
        ids_BL, mask_BL = (tensor.to(device, non_blocking=True) for tensor in (self.ids_BL, self.mask_BL))
        return replace(self, ids_BL=ids_BL, mask_BL=mask_BL)

    @property
    def counted_BL(self) -> Tensor:
        return counted_tokens(self.ids_BL, self.mask_BL, self.special)


def batches(
    rows: Iterable[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_tokens: int = BATCH_TOKENS,
    device: str = "cpu",
) -> Iterator[TokenBatch]:
    """Right-padded batches of similar lengths, each of at most `batch_tokens` tokens including padding."""
    special = special_ids(tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    listed = list(rows)
    groups: list[list[int]] = []
    for i in sorted(range(len(listed)), key=lambda i: -len(listed[i])):
        if not groups or len(listed[groups[-1][0]]) * (len(groups[-1]) + 1) > batch_tokens:
            groups.append([])
        groups[-1].append(i)
    for group in groups:
        yield pad_rows([listed[j] for j in group], pad, special, device, index=group)


def pad_rows(
    rows: Sequence[list[int]],
    pad: int,
    special: tuple[int, ...],
    device: str = "cpu",
    *,
    index: Sequence[int] | None = None,
) -> TokenBatch:
    """One right-padded batch."""
    length = max(len(row) for row in rows)
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows], device=device)
    mask = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows], device=device)
    return TokenBatch(ids, mask, special, tuple(index if index is not None else range(len(rows))))


TEXTS_AT_ONCE = 256
BUCKET_TOKENS = 32 * BATCH_TOKENS  # Rows of similar lengths are put together within a bucket of so many tokens.
AHEAD = 4  # Batches that lie ready, at most.
Item = TypeVar("Item")


def stream_batches(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    bos: int | None,
    seq_len: int,
    max_tokens: int | None = None,
    is_packed: bool = False,
    device: str = "cpu",
) -> Iterator[TokenBatch]:
    """The texts as right-padded batches, tokenised in a thread of their own.

    Documents longer than `seq_len` tokens are read in rows of so many, each of which begins with `bos`; packed, they
    are joined with EOS and cut into full rows, as the paper does. It stops after about `max_tokens`.
    """
    rows = _rows(tokenizer, texts, bos=bos, seq_len=seq_len, is_packed=is_packed)
    is_cuda = device.startswith("cuda")

    def ready() -> Iterator[TokenBatch]:
        for bucket in _buckets(rows, max_tokens):
            for batch in batches(bucket, tokenizer):
                yield batch.pinned() if is_cuda else batch

    for batch in _ahead(ready()):
        yield batch.to(device)


def estimated_tokens(texts: Sequence[str], max_tokens: int | None = None) -> int:
    """About how many tokens texts have, for progress: four characters each."""
    n_tokens = sum(map(len, texts)) // 4 + 1
    return n_tokens if max_tokens is None else min(n_tokens, max_tokens)


def _rows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, bos: int | None, seq_len: int, is_packed: bool
) -> Iterator[list[int]]:
    documents = (
        ids
        for start in range(0, len(texts), TEXTS_AT_ONCE)
        for ids in encode(tokenizer, texts[start : start + TEXTS_AT_ONCE], bos=bos)
    )
    if not is_packed:
        for ids in documents:
            yield from chunks(ids, seq_len, bos=bos)
        return
    is_empty = True
    for row in packed(documents, seq_len, bos=bos, eos=tokenizer.eos_token_id):
        is_empty = False
        yield row
    if is_empty:
        raise DsgError(f"The text does not fill one row of {seq_len} tokens.", "Give more, or lower select.seq_len.")


def _buckets(rows: Iterable[list[int]], max_tokens: int | None) -> Iterator[list[list[int]]]:
    bucket: list[list[int]] = []
    n_bucket = n_all = 0
    for row in rows:
        bucket.append(row)
        n_bucket += len(row)
        n_all += len(row)
        is_enough = max_tokens is not None and n_all >= max_tokens
        if is_enough or n_bucket >= BUCKET_TOKENS:
            yield bucket
            bucket, n_bucket = [], 0
        if is_enough:
            return
    if bucket:
        yield bucket


def _ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The items, made ahead in another thread; an exception there is raised here."""
    iterator = iter(items)

    @torch.inference_mode()
    def following() -> Item | None:
        return next(iterator, None)

    worker = ThreadPoolExecutor(max_workers=1)
    try:
        ready = deque(worker.submit(following) for _ in range(AHEAD))
        while (item := ready.popleft().result()) is not None:
            ready.append(worker.submit(following))
            yield item
    finally:
        worker.shutdown(cancel_futures=True)
