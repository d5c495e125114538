"""Text as training sees it: rows of tokens, drawn in an order that follows from the seed alone.

Rows of forget and retain corpora (`training_rows`), of a file of unknown entities (`unknown_rows`), and of what a model
is finetuned on (`finetune_rows`); names in rows, and the same rows with other names (`find_name_spans`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dsg_cli.data.batches import TokenBatch, pad_rows
from dsg_cli.data.corpora import Corpus, Part
from dsg_cli.data.tokens import chunks, encode, prompts, special_ids, with_bos
from dsg_cli.errors import DsgError
from dsg_cli.settings import Finetune

PARTS: tuple[Part, ...] = ("select", "calibrate")
"""What a method learns from: all that a guardrail is made from. The rest measures."""


@dataclass(frozen=True)
class TrainingRows:
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


def training_rows(
    tokenizer: PreTrainedTokenizerBase, corpora: Sequence[Corpus], *, bos: int | None, max_tokens: int, device: str
) -> TrainingRows:
    """The text of forget or retain corpora, but for what measures; corpora without a weight count alike.

    Documents of more than `max_tokens` are cut to rows of so many.
    """
    rows: list[list[int]] = []
    owners: list[int] = []
    for number, corpus in enumerate(corpora):
        texts = [text for part in PARTS for text in prompts(tokenizer, corpus, part)]
        cut = [row for ids in encode(tokenizer, texts, bos=bos) for row in chunks(ids, max_tokens, bos=bos)]
        own = [row for row in cut if len(row) > 1 + (bos is not None)]
        if not own:
            raise DsgError(f"The corpus {corpus.name} holds nothing to train on.", "Give more text.")
        rows += own
        owners += [number] * len(own)
    weights = [1.0 if corpus.weight is None else corpus.weight for corpus in corpora]
    return TrainingRows(rows, owners, weights, tokenizer.pad_token_id or 0, special_ids(tokenizer), device)


def unknown_rows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, bos: int | None, like: TrainingRows
) -> TrainingRows:
    """Texts about made-up entities, each a row, to be read like the rows of another text."""
    longest = max(map(len, like.rows))
    rows = [row[:longest] for row in encode(tokenizer, texts, bos=bos) if len(row) > 1 + (bos is not None)]
    if not rows:
        raise DsgError("There is no text about made-up entities.", "Give methods.sae_representation.unknown_file.")
    return TrainingRows(rows, [0] * len(rows), [1.0], like.pad, like.special, like.device)


def finetune_rows(
    tokenizer: PreTrainedTokenizerBase,
    corpora: Sequence[Corpus],
    settings: Finetune,
    *,
    bos: int | None,
    max_tokens: int,
    device: str,
) -> TrainingRows:
    """Every document of the corpora as rows that end with EOS, each drawn once an epoch unless a corpus has a weight.

    Documents of more than `max_tokens`, or what was packed, are cut to rows of so many. Where the settings name what
    answers begin after, only tokens after it count.
    """
    rows: list[list[int]] = []
    first: list[int] = []
    owners: list[int] = []
    is_weighted = any(corpus.weight is not None for corpus in corpora)
    for number, corpus in enumerate(corpora):
        texts = prompts(tokenizer, corpus, None)
        if settings.answer_after is not None and not any(settings.answer_after in text for text in texts):
            raise DsgError(
                f"No document of {corpus.name} holds {settings.answer_after!r}.",
                "Change methods.finetune.answer_after, or leave it out.",
            )
        n_before = len(rows)
        for row, start in _rows_with_starts(tokenizer, texts, settings, bos, max_tokens):
            if max(start, 1) < len(row):  # Something in it counts.
                rows.append(row)
                first.append(start)
                owners.append(number if is_weighted else 0)
        if len(rows) == n_before:
            raise DsgError(f"The corpus {corpus.name} holds nothing to train on.", "Give more text.")
    weights = [1.0 if corpus.weight is None else corpus.weight for corpus in corpora] if is_weighted else [1.0]
    return TrainingRows(rows, owners, weights, tokenizer.pad_token_id or 0, special_ids(tokenizer), device, first)


def _rows_with_starts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], settings: Finetune, bos: int | None, max_tokens: int
) -> Iterator[tuple[list[int], int]]:
    """Token ids of each row, and the position of the first that counts in the loss."""
    head = [] if bos is None else [bos]
    tail = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    documents = [ids + tail for ids in encode(tokenizer, texts, bos=bos)]
    starts = _answer_starts(tokenizer, texts, documents, settings.answer_after, bos)
    if settings.rows == "packed":
        documents = [head + [i for ids in documents for i in ids[len(head) :]]]
        starts = [0]
    for ids, start in zip(documents, starts, strict=True):
        n_before = len(head)
        for row in chunks(ids, max_tokens, bos=bos):
            yield row, max(0, start - n_before + len(head))
            n_before += len(row) - len(head)


def _answer_starts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    documents: Sequence[list[int]],
    answer_after: str | None,
    bos: int | None,
) -> list[int]:
    """Of each document the position of the first token that is not wholly of what comes before the answer: a token
    that spans the border belongs to the answer."""
    if answer_after is None:
        return [0] * len(texts)
    questions = ["".join(text.partition(answer_after)[:2]) if answer_after in text else "" for text in texts]
    starts = []
    for question, before, whole in zip(questions, encode(tokenizer, questions, bos=bos), documents, strict=True):
        pairs = enumerate(zip(before, whole, strict=False))
        n_shared = next((i for i, (a, b) in pairs if a != b), min(len(before), len(whole)))
        starts.append(n_shared if question else 0)
    return starts


INNER_NAME = re.compile(r"(?<=[\w,;:] )[A-Z][a-z]{2,}\b")
"""A capitalised word that does not begin a sentence: a name."""

CAPITALISED = re.compile(r"\b[A-Z][a-z]{2,}\b")


@dataclass(frozen=True)
class NameSpans:
    """Rows of forget text twice, and where in each a name ends; both have the same names in the same order."""

    rows: tuple[TrainingRows, TrainingRows]
    """With the names that it has, and with names that nobody has."""
    ends: tuple[list[list[int]], list[list[int]]]
    """Of each row, positions of the last tokens of names."""

    def batch(self, index: Sequence[int], *, version: int) -> tuple[TokenBatch, Tensor]:
        """Rows as they are (0) or with names that nobody has (1), and where names end, [B, L]."""
        batch = self.rows[version].batch(index)
        at_BL = torch.zeros_like(batch.mask_BL)
        for row, number in enumerate(index):
            at_BL[row, self.ends[version][number]] = True
        return batch, at_BL


def find_name_spans(
    tokenizer: PreTrainedTokenizerBase, forget: TrainingRows, *, bos: int | None, seed: int
) -> NameSpans:
    """The rows of forget text with their own names and with names that nobody has."""
    if not tokenizer.is_fast:
        raise DsgError(
            "The tokenizer does not say where in a text its tokens are.",
            "Give texts about unknown entities: --set methods.sae_representation.unknown_file=FILE.",
        )
    texts = [str(text) for text in tokenizer.batch_decode(forget.rows, skip_special_tokens=True)]
    names, renamed_texts = with_unknown_names(texts, seed)
    known_names, longest = set(names), max(map(len, forget.rows))
    rows: tuple[list[list[int]], list[list[int]]] = ([], [])
    ends: tuple[list[list[int]], list[list[int]]] = ([], [])
    for text, renamed in zip(texts, renamed_texts, strict=True):
        words = zip(CAPITALISED.finditer(text), CAPITALISED.finditer(renamed), strict=True)
        chars = [(old.end(), new.end()) for old, new in words if old[0] in known_names]
        ids, positions = _encode_with_ends(tokenizer, text, [end for end, _ in chars], bos=bos)
        renamed_ids, renamed_positions = _encode_with_ends(tokenizer, renamed, [end for _, end in chars], bos=bos)
        # A made-up name may have more tokens than the one it replaces; what no longer fits is left out of both.
        pairs = zip(positions, renamed_positions, strict=True)
        pairs_within = [pair for pair in pairs if min(pair) >= 0 and max(pair) < longest]
        for version, version_ids in enumerate((ids, renamed_ids)):
            rows[version].append(version_ids[:longest])
            ends[version].append([pair[version] for pair in pairs_within])
    known, unknown = (replace(forget, rows=version_rows) for version_rows in rows)
    return NameSpans((known, unknown), ends)


def _encode_with_ends(
    tokenizer: PreTrainedTokenizerBase, text: str, ends: Sequence[int], *, bos: int | None
) -> tuple[list[int], list[int]]:
    """Token ids, and the positions of the tokens in which those characters end; -1 for one that is in no token."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = with_bos(encoding["input_ids"], bos)
    shift = len(ids) - len(encoding["input_ids"])
    spans = [(i + shift, *span) for i, span in enumerate(encoding["offset_mapping"])]
    return ids, [next((i for i, start, stop in spans if start < end <= stop), -1) for end in ends]


def with_unknown_names(texts: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """The names in some texts, and the texts with each replaced by one recombined of two, everywhere the same.

    A name that nobody has is the first half of one capitalised word with the second half of another.
    """
    names = sorted({name for text in texts for name in INNER_NAME.findall(text)})
    if len(names) < 2:
        raise DsgError(
            "The forget text has no names (capitalised words within sentences) that could be recombined.",
            "Give texts about entities that do not exist: --set methods.sae_representation.unknown_file=FILE.",
        )
    rng = random.Random(seed)
    others = rng.sample(names, len(names))
    taken = set(names)
    new_names: dict[str, str] = {}
    for name, other in zip(names, others, strict=True):
        new = name[: max(1, len(name) // 2)] + other[len(other) // 2 :]
        while new in taken:
            new += rng.choice("aeiou")
        taken.add(new)
        new_names[name] = new
    return names, [CAPITALISED.sub(lambda match: new_names.get(match[0], match[0]), text) for text in texts]
