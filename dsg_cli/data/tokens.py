"""Texts to token batches: the one policy for BOS, padding and EOS.

Shape suffixes used throughout the package: B batch, L position, T tokens of several sequences in a row,
D model width, F features of the SAE, K chosen features, V vocabulary.

BOS comes first wherever the tokenizer has one and either puts it there by itself or the SAE was trained with it: in
selection, calibration, evaluation and attacks alike (`bos_to_prepend`).

A token is *counted* if it is neither padding nor BOS, EOS or pad: only counted tokens enter a statistic, can be
hot, or are edited.
"""

from __future__ import annotations

import functools
import random
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

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


MARKS_AT_MOST = 30
"""On one letter: putting an endless run of them in order takes the square of its length."""

ASCII_WORD = re.compile(r"\w+", re.ASCII)

FIRST_PLANE = 0xFFFF


def words_of(text: str) -> list[str]:
    """The words of a text, in order."""
    if text.isascii():
        return ASCII_WORD.findall(text.lower())
    # A class of characters that reaches beyond the first plane takes a hundred times longer to look through.
    words, marks, invisible = _patterns(FIRST_PLANE if max(text) <= chr(FIRST_PLANE) else sys.maxunicode)
    text = marks.sub(lambda run: run[0][:MARKS_AT_MOST], text.translate(invisible))
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return words.findall(text)


@functools.cache
def _patterns(last: int) -> tuple[re.Pattern[str], re.Pattern[str], dict[int, None]]:
    """Of a word, of too many marks, and the characters that are not seen, such as a soft hyphen; all up to a last."""
    kinds: dict[str, list[str]] = {"M": [], "Cf": []}
    for character in map(chr, range(last + 1)):
        category = unicodedata.category(character)
        for kind, several in kinds.items():
            if category.startswith(kind):
                several.append(character)
    marks = "".join(kinds["M"])
    return (
        re.compile(rf"[\w{marks}]+"),
        re.compile(rf"[{marks}]{{{MARKS_AT_MOST},}}"),
        dict.fromkeys(map(ord, kinds["Cf"])),
    )


def separator(tokenizer: PreTrainedTokenizerBase) -> str:
    """A blank line, or a space where the tokenizer does not know line ends."""
    ids = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    return " " if tokenizer.unk_token_id in ids else "\n\n"


def cut_pieces(row: list[int], rng: random.Random, *, lengths: Sequence[int], n_head: int) -> list[list[int]]:
    """Cut a document into consecutive pieces of random lengths.

    A threshold holds for texts of the lengths it was set on: rows of 1024 tokens say little about a question of 30.

    Args:
        row: Token ids of a document.
        rng: Where lengths come from.
        lengths: Of pieces, `n_head` not counted, each as likely as the others; a rest shorter than all is dropped.
        n_head: Leading tokens (BOS) that every piece repeats.
    """
    head, body = row[:n_head], row[n_head:]
    pieces, start, shortest = [], 0, min(lengths)
    while len(body) - start >= shortest:
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
