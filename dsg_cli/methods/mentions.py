"""Names in a text, and the same text with names that nobody has in their place."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dsg_cli.errors import DsgError
from dsg_cli.methods.text import Text
from dsg_cli.tokens import TokenBatch, with_bos

INNER = re.compile(r"(?<=[\w,;:] )[A-Z][a-z]{2,}\b")
"""A capitalised word that does not begin a sentence: a name."""
WORD = re.compile(r"\b[A-Z][a-z]{2,}\b")


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


def with_unknown_names(texts: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """The names in some texts, and the texts with each replaced by one made of two others, the same wherever it stands.

    Raises:
        DsgError: There are not two names in them.
    """
    names = sorted({name for text in texts for name in INNER.findall(text)})
    if len(names) < 2:
        raise DsgError(
            "The forget text has no names (capitalised words within sentences) that could be recombined.",
            "Give texts about entities that do not exist: --set methods.sae_representation.unknown_file=FILE.",
        )
    rng = random.Random(seed)
    others = rng.sample(names, len(names))
    taken = set(names)
    made: dict[str, str] = {}
    for name, other in zip(names, others, strict=True):
        new = name[: max(1, len(name) // 2)] + other[len(other) // 2 :]
        while new in taken:
            new += rng.choice("aeiou")
        taken.add(new)
        made[name] = new
    return names, [WORD.sub(lambda found: made.get(found[0], found[0]), text) for text in texts]


def find_mentions(tokenizer: PreTrainedTokenizerBase, forget: Text, *, bos: int | None, seed: int) -> Mentions:
    """The rows of forget text with and without their names.

    Raises:
        DsgError: There are no names, or the tokenizer does not say where in a text its tokens are.
    """
    if not tokenizer.is_fast:
        raise DsgError(
            "The tokenizer does not say where in a text its tokens are.",
            "Give texts about unknown entities: --set methods.sae_representation.unknown_file=FILE.",
        )
    texts = [str(text) for text in tokenizer.batch_decode(forget.rows, skip_special_tokens=True)]
    names, others = with_unknown_names(texts, seed)
    longest = max(map(len, forget.rows))
    rows: tuple[list[list[int]], list[list[int]]] = ([], [])
    ends: tuple[list[list[int]], list[list[int]]] = ([], [])
    for text, other in zip(texts, others, strict=True):
        at, others_at = _ends(text, other, names)
        versions = (_encoded(tokenizer, text, at, bos=bos), _encoded(tokenizer, other, others_at, bos=bos))
        # A made-up name may have more tokens than the one it replaces; what no longer fits is left out of both.
        found = zip(*(positions for _, positions in versions), strict=True)
        pairs = [pair for pair in found if min(pair) >= 0 and max(pair) < longest]
        for which, (ids, _) in enumerate(versions):
            rows[which].append(ids[:longest])
            ends[which].append([pair[which] for pair in pairs])
    known, unknown = (dataclasses.replace(forget, rows=several) for several in rows)
    return Mentions((known, unknown), ends)


def _ends(text: str, other: str, names: Sequence[str]) -> tuple[list[int], list[int]]:
    """Where the words end that are names, in a text and in the version of it with other names."""
    known = set(names)
    words = zip(WORD.finditer(text), WORD.finditer(other), strict=True)
    pairs = [(word.end(), new.end()) for word, new in words if word[0] in known]
    return [end for end, _ in pairs], [end for _, end in pairs]


def _encoded(
    tokenizer: PreTrainedTokenizerBase, text: str, ends: Sequence[int], *, bos: int | None
) -> tuple[list[int], list[int]]:
    """Token ids, and the positions of the tokens in which those characters end; -1 for one that is in no token."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = with_bos(found["input_ids"], bos)
    shift = len(ids) - len(found["input_ids"])
    spans = [(i + shift, *span) for i, span in enumerate(found["offset_mapping"])]
    return ids, [next((i for i, start, stop in spans if start < end <= stop), -1) for end in ends]
