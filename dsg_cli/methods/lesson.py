"""What plain training reads: every document of its corpora, as rows of tokens that end with EOS."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from dsg_cli.corpora import Corpus
from dsg_cli.errors import DsgError
from dsg_cli.methods.settings import Finetune
from dsg_cli.methods.text import Text
from dsg_cli.prompting import prompts
from dsg_cli.tokens import chunks, encode, special_ids

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

    Raises:
        DsgError: A corpus holds nothing to train on, or no document the text after which it is to count.
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
