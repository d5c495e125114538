"""The text that `dsg inspect` reads: the corpora that features were selected on, and what is near to the forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from dsg_cli.artifacts import Guardrail, Json
from dsg_cli.corpora import Corpus, check_disjoint, check_named, parse_name, part_of
from dsg_cli.prompting import prompts
from dsg_cli.recipe import Recipe
from dsg_cli.stages.inspected import Inspected
from dsg_cli.stages.material import read_corpora
from dsg_cli.tokens import chunks, encode
from dsg_cli.workspace import Stored

NEAR_BY_DEFAULT = "lab-near"
MOST_TOKENS = 2**18
"""Of each corpus."""
LONGEST_ROW = 1024
BLOCK = 256
"""Documents that are encoded at a time."""


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


def drawn_as(recipe: Recipe, features: Stored | None, limit: int | None) -> Recipe:
    """The recipe with the limit and the seed by which documents are drawn: those of select, where they are known.

    Args:
        recipe: Else its own.
        features: What select made.
        limit: Documents of each corpus, if other than those of select are wanted.
    """
    drawn = recipe.corpora.limit
    if features is not None:
        drawn, recipe = features.header.settings["limit"], replace(recipe, seed=features.header.seed)
    return replace(recipe, corpora=replace(recipe.corpora, limit=drawn if limit is None else limit))


def read_groups(
    recipe: Recipe, found: Inspected, features: Stored | None, *, near: Sequence[str]
) -> tuple[list[Group], list[str]]:
    """The corpora of select, and those that are named as near; and a note on each that has changed since.

    Args:
        recipe: From `drawn_as`.
        found: The artifact that is inspected.
        features: The features that it was made from, if they are at hand.
        near: Names of near corpora, of those that select had or others.

    Raises:
        DsgError: A corpus is unknown, cannot be read, or is both forgotten and near.
    """
    forget, retain = _names(found, features)
    near = list(near) or [name for name in retain if name == NEAR_BY_DEFAULT]
    if near:
        check_named(near, role="near")
    check_disjoint(forget, near)
    near_names = [parse_name(name).name for name in near]
    is_whole = features is not None and recipe.corpora.limit == features.header.settings["limit"]
    groups: list[Group] = []
    notes: list[str] = []
    for role, names in (("forget", forget), ("retain", retain)):
        corpora, changed = read_corpora(names, role, recipe, features) if names else ([], [])
        groups += [Group(one, "near" if one.name in near_names else role) for one in corpora]
        notes += changed if is_whole else []
    further = [name for name in near if parse_name(name).name not in {group.name for group in groups}]
    if further:
        corpora, _ = read_corpora(further, "near", recipe, None)
        groups += [Group(one, "near") for one in corpora]
    order = ("forget", "near", "retain")
    return sorted(groups, key=lambda group: order.index(group.role)), notes


def _names(found: Inspected, features: Stored | None) -> tuple[list[str], list[str]]:
    """Names of the forget and the retain corpora of select."""
    if features is not None:
        settings = features.header.settings
        return [one["name"] for one in settings["forget"]], [one["name"] for one in settings["retain"]]
    body = found.made.body
    assert isinstance(body, Guardrail)
    return list(body.forget), list(body.retain)


def read_rows(tokenizer: PreTrainedTokenizerBase, corpus: Corpus, *, bos: int | None, seq_len: int) -> Rows:
    """The `select` part of a corpus, on which scores and rates of select are too: so many tokens of it, at most."""
    texts = prompts(tokenizer, corpus, "select")
    numbers = [i for i, text in enumerate(corpus.texts) if part_of(text) == "select"]
    ids: list[list[int]] = []
    places: list[tuple[int, int]] = []
    n_tokens = n_documents = 0
    step = seq_len - (bos is not None)
    for start in range(0, len(texts), BLOCK):
        block = encode(tokenizer, texts[start : start + BLOCK], bos=bos)
        for number, document in zip(numbers[start : start + BLOCK], block, strict=True):
            if n_tokens >= MOST_TOKENS:
                return Rows(ids, places, n_documents)
            for k, row in enumerate(chunks(document, seq_len, bos=bos)):
                ids.append(row)
                places.append((number, k * step))
            n_documents += 1
            n_tokens += len(document)
    return Rows(ids, places, n_documents)
