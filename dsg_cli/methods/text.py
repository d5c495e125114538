"""Text as training sees it: rows of tokens, drawn in an order that follows from the seed alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from dsg_cli.corpora import Corpus, Part
from dsg_cli.errors import DsgError
from dsg_cli.prompting import prompts
from dsg_cli.tokens import TokenBatch, chunks, encode, pad_rows, special_ids

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

    Raises:
        DsgError: A corpus holds no row of two tokens.
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
