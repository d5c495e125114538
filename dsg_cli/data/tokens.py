"""Texts to token ids: the one policy for BOS, padding and EOS; requests, pieces of documents, and words.

Shape suffixes used throughout the package: B batch, L position, T tokens of several sequences in a row,
D model width, F features of the SAE, K chosen features, V vocabulary.

BOS comes first wherever the tokenizer has one and either puts it there by itself or the SAE was trained with it: in
selection, calibration, evaluation and attacks alike (`bos_to_prepend`).

A token is *counted* if it is neither padding nor BOS, EOS or pad: only counted tokens enter a statistic, can be
active, or are edited.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import regex
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dsg_cli.data.corpora import Corpus, Part
from dsg_cli.errors import DsgError


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
    alone = [str(tokenizer.decode([token])) for token in ids]
    texts = alone[:1]
    for i in range(1, len(alone)):
        both = str(tokenizer.decode(list(ids[i - 1 : i + 1])))
        texts.append(both.removeprefix(alone[i - 1]) if both.startswith(alone[i - 1]) else alone[i])
    return texts


def chunks(ids: list[int], seq_len: int, *, bos: int | None) -> Iterator[list[int]]:
    """A long sequence as consecutive rows of at most `seq_len` tokens, each with the BOS of the first."""
    head = [bos] if bos is not None and ids[:1] == [bos] else []
    body, step = ids[len(head) :], seq_len - len(head)
    for start in range(0, len(body), step):
        yield head + body[start : start + step]


def packed(documents: Iterable[list[int]], seq_len: int, *, bos: int | None, eos: int | None) -> Iterator[list[int]]:
    """Documents joined with EOS and cut into rows of `seq_len` tokens, BOS first; what fills no row is left out."""
    head = [] if bos is None else [bos]
    body: list[int] = []
    for ids in documents:
        body += ids[len(head) :] + ([] if eos is None else [eos])
        while len(body) >= seq_len - len(head):
            yield head + body[: seq_len - len(head)]
            body = body[seq_len - len(head) :]


def as_chat(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """What a user says, in the tokenizer's chat template, up to where the answer begins."""
    turns = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


@dataclass(frozen=True)
class Request:
    """Score `continuation` after `context` (token ids; neither is empty)."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def inputs(self, max_length: int) -> tuple[int, ...]:
        """What the model reads: all but the last token, cut on the left to `max_length`."""
        return (self.context + self.continuation)[-(max_length + 1) :][:-1]


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str, *, bos: int | None) -> Request:
    """A request from text, as lm-eval encodes it: both together, cut where the context alone ends; `bos` in front.

    Spaces at the end of the context move to the continuation. An empty context is a lone BOS (or EOS).
    """
    n_spaces = len(context) - len(context.rstrip())
    if n_spaces:
        context, continuation = context[:-n_spaces], context[-n_spaces:] + continuation
    if not context:
        prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if prefix is None:
            raise DsgError("A question has no context, and the tokenizer has neither BOS nor EOS to start from.")
        return Request((prefix,), tuple(tokenizer(continuation, add_special_tokens=False)["input_ids"]))
    whole = with_bos(tokenizer(context + continuation)["input_ids"], bos)
    head = with_bos(tokenizer(context)["input_ids"], bos)
    return Request(tuple(head), tuple(whole[len(head) :]))


ASCII_WORD = re.compile(r"\w+", re.ASCII)
WORD = regex.compile(r"[\p{L}\p{M}\p{N}_]+")
TOO_MANY_MARKS = regex.compile(r"(\p{M}{30})\p{M}+")
"""On one letter: putting an endless run of them in order takes the square of its length."""

INVISIBLE = regex.compile(r"\p{Cf}+")  # Such as a soft hyphen.


def words_of(text: str) -> list[str]:
    """The words of a text in any script, in order, without case and without the styles of letters."""
    if text.isascii():
        return ASCII_WORD.findall(text.lower())
    text = TOO_MANY_MARKS.sub(r"\1", INVISIBLE.sub("", text))
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return list(WORD.findall(text))


def separator(tokenizer: PreTrainedTokenizerBase) -> str:
    """A blank line, or a space where the tokenizer does not know line ends."""
    ids = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    return " " if tokenizer.unk_token_id in ids else "\n\n"


def cut_pieces(row: list[int], rng: random.Random, *, lengths: Sequence[int], n_head: int) -> list[list[int]]:
    """Cut a document into consecutive pieces of random lengths; a rest shorter than all of them is dropped.

    A threshold holds for texts of the lengths it was set on: rows of 1024 tokens say little about a question of 30.
    Each of the lengths is as likely as the others; the `n_head` leading tokens (BOS), which every piece repeats, do
    not count.
    """
    head, body = row[:n_head], row[n_head:]
    pieces, start = [], 0
    while len(body) - start >= min(lengths):
        length = rng.choice(lengths)
        pieces.append(head + body[start : start + length])
        start += length
    return pieces


def check_chat(tokenizer: PreTrainedTokenizerBase, corpora: Sequence[Corpus]) -> None:
    """Refuse a corpus of chat turns for a model that has no chat template."""
    for corpus in corpora:
        if corpus.is_chat and not tokenizer.chat_template:
            raise DsgError(
                f"The corpus {corpus.name} is put in the model's chat template, and its tokenizer has none.",
                "Leave it out, or take the instruction-tuned model.",
            )


def prompts(tokenizer: PreTrainedTokenizerBase, corpus: Corpus, part: Part | None) -> list[str]:
    """The texts of one part, or of all parts, in the corpus's order."""
    texts = corpus.texts if part is None else corpus.part(part)
    return [as_chat(tokenizer, text) for text in texts] if corpus.is_chat else texts


@dataclass(frozen=True)
class Piece:
    """A piece of a document, as token ids with BOS."""

    id: str  # corpus/part/document/piece
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
    """About `at_most` pieces of one part of the corpora; where corpora have weights, each gives that share of them.

    `lengths` as for `cut_pieces`; what a user says in a chat is one piece, whole. Packed documents are joined with EOS
    before they are cut, as the paper does. The documents, where not all are needed, and the lengths are random.
    """
    rng = random.Random(f"{seed}/{part}")
    n_head = int(bos is not None)
    pieces: list[list[Piece]] = []  # One list for each corpus.
    for corpus in corpora:
        texts = prompts(tokenizer, corpus, part)
        kept = _sampled(texts, rng, corpus, lengths=lengths, at_most=at_most // len(corpora))
        documents = list(zip(kept, encode(tokenizer, [texts[i] for i in kept], bos=bos), strict=True))
        if is_packed and not corpus.is_chat:
            eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            joined = [token for _, ids in documents for token in (*ids[n_head:], *eos)]
            documents = [(0, ([] if bos is None else [bos]) + joined)]
        of_corpus: list[Piece] = []
        for i, ids in documents:
            rows = [ids] if corpus.is_chat else cut_pieces(ids, rng, lengths=lengths, n_head=n_head)
            of_corpus += [Piece(f"{corpus.name}/{part}/{i}/{j}", corpus.name, row) for j, row in enumerate(rows)]
        if not of_corpus and corpus.weight is not None:
            reason = f"The {part} part of {corpus.name} has no {min(lengths)} tokens in a row."
            raise DsgError(reason, "Give more text.")
        pieces.append(of_corpus)
    if any(corpus.weight is not None for corpus in corpora):
        weights = [1.0 if corpus.weight is None else corpus.weight for corpus in corpora]
        unit = min(len(of_corpus) / weight for of_corpus, weight in zip(pieces, weights, strict=True))
        for c, (of_corpus, weight) in enumerate(zip(pieces, weights, strict=True)):
            n = min(len(of_corpus), round(unit * weight))
            pieces[c] = [of_corpus[i] for i in sorted(rng.sample(range(len(of_corpus)), n))]
    return [piece for of_corpus in pieces for piece in of_corpus]


def _sampled(
    texts: Sequence[str], rng: random.Random, corpus: Corpus, *, lengths: Sequence[int], at_most: int
) -> list[int]:
    """Positions of the documents that give about so many pieces; all of them where there is no need to choose."""
    a_piece = 4 * sum(lengths) / len(lengths)  # In characters.
    expected = len(texts) if corpus.is_chat else sum(map(len, texts)) / a_piece
    if expected <= at_most:
        return list(range(len(texts)))
    return sorted(rng.sample(range(len(texts)), max(1, round(len(texts) * at_most / expected))))
