"""Texts to token batches: the one policy for BOS, padding and EOS.

Shape suffixes used throughout the package: B batch, L position, T tokens of several sequences in a row,
D model width, F features of the SAE, K chosen features, V vocabulary.

BOS comes first wherever the tokenizer has one and either puts it there by itself or the SAE was trained with it: in
selection, calibration, evaluation and attacks alike (`bos_to_prepend`).

A token is *counted* if it is neither padding nor BOS, EOS or pad: only counted tokens enter a statistic, can be
hot, or are edited.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

BATCH_TOKENS = 8192
"""Tokens, padding included, in a batch of a pass over a corpus."""


@dataclass(frozen=True)
class TokenBatch:
    """Right-padded token ids."""

    ids_BL: Tensor
    mask_BL: Tensor
    """True for tokens, False for padding."""
    special: tuple[int, ...]
    index: tuple[int, ...]
    """Position of each row in the list that was batched."""

    def rows(self, start: int, stop: int) -> TokenBatch:
        """Some of its rows, without the padding that only the others need."""
        mask_BL = self.mask_BL[start:stop]
        length = int(mask_BL.sum(-1).max())
        ids_BL = self.ids_BL[start:stop, :length]
        return TokenBatch(ids_BL, mask_BL[:, :length], self.special, self.index[start:stop])

    def pinned(self) -> TokenBatch:
        """In memory that an accelerator reads while the processor goes on."""
        return TokenBatch(self.ids_BL.pin_memory(), self.mask_BL.pin_memory(), self.special, self.index)

    def to(self, device: str) -> TokenBatch:
        """On a device."""
        ids_BL, mask_BL = (tensor.to(device, non_blocking=True) for tensor in (self.ids_BL, self.mask_BL))
        return TokenBatch(ids_BL, mask_BL, self.special, self.index)

    @property
    def counted_BL(self) -> Tensor:
        """True where a token is counted."""
        return counted_tokens(self.ids_BL, self.mask_BL, self.special)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of BOS, EOS and pad, those that the tokenizer has."""
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return tuple(sorted({int(i) for i in ids if i is not None}))


def counted_tokens(ids_BL: Tensor, mask_BL: Tensor | None, special: Sequence[int] | Tensor) -> Tensor:
    """True for tokens that are neither padding nor special, shape [B, L].

    Without a mask, padding is recognised by its id, which is special.
    """
    special_S = torch.as_tensor(special, device=ids_BL.device)
    counted_BL = ~torch.isin(ids_BL, special_S)
    return counted_BL if mask_BL is None else counted_BL & mask_BL.bool()


def bos_to_prepend(tokenizer: PreTrainedTokenizerBase, sae_prepends: bool) -> int | None:
    """The BOS id that every sequence begins with, or None."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return None
    adds_itself = list(tokenizer("a")["input_ids"][:1]) == [bos]
    return int(bos) if sae_prepends or adds_itself else None


def with_bos(ids: Sequence[int], bos: int | None) -> list[int]:
    """The ids with that BOS in front, once."""
    return list(ids) if bos is None or list(ids[:1]) == [bos] else [bos, *ids]


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, bos: int | None) -> list[list[int]]:
    """Token ids of each text, that BOS first; no EOS."""
    rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    return [with_bos(row, bos) for row in rows]


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token as it stands after the one before it: with the space that a tokenizer hides in it."""
    alone = [str(tokenizer.decode([one])) for one in ids]
    found = alone[:1]
    for i in range(1, len(alone)):
        both = str(tokenizer.decode(list(ids[i - 1 : i + 1])))
        found.append(both.removeprefix(alone[i - 1]) if both.startswith(alone[i - 1]) else alone[i])
    return found


def chunks(ids: list[int], seq_len: int, *, bos: int | None) -> Iterator[list[int]]:
    """A long sequence as consecutive rows of at most `seq_len` tokens, each with the BOS of the first."""
    head = [bos] if bos is not None and ids[:1] == [bos] else []
    body, step = ids[len(head) :], seq_len - len(head)
    for start in range(0, len(body), step):
        yield head + body[start : start + step]


def packed(documents: Iterable[list[int]], seq_len: int, *, bos: int | None, eos: int | None) -> Iterator[list[int]]:
    """Documents joined with EOS and cut into rows of `seq_len` tokens, BOS first; what fills no row is left out."""
    head = [] if bos is None else [bos]
    tail = [] if eos is None else [eos]
    body: list[int] = []
    for ids in documents:
        body += ids[len(head) :] + tail
        while len(body) >= seq_len - len(head):
            yield head + body[: seq_len - len(head)]
            body = body[seq_len - len(head) :]


def as_chat(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """What a user says, in the tokenizer's chat template, up to where the answer begins."""
    turns = [{"role": "user", "content": text}]
    made: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return made


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
    order = sorted(range(len(listed)), key=lambda i: -len(listed[i]))
    group: list[int] = []
    for i in order:
        if group and len(listed[group[0]]) * (len(group) + 1) > batch_tokens:
            yield pad_rows([listed[j] for j in group], pad, special, device, index=group)
            group = []
        group.append(i)
    if group:
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
