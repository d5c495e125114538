"""What speaks against a feature: that it follows the form of a text, or what the forgotten domain shares with others.

The rules are simple, and say so; none of them is a proof.

- *Formatting*: at least half of its strongest contexts (those that reach half of its largest activation) peak on a
  token without a letter (punctuation, digits, white space), or on a token of the chat template; or it is active on
  more than a fifth of the tokens of what is retained, near text included; or on chat-formatted retain text far more
  often than on plain (`selection.formatting_notes`).
- *Shared*: on a near corpus it is active at least half as often as on what is to be forgotten. A gate may watch a
  feature with a negative weight in order to stay shut there; of those it is not said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dsg_cli.data.corpora import Corpus
from dsg_cli.data.tokens import as_chat, token_texts
from dsg_cli.guardrail.selection import SelectedFeature, formatting_notes
from dsg_cli.inspection.contexts import Context, Contexts, describe_features, distinct_contexts
from dsg_cli.workspace.results import Json


@dataclass(frozen=True)
class Group:
    """A corpus, and what it is to the guardrail."""

    corpus: Corpus
    role: str
    """forget, near or retain."""

    @property
    def name(self) -> str:
        return self.corpus.name

    def described(self) -> Json:
        """What the settings say of it."""
        return {"role": self.role, **self.corpus.described()}


@dataclass(frozen=True)
class Rows:
    """Documents of a group as the model reads them, long ones in several rows."""

    ids: list[list[int]]
    places: list[tuple[int, int]]
    """Of each row: its document's number in the corpus, and how many of the document's tokens are before it."""
    n_documents: int


MANY_PEAKS = 0.5

FEW_CONTEXTS = 4
"""With fewer nothing is said about where contexts peak."""

COMMON_RATE = 0.2

SHARED_RATIO = 0.5


@dataclass(frozen=True)
class Evidence:
    """What is known of one feature."""

    forget_rate: float | None
    """Share of the tokens of all forget corpora on which it is active; None where there are none."""
    near_rates: Mapping[str, float]
    """The same of each near corpus."""
    kept_rate: float
    """The same of all that is not to be forgotten."""
    peaks: Sequence[str]
    """Texts of the tokens on which its strongest contexts peak."""
    template_peaks: int
    """How many of those are of the chat template."""
    weight: float | None
    """In the gate's token score."""


def doubts(evidence: Evidence) -> list[str]:
    """One sentence a doubt."""
    return [*_formatting(evidence), *_shared(evidence)]


def is_bare(text: str) -> bool:
    """Whether a token holds no letter; one that is a part of a character may be a part of a letter."""
    return "\ufffd" not in text and not any(character.isalpha() for character in text)


def _formatting(evidence: Evidence) -> list[str]:
    n, found = len(evidence.peaks), []
    n_bare = sum(map(is_bare, evidence.peaks))
    if n >= FEW_CONTEXTS and evidence.template_peaks >= MANY_PEAKS * n:
        found.append(
            f"looks like formatting: {evidence.template_peaks} of its {n} strongest contexts peak in the chat template"
        )
    elif n >= FEW_CONTEXTS and n_bare >= MANY_PEAKS * n:
        found.append(f"looks like formatting: {n_bare} of its {n} strongest contexts peak on a token without a letter")
    if evidence.kept_rate > COMMON_RATE:
        found.append(f"looks like formatting: active on {evidence.kept_rate:.1%} of the tokens of what is retained")
    return found


def _shared(evidence: Evidence) -> list[str]:
    if evidence.forget_rate is None or (evidence.weight is not None and evidence.weight < 0):
        return []
    return [
        f"shared with {name}: active on {rate:.1%} of its tokens, and on {evidence.forget_rate:.1%} of what is to be "
        "forgotten"
        for name, rate in evidence.near_rates.items()
        if rate > 0 and rate >= SHARED_RATIO * evidence.forget_rate
    ]


STRONG = 0.5
"""Of the largest peak of a feature: contexts that reach it say where it peaks."""

OF_CONTEXTS = ("peak_CN", "row_CN", "position_CN", "ids_CNW", "acts_CNW")


@dataclass(frozen=True)
class Read:
    """A group, and what the features do in it."""

    group: Group
    rows: Rows
    contexts: Contexts

    def rate(self, feature: int) -> float:
        """Of one of the C features."""
        return float(self.contexts.rate_C[feature])


def with_near(reads: Sequence[Read], chosen: Sequence[SelectedFeature]) -> tuple[list[Read], list[str]]:
    """The same with one corpus that is near: where none was named, the retain corpus on which features are active most.

    Args:
        reads: Of every group.
        chosen: The features; what a gate watches against itself does not count.
    """
    retained = [read for read in reads if read.group.role == "retain"]
    if not retained or any(read.group.role == "near" for read in reads):
        return list(reads), []
    for_it = [c for c, one in enumerate(chosen) if one.weight is None or one.weight >= 0]
    nearest = max(retained, key=lambda read: sum(read.rate(c) for c in for_it))
    found = [replace(read, group=replace(read.group, role="near")) if read is nearest else read for read in reads]
    note = (
        f"No corpus was named as near; {nearest.group.name} is taken, the retain corpus on which these features are "
        "active most. Name one with --near."
    )
    return sorted(found, key=lambda read: ("forget", "near", "retain").index(read.group.role)), [note]


def context_rows(
    reads: Sequence[Read], feature: int, index: int, n: int, tokenizer: PreTrainedTokenizerBase
) -> list[Json]:
    """The strongest contexts of one of the C features in each group, with their text.

    Args:
        reads: Of every group.
        feature: Which of the C.
        index: Its index in the SAE.
        n: So many of each group, at most.
        tokenizer: The model's.
    """
    rows = []
    for read in reads:
        for one in distinct_contexts(read.contexts, feature)[:n]:
            document, before = read.rows.places[one.row]
            rows.append(
                {
                    "feature": index,
                    "group": read.group.name,
                    "document": document,
                    "position": before + one.position,
                    "peak": one.peak,
                    "at": one.at,
                    "activations": one.acts,
                    "tokens": token_texts(tokenizer, one.ids),
                }
            )
    return rows


def words_of_all(reads: Sequence[Read], n_features: int, tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
    """The words that are characteristic of the strongest contexts of each of the C features, in whatever group.

    Args:
        reads: Of every group.
        n_features: C. Words are rare or common among these.
        tokenizer: The model's.
    """
    parts = {name: [getattr(read.contexts, name) for read in reads] for name in OF_CONTEXTS}
    joined = {name: torch.cat(several, 1) for name, several in parts.items()}
    order_CN = joined["peak_CN"].abs().argsort(dim=-1, descending=True, stable=True)
    rank_C1 = torch.arange(n_features)[:, None]
    in_order: dict[str, Any] = {name: tensor[rank_C1, order_CN] for name, tensor in joined.items()}
    peak_CN = in_order["peak_CN"]
    in_order["peak_CN"] = torch.where(peak_CN.abs() >= STRONG * peak_CN[:, :1].abs(), peak_CN, 0.0)
    together = replace(reads[0].contexts, **in_order)
    found = {one.index: one.description.split(", ") for one in describe_features(together, tokenizer)}
    return [[word for word in found.get(c, []) if word] for c in range(n_features)]


def doubts_of(
    reads: Sequence[Read], feature: int, one: SelectedFeature, n_features: int, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """What speaks against one of the C features.

    Args:
        reads: Of every group, one of them near.
        feature: Which of the C.
        one: The feature.
        n_features: Of the SAE.
        tokenizer: The model's.
    """
    template = template_tokens(tokenizer)
    every = [(context, read) for read in reads for context in distinct_contexts(read.contexts, feature)]
    largest = max((abs(context.peak) for context, _ in every), default=0.0)
    peaks = [(context, read) for context, read in every if abs(context.peak) >= STRONG * largest]
    gone, kept = ([read for read in reads if (read.group.role == "forget") == is_gone] for is_gone in (True, False))
    evidence = Evidence(
        forget_rate=_pooled(gone, feature) if gone else None,
        near_rates={read.group.name: read.rate(feature) for read in reads if read.group.role == "near"},
        kept_rate=_pooled(kept, feature),
        peaks=[str(tokenizer.decode([_peak(context)])) for context, _ in peaks],
        template_peaks=sum(_is_template(_peak(context), read, template, tokenizer) for context, read in peaks),
        weight=one.weight,
    )
    return [*doubts(evidence), *_chat_notes(kept, feature, one.index, n_features)]


def template_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that the chat template puts around what a user says; none where there is no template."""
    if not tokenizer.chat_template:
        return set()
    around = [set(tokenizer(as_chat(tokenizer, text), add_special_tokens=False)["input_ids"]) for text in ("a", "the")]
    return (around[0] & around[1]) - {tokenizer.unk_token_id}


def _is_template(token: int, read: Read, template: set[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Words of the template, such as `user`, are words elsewhere; tokens that mark turns are not."""
    is_marker = token in tokenizer.added_tokens_decoder
    return token in template and (read.group.corpus.is_chat or is_marker)


def _peak(context: Context) -> int:
    return context.ids[context.at]


def _pooled(reads: Sequence[Read], feature: int) -> float:
    """Share of the tokens of several groups on which a feature is active."""
    n_tokens = sum(read.contexts.n_tokens for read in reads)
    return sum(read.rate(feature) * read.contexts.n_tokens for read in reads) / n_tokens if n_tokens else 0.0


def _chat_notes(kept: Sequence[Read], feature: int, index: int, n_features: int) -> list[str]:
    """Of select: does it tell chat text from plain text?"""
    chat, plain = ([read for read in kept if read.group.corpus.is_chat == is_chat] for is_chat in (True, False))
    if not chat or not plain:
        return []
    chat_F, plain_F = (
        torch.zeros(n_features).index_fill(0, torch.tensor([index]), _pooled(of_form, feature))
        for of_form in (chat, plain)
    )
    return formatting_notes(chat_F, plain_F, [index])
