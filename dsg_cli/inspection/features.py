"""What is said of features: their contexts and words in each corpus, and what speaks against them.

That is: they follow the form of a text, or what the forgotten domain shares with others. The rules are simple, and
say so; none of them is a proof.

- *Formatting*: at least half of its strongest contexts (those that reach half of its largest activation) peak on a
  token without a letter (punctuation, digits, white space), or on a token of the chat template; or it is active on
  more than a fifth of the tokens of what is retained, near text included; or on chat-formatted retain text far more
  often than on plain (`selection.formatting_notes`).
- *Shared*: on a near corpus it is active at least half as often as on what is to be forgotten. A gate may watch a
  feature with a negative weight in order to stay closed there; of those it is not said.
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
from dsg_cli.inspection.contexts import Contexts, describe_features, distinct_contexts
from dsg_cli.workspace.body import Json


@dataclass(frozen=True)
class Group:
    """A corpus, and what it is to the guardrail: forget, near or retain."""

    corpus: Corpus
    role: str

    @property
    def name(self) -> str:
        return self.corpus.name

    def described(self) -> Json:
        """For the artifact's settings."""
        return {"role": self.role, **self.corpus.described()}


@dataclass(frozen=True)
class Rows:
    """Documents of a group as the model reads them, long ones in several rows."""

    ids: list[list[int]]
    places: list[tuple[int, int]]
    """Of each row: its document's number in the corpus, and how many of the document's tokens are before it."""
    n_documents: int


@dataclass(frozen=True)
class Read:
    """A group, and what the C features do in it."""

    group: Group
    rows: Rows
    contexts: Contexts

    def rate(self, c: int) -> float:
        return float(self.contexts.rate_C[c])


STRONG = 0.5
"""Of the largest peak of a feature: contexts that reach it say where it peaks."""
FEW_CONTEXTS = 4
"""With fewer nothing is said about where contexts peak."""
MANY_PEAKS, COMMON_RATE, SHARED_RATIO = 0.5, 0.2, 0.5


def with_near(reads: Sequence[Read], features: Sequence[SelectedFeature]) -> tuple[list[Read], list[str]]:
    """The groups with one that is near: where none was named, the retain corpus on which features are active most.

    What a gate watches against itself does not count.
    """
    retained = [read for read in reads if read.group.role == "retain"]
    if not retained or any(read.group.role == "near" for read in reads):
        return list(reads), []
    counted = [c for c, feature in enumerate(features) if feature.weight is None or feature.weight >= 0]
    nearest = max(retained, key=lambda read: sum(map(read.rate, counted)))
    groups = [replace(read, group=replace(read.group, role="near")) if read is nearest else read for read in reads]
    note = (
        f"No corpus was named as near; {nearest.group.name} is taken, the retain corpus on which these features are "
        "active most. Name one with --near."
    )
    return sorted(groups, key=lambda read: ("forget", "near", "retain").index(read.group.role)), [note]


def context_rows(reads: Sequence[Read], c: int, index: int, n: int, tokenizer: PreTrainedTokenizerBase) -> list[Json]:
    """The n strongest contexts of feature c of C, which is `index` in the SAE, in each group, with their text."""
    return [
        {
            "feature": index,
            "group": read.group.name,
            "document": read.rows.places[context.row][0],
            "position": read.rows.places[context.row][1] + context.position,
            "peak": context.peak,
            "at": context.at,
            "activations": context.acts,
            "tokens": token_texts(tokenizer, context.ids),
        }
        for read in reads
        for context in distinct_contexts(read.contexts, c)[:n]
    ]


def words_of_all(reads: Sequence[Read], n_features: int, tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
    """The words that are characteristic of the strongest contexts of each of C features, in whatever group.

    Words are rare or common among these `n_features` = C.
    """
    names = ("peak_CN", "row_CN", "position_CN", "ids_CNW", "acts_CNW")
    joined = {name: torch.cat([getattr(read.contexts, name) for read in reads], 1) for name in names}
    order_CN = joined["peak_CN"].abs().argsort(dim=-1, descending=True, stable=True)
    row_C1 = torch.arange(n_features)[:, None]
    strongest: dict[str, Any] = {name: tensor[row_C1, order_CN] for name, tensor in joined.items()}
    peak_CN = strongest["peak_CN"]
    strongest["peak_CN"] = torch.where(peak_CN.abs() >= STRONG * peak_CN[:, :1].abs(), peak_CN, 0.0)
    descriptions = describe_features(replace(reads[0].contexts, **strongest), tokenizer)
    words = {row.index: row.description.split(", ") for row in descriptions}
    return [[word for word in words.get(c, []) if word] for c in range(n_features)]


def feature_warnings(
    reads: Sequence[Read], c: int, feature: SelectedFeature, n_features: int, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """What speaks against feature c of C; of the groups one is near, and `n_features` are those of the SAE."""
    contexts = [(context, read) for read in reads for context in distinct_contexts(read.contexts, c)]
    largest = max((abs(context.peak) for context, _ in contexts), default=0.0)
    peaks = [(context.ids[context.at], read) for context, read in contexts if abs(context.peak) >= STRONG * largest]
    forgotten, retained = (
        [read for read in reads if (read.group.role == "forget") == is_forget] for is_forget in (True, False)
    )
    # Words of the template, such as `user`, are words elsewhere; tokens that mark turns are not.
    template, markers = template_tokens(tokenizer), tokenizer.added_tokens_decoder
    n_template = sum(token in template and (read.group.corpus.is_chat or token in markers) for token, read in peaks)
    warnings = formatting_warnings(
        [str(tokenizer.decode([token])) for token, _ in peaks], n_template, _pooled_rate(retained, c)
    )
    if forgotten and (feature.weight is None or feature.weight >= 0):
        near_rates = {read.group.name: read.rate(c) for read in reads if read.group.role == "near"}
        warnings += shared_warnings(_pooled_rate(forgotten, c), near_rates)
    return [*warnings, *_chat_warnings(retained, c, feature.index, n_features)]


def formatting_warnings(peaks: Sequence[str], n_template: int, retained_rate: float) -> list[str]:
    """Whether a feature looks like formatting.

    `peaks` are the tokens on which its strongest contexts peak, `n_template` of them of the chat template;
    `retained_rate` is the share of the tokens of all that is not to be forgotten on which it is active.
    """
    warnings, n_bare = [], sum(map(is_bare, peaks))
    strongest = f"of its {len(peaks)} strongest contexts peak"
    if len(peaks) >= FEW_CONTEXTS and n_template >= MANY_PEAKS * len(peaks):
        warnings.append(f"looks like formatting: {n_template} {strongest} in the chat template")
    elif len(peaks) >= FEW_CONTEXTS and n_bare >= MANY_PEAKS * len(peaks):
        warnings.append(f"looks like formatting: {n_bare} {strongest} on a token without a letter")
    if retained_rate > COMMON_RATE:
        warnings.append(f"looks like formatting: active on {retained_rate:.1%} of the tokens of what is retained")
    return warnings


def is_bare(text: str) -> bool:
    """Whether a token holds no letter; one that is a part of a character may be a part of a letter."""
    return "\ufffd" not in text and not any(character.isalpha() for character in text)


def shared_warnings(forget_rate: float, near_rates: Mapping[str, float]) -> list[str]:
    """Which near corpora a feature is about too; rates are shares of tokens on which it is active."""
    return [
        f"shared with {name}: active on {rate:.1%} of its tokens, and on {forget_rate:.1%} of what is to be forgotten"
        for name, rate in near_rates.items()
        if rate > 0 and rate >= SHARED_RATIO * forget_rate
    ]


def template_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that the chat template puts around what a user says; none where there is no template."""
    if not tokenizer.chat_template:
        return set()
    around = [set(tokenizer(as_chat(tokenizer, text), add_special_tokens=False)["input_ids"]) for text in ("a", "the")]
    return (around[0] & around[1]) - {tokenizer.unk_token_id}


def _pooled_rate(reads: Sequence[Read], c: int) -> float:
    n_tokens = sum(read.contexts.n_tokens for read in reads)
    return sum(read.rate(c) * read.contexts.n_tokens for read in reads) / n_tokens if n_tokens else 0.0


def _chat_warnings(retained: Sequence[Read], c: int, index: int, n_features: int) -> list[str]:
    """As select says it: does the feature tell chat text from plain text?"""
    forms = [[read for read in retained if read.group.corpus.is_chat == is_chat] for is_chat in (True, False)]
    if not all(forms):
        return []
    at = torch.tensor([index])
    chat_F, plain_F = (torch.zeros(n_features).index_fill(0, at, _pooled_rate(reads, c)) for reads in forms)
    return formatting_notes(chat_F, plain_F, [index])
