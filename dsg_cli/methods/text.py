"""Text as training sees it: rows of tokens, drawn in an order that follows from the seed alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dsg_cli.data.batches import TokenBatch, pad_rows
from dsg_cli.data.corpora import Corpus, Part
from dsg_cli.data.tokens import chunks, encode, prompts, special_ids
from dsg_cli.errors import DsgError
from dsg_cli.settings import Finetune

PARTS: tuple[Part, ...] = ("select", "calibrate")
"""What a method learns from: all that a guardrail is made from. The rest measures."""


@dataclass(frozen=True)
class Text:
    """Rows of token ids, by corpus."""

    rows: list[list[int]]
    corpus: list[int]
    """Number of the corpus that each row is from."""
    weights: list[float]
    """Of each corpus: how often its rows are drawn, relative to those of the others."""
    pad: int
    special: tuple[int, ...]
    device: str
    first: list[int] = field(default_factory=list)
    """Position in each row of the first token that counts in a loss; empty where all do."""

    def batch(self, index: Sequence[int]) -> TokenBatch:
        """These rows, right-padded; `index` of the batch says which they are."""
        return pad_rows([self.rows[i] for i in index], self.pad, self.special, self.device, index=index)

    def draws(self, n: int, seed: int) -> list[int]:
        """Numbers of n rows: a corpus by its weight each time, and of a corpus each row before any comes again."""
        rng = random.Random(seed)
        pools = [[i for i, corpus in enumerate(self.corpus) if corpus == c] for c in range(len(self.weights))]
        orders = [_endless(pool, rng) for pool in pools]
        return [next(orders[c]) for c in rng.choices(range(len(pools)), self.weights, k=n)]


def _endless(pool: list[int], rng: random.Random) -> Iterator[int]:
    while True:
        yield from rng.sample(pool, len(pool))


def text_of(
    tokenizer: PreTrainedTokenizerBase, corpora: Sequence[Corpus], *, bos: int | None, max_tokens: int, device: str
) -> Text:
    """The text of corpora, but for what measures; corpora without a weight count alike.

    Args:
        tokenizer: The model's.
        corpora: Forget or retain text.
        bos: Token that every row begins with.
        max_tokens: Longer documents are cut to rows of so many.
        device: Where batches are wanted.
    """
    rows: list[list[int]] = []
    owners: list[int] = []
    for number, corpus in enumerate(corpora):
        texts = [text for part in PARTS for text in prompts(tokenizer, corpus, part)]
        found = [row for ids in encode(tokenizer, texts, bos=bos) for row in chunks(ids, max_tokens, bos=bos)]
        found = [row for row in found if len(row) > 1 + (bos is not None)]
        if not found:
            raise DsgError(f"The corpus {corpus.name} holds nothing to train on.", "Give more text.")
        rows += found
        owners += [number] * len(found)
    weights = [1.0 if corpus.weight is None else corpus.weight for corpus in corpora]
    return Text(rows, owners, weights, tokenizer.pad_token_id or 0, special_ids(tokenizer), device)


def rows_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, bos: int | None, like: Text) -> Text:
    """Other texts, each a row, to be read like the rows of another text."""
    longest = max(map(len, like.rows))
    rows = [row[:longest] for row in encode(tokenizer, texts, bos=bos) if len(row) > 1 + (bos is not None)]
    if not rows:
        raise DsgError("There is no text about made-up entities.", "Give methods.sae_representation.unknown_file.")
    return Text(rows, [0] * len(rows), [1.0], like.pad, like.special, like.device)


@dataclass(frozen=True)
class Mentions:
    """Rows of forget text twice, and where in each a name ends; both have the same names in the same order."""

    rows: tuple[Text, Text]
    """With the names that it has, and with names that nobody has."""
    ends: tuple[list[list[int]], list[list[int]]]
    """Of each row, positions of the last tokens of names."""

    def known(self, index: Sequence[int]) -> tuple[TokenBatch, Tensor]:
        """Rows as they are, and where names end, [B, L]."""
        return self._batch(0, index)

    def unknown(self, index: Sequence[int]) -> tuple[TokenBatch, Tensor]:
        """The same rows with other names, and where those end."""
        return self._batch(1, index)

    def _batch(self, which: int, index: Sequence[int]) -> tuple[TokenBatch, Tensor]:
        batch = self.rows[which].batch(index)
        at_BL = torch.zeros_like(batch.mask_BL)
        for row, number in enumerate(index):
            at_BL[row, self.ends[which][number]] = True
        return batch, at_BL


Row = tuple[list[int], int]
"""Token ids, and the position of the first that counts in the loss."""


def lesson_of(
    tokenizer: PreTrainedTokenizerBase,
    corpora: Sequence[Corpus],
    settings: Finetune,
    *,
    bos: int | None,
    max_tokens: int,
    device: str,
) -> Text:
    """All text of corpora, of which each row is drawn once an epoch, unless a corpus has a weight.

    Args:
        tokenizer: The model's.
        corpora: What is taught.
        settings: How documents become rows, and which tokens count.
        bos: Token that every row begins with.
        max_tokens: Longer documents, or what was packed, are cut to rows of so many.
        device: Where batches are wanted.
    """
    found: list[list[Row]] = []
    for corpus in corpora:
        texts = prompts(tokenizer, corpus, None)
        if settings.answer_after is not None and not any(settings.answer_after in text for text in texts):
            raise DsgError(
                f"No document of {corpus.name} holds {settings.answer_after!r}.",
                "Change methods.finetune.answer_after, or leave it out.",
            )
        rows = [row for row in _rows(tokenizer, texts, settings, bos, max_tokens) if max(row[1], 1) < len(row[0])]
        if not rows:
            raise DsgError(f"The corpus {corpus.name} holds nothing to train on.", "Give more text.")
        found.append(rows)
    is_weighted = any(corpus.weight is not None for corpus in corpora)
    every = [row for rows in found for row in rows]
    return Text(
        rows=[ids for ids, _ in every],
        corpus=[number if is_weighted else 0 for number, rows in enumerate(found) for _ in rows],
        weights=[1.0 if one.weight is None else one.weight for one in corpora] if is_weighted else [1.0],
        pad=tokenizer.pad_token_id or 0,
        special=special_ids(tokenizer),
        device=device,
        first=[first for _, first in every],
    )


def _rows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], settings: Finetune, bos: int | None, max_tokens: int
) -> Iterator[Row]:
    head = [] if bos is None else [bos]
    tail = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    documents = [ids + tail for ids in encode(tokenizer, texts, bos=bos)]
    starts = _starts(tokenizer, texts, documents, settings.answer_after, bos)
    if settings.rows == "packed":
        documents = [head + [i for ids in documents for i in ids[len(head) :]]]
        starts = [0]
    for ids, start in zip(documents, starts, strict=True):
        n_before = len(head)
        for row in chunks(ids, max_tokens, bos=bos):
            yield row, max(0, start - n_before + len(head))
            n_before += len(row) - len(head)


def _starts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    documents: Sequence[list[int]],
    answer_after: str | None,
    bos: int | None,
) -> list[int]:
    """Of each document the position of the first token that is not wholly of what comes before the answer."""
    if answer_after is None:
        return [0] * len(texts)
    asked = ["".join(text.partition(answer_after)[:2]) if answer_after in text else "" for text in texts]
    before = encode(tokenizer, asked, bos=bos)
    return [_n_shared(one, whole) if text else 0 for text, one, whole in zip(asked, before, documents, strict=True)]


def _n_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two rows begin with alike: a token that spans the border belongs to the answer."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
