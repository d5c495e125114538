"""What stands between whoever asks and a model that stays as it is: a text in front of prompts, or a filter that
refuses prompts or answers.

Filters see what the user sent, before any prefix. A request that is refused is answered as if the model had been given
the refusal in place of the context, so that the answer tells nothing of the question.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dsg_cli.data.readers import text_of
from dsg_cli.data.tokens import Request, encode, special_ids, words_of
from dsg_cli.errors import DsgError
from dsg_cli.workspace.artifacts import Wrapper

Phrase = tuple[str, ...]
"""The words of a keyword."""

PRIOR_WORDS = 1000.0
"""Of both texts together, which each of them is taken to have held before it is read."""


def phrases_of(keywords: Iterable[str]) -> frozenset[Phrase]:
    """Keywords as they are looked for; one may have several words."""
    return frozenset(phrase for phrase in (tuple(words_of(keyword)) for keyword in keywords) if phrase)


def n_matches(text: str, phrases: frozenset[Phrase]) -> int:
    """How many different keywords a text holds, as whole words."""
    words = words_of(text)
    return sum(
        len(phrases.intersection(zip(*(words[i:] for i in range(length)), strict=False)))
        for length in {len(phrase) for phrase in phrases}
    )


def telling_words(forget: Iterable[str], retain: Iterable[str], n: int) -> list[str]:
    """The n words that most surely are more frequent in forget texts than in retain texts, the surest first."""
    counts = [Counter(word for text in texts for word in words_of(text)) for texts in (forget, retain)]
    scores = log_odds(*counts)
    words = sorted((word for word, score in scores.items() if score > 0), key=lambda word: (-scores[word], word))
    if not words:
        raise DsgError("No word is more frequent in the forget text than in the retain text.", "Check both corpora.")
    return words[:n]


def log_odds(forget: Mapping[str, int], retain: Mapping[str, int]) -> dict[str, float]:
    """The log-odds ratio of each word between two texts, in units of its standard deviation.

    With y counts, n their sum and a prior of A words spread as both texts together, a = A (y_f + y_r) / (n_f + n_r):

        d = log (y_f + a) / (n_f + A - y_f - a)  -  log (y_r + a) / (n_r + A - y_r - a)
        z = d / sqrt(1 / (y_f + a) + 1 / (y_r + a))

    (Monroe, Colaresi and Quinn 2008, informative Dirichlet prior.) A word alone in both texts has 0.
    """
    n_forget, n_retain = sum(forget.values()), sum(retain.values())
    scores = {}
    for word in forget.keys() | retain.keys():
        y_forget, y_retain = forget.get(word, 0), retain.get(word, 0)
        prior = PRIOR_WORDS * (y_forget + y_retain) / (n_forget + n_retain)
        rest = [n + PRIOR_WORDS - y - prior for n, y in ((n_forget, y_forget), (n_retain, y_retain))]
        if min(rest) <= 0:
            scores[word] = 0.0
            continue
        ratio = math.log((y_forget + prior) / rest[0]) - math.log((y_retain + prior) / rest[1])
        scores[word] = ratio / math.sqrt(1 / (y_forget + prior) + 1 / (y_retain + prior))
    return scores


def read_keywords(path: str) -> list[str]:
    """Keywords from a file, one a line; empty lines do not count."""
    lines = [line.strip() for line in text_of(Path(path)).split("\n")]
    keywords = list(dict.fromkeys(line for line in lines if line))
    if not keywords:
        raise DsgError(f"{path} holds no keyword.", "Write one a line.")
    for keyword in keywords:
        if not words_of(keyword):
            raise DsgError(f"{path}: {keyword[:100]!r} holds no word.", "A keyword has letters or digits.")
    return keywords


LARGEST = torch.finfo(torch.float32).max
"""Statistic of a text on which an activation is not finite: it is refused. Of one without words, the opposite."""


@dataclass(frozen=True, eq=False)
class WrapperModule:
    """A wrapper that can act."""

    body: Wrapper
    weight_D: Tensor | None = None
    """Of a classifier, float32."""
    bias: float = 0.0
    phrases: frozenset[Phrase] = frozenset()
    """The words of each keyword."""

    @property
    def is_filter(self) -> bool:
        return self.body.rule != "prefix"


def wrapper_from_artifact(body: Wrapper, tensors: Mapping[str, Tensor], *, where: str) -> WrapperModule:
    """The wrapper of an artifact."""
    if body.rule != "classifier":
        phrases = phrases_of(body.keywords)
        if body.rule == "keywords" and not phrases:
            raise DsgError(f"{where} looks for keywords and has none.", "Make it again.")
        return WrapperModule(body, phrases=phrases)
    if body.layer is None:
        raise DsgError(f"{where} is a classifier without a layer.", "Make it again.")
    for name, n_dims in (("weight", 1), ("bias", 0)):
        if name not in tensors:
            raise DsgError(f"{where} lacks the tensor {name}.", "Make it again.")
        if tensors[name].dim() != n_dims or not tensors[name].numel():
            raise DsgError(f"{where}: the tensor {name} has the shape {list(tensors[name].shape)}.", "Make it again.")
        if not bool(tensors[name].isfinite().all()):
            raise DsgError(f"{where}: the tensor {name} is not finite.", "Make it again.")
    return WrapperModule(body, tensors["weight"].float().cpu(), float(tensors["bias"]))


def has_filter(wrappers: Sequence[WrapperModule]) -> bool:
    """Whether any decides anything: a prefix alone does not."""
    return any(wrapper.is_filter for wrapper in wrappers)


def on_side(wrappers: Sequence[WrapperModule], side: str) -> list[WrapperModule]:
    """The filters of prompts, or those of answers."""
    return [wrapper for wrapper in wrappers if wrapper.is_filter and wrapper.body.side == side]


def prefix_ids(wrappers: Sequence[WrapperModule], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """All that is put in front of prompts, in the order of wrappers."""
    texts = [wrapper.body.text for wrapper in wrappers if not wrapper.is_filter]
    return tuple(token for ids in encode(tokenizer, texts, bos=None) for token in ids)


def with_prefixes(
    wrappers: Sequence[WrapperModule], ids: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """A prompt with the prefixes after its BOS."""
    n_head = _n_head(ids, tokenizer)
    return [*ids[:n_head], *prefix_ids(wrappers, tokenizer), *ids[n_head:]]


def in_front(
    prefix: tuple[int, ...], request: Request, tokenizer: PreTrainedTokenizerBase, room: int
) -> tuple[int, ...]:
    """A context behind a prefix; where both are too long for the model, the context loses its beginning."""
    n_head = _n_head(request.context, tokenizer)
    head, sent = request.context[:n_head], request.context[n_head:]
    n_left = room + 1 - len(head) - len(prefix) - len(request.continuation)
    if n_left < 0 or (n_left == 0 and sent):
        raise DsgError(
            f"The text in front of prompts has {len(prefix)} tokens; with a continuation of "
            f"{len(request.continuation)} it leaves no room in the {room} that the model reads.",
            "Make it shorter (methods.prompt.text, or fewer questions in methods.in_context).",
        )
    return (*head, *prefix, *sent[max(0, len(sent) - n_left) :])


def _n_head(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """1 if a prompt begins with BOS, or with the token that stands for it where there is none."""
    return int(bool(ids) and ids[0] in special_ids(tokenizer))


def read_by(body: Wrapper, request: Request) -> tuple[int, ...]:
    """What a filter reads of a request."""
    if body.side == "input":
        return request.context
    return request.continuation if body.rule == "keywords" else request.context + request.continuation
