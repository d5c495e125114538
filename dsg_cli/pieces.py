"""Retain text in pieces of the lengths that prompts have: what a threshold is set on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from dsg_cli.calibration import cut_pieces
from dsg_cli.corpora import Corpus, Part
from dsg_cli.errors import DsgError
from dsg_cli.prompting import prompts
from dsg_cli.tokens import encode


@dataclass(frozen=True)
class Piece:
    """A piece of a document, as token ids with BOS."""

    id: str
    """corpus/part/document/piece"""
    corpus: str
    ids: list[int]


def draw_pieces(
    tokenizer: PreTrainedTokenizerBase,
    corpora: Sequence[Corpus],
    part: Part,
    *,
    bos: int | None,
    lengths: Sequence[int],
    is_packed: bool = False,
    at_most: int,
    seed: int,
) -> list[Piece]:
    """Pieces of one part of the corpora; where corpora have weights, each gives that share of them.

    Args:
        tokenizer: The model's.
        corpora: Retain text. What a user says in a chat is one piece, whole.
        part: Of each corpus.
        bos: Token that every piece begins with.
        lengths: Of pieces in tokens, BOS not counted, each as likely as the others.
        is_packed: Join the documents with EOS before they are cut, as the paper does.
        at_most: So many pieces of all corpora together, about; the documents they come from are drawn at random.
        seed: Of everything that is drawn.
    """
    rng = random.Random(f"{seed}/{part}")
    n_head = int(bos is not None)
    found: list[list[Piece]] = []
    for corpus in corpora:
        texts = prompts(tokenizer, corpus, part)
        kept = _sampled(texts, rng, corpus, lengths=lengths, at_most=at_most // len(corpora))
        documents = list(zip(kept, encode(tokenizer, [texts[i] for i in kept], bos=bos), strict=True))
        if is_packed and not corpus.is_chat:
            eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            joined = [token for _, ids in documents for token in (*ids[n_head:], *eos)]
            documents = [(0, ([] if bos is None else [bos]) + joined)]
        pieces: list[Piece] = []
        for i, ids in documents:
            cut = [ids] if corpus.is_chat else cut_pieces(ids, rng, lengths=lengths, n_head=n_head)
            pieces += [Piece(f"{corpus.name}/{part}/{i}/{j}", corpus.name, piece) for j, piece in enumerate(cut)]
        if not pieces and corpus.weight is not None:
            reason = f"The {part} part of {corpus.name} has no {min(lengths)} tokens in a row."
            raise DsgError(reason, "Give more text.")
        found.append(pieces)
    return [piece for pieces in _in_proportion(found, corpora, rng) for piece in pieces]


def _sampled(
    texts: Sequence[str], rng: random.Random, corpus: Corpus, *, lengths: Sequence[int], at_most: int
) -> list[int]:
    """Positions of the documents that give about so many pieces; all of them where there is no need to choose."""
    a_piece = 4 * sum(lengths) / len(lengths)  # In characters.
    expected = len(texts) if corpus.is_chat else sum(map(len, texts)) / a_piece
    if expected <= at_most:
        return list(range(len(texts)))
    n_kept = max(1, round(len(texts) * at_most / expected))
    return sorted(rng.sample(range(len(texts)), n_kept))


def _in_proportion(found: Sequence[list[Piece]], corpora: Sequence[Corpus], rng: random.Random) -> list[list[Piece]]:
    if all(corpus.weight is None for corpus in corpora):
        return list(found)
    weights = [1.0 if corpus.weight is None else corpus.weight for corpus in corpora]
    unit = min(len(pieces) / weight for pieces, weight in zip(found, weights, strict=True))
    counts = [min(len(pieces), round(unit * weight)) for pieces, weight in zip(found, weights, strict=True)]
    return [
        [pieces[i] for i in sorted(rng.sample(range(len(pieces)), n))] for pieces, n in zip(found, counts, strict=True)
    ]
