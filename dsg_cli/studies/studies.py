"""How much forget text is needed?

By documents: a share of those that select reads, drawn at random. By entities: those that name some of a share of the
entities that the text is about, and none of the others; documents that name nobody are left out. A larger share
contains a smaller one. Retain text stays whole, and its statistics are computed once.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dsg_cli.artifacts import Json
from dsg_cli.corpora import Corpus
from dsg_cli.errors import DsgError
from dsg_cli.lab.words import DOMAINS
from dsg_cli.lab.world import build_world
from dsg_cli.studies.rig import Rig, gate_rows
from dsg_cli.studies.rows import accuracy_row, accuracy_rows


@dataclass(frozen=True)
class Kept:
    """A share of the forget text."""

    corpora: list[Corpus]
    entities: list[str]
    """Those that it may name; all of them, by documents."""

    @property
    def n_documents(self) -> int:
        """Documents that select reads."""
        return sum(len(corpus.part("select")) for corpus in self.corpora)


def rows_of(point: Json, rig: Rig) -> list[Json]:
    """The guardrail made with a share of the forget text; by entities also on questions that name them, and on others.

    Raises:
        DsgError: No document is left, or the guardrail cannot be made.
    """
    kept = share_of(rig.forget, point["by"], point["share"], seed=point.get("seed", rig.seed), names=rig.names)
    point = point | {"n_documents": kept.n_documents, "n_entities": len(kept.entities)}
    guards = rig.guards_on(kept.corpora)
    guard, asker = guards.make(rig.wanted), rig.asker(guards)
    found = asker.under([guard])
    rows = [*accuracy_rows(point, found), *gate_rows(point, guard)]
    if point["by"] == "documents":
        return rows
    naming = _naming(kept.entities)
    is_named = [bool(naming.search(question.context)) for question in asker.questions[rig.forget_bench]]
    for metric, is_wanted in (("acc_named", True), ("acc_not_named", False)):
        pairs = zip(found[rig.forget_bench], is_named, strict=True)
        own = [outcome for outcome, named in pairs if named == is_wanted]
        rows += [accuracy_row(point, rig.forget_bench, own, metric=metric)] if own else []
    return rows


def share_of(corpora: Sequence[Corpus], by: str, share: float, *, seed: int, names: Sequence[str]) -> Kept:
    """A share of forget corpora.

    Args:
        corpora: The forget text.
        by: `documents` or `entities`.
        share: In percent; at least one of them is kept.
        seed: Of the order in which they are taken.
        names: Of entities; those that no document names do not count.

    Raises:
        DsgError: No entity is known, or none is named; no document is left.
    """
    texts = [text for corpus in corpora for text in corpus.part("select")]
    named = {text: set(_naming(names).findall(text)) for text in texts} if names else {}
    entities = sorted(set().union(*named.values()))
    if by == "entities":
        if not entities:
            raise DsgError(
                "No document names an entity that is known.",
                "Give their names, one a line: --set study.entities_file=FILE.",
            )
        entities = _taken(entities, share, seed)
        left = {text for text in texts if named[text] and named[text] <= set(entities)}
    else:
        left = {text for corpus in corpora for text in _taken(corpus.part("select"), share, f"{seed}/{corpus.name}")}
    if not left:
        raise DsgError(
            f"At {share:g} % of the {by} no document is left.", "Take a larger share, or give more forget text."
        )
    found = [replace(corpus, texts=[text for text in corpus.texts if text in left]) for corpus in corpora]
    return Kept([replace(one, sha256=_digest(one.texts)) for one in found if one.texts], entities)


def known_names(corpora: Sequence[str]) -> list[str]:
    """Entities that corpora of the lab are about."""
    world = build_world()
    return [name for domain in DOMAINS if f"lab-{domain.name}" in corpora for name in world.entities(domain.name)]


def _taken(values: Sequence[str], share: float, seed: object) -> list[str]:
    order = list(dict.fromkeys(values))
    random.Random(f"share/{seed}").shuffle(order)
    return order[: max(1, math.ceil(round(len(order) * share / 100, 9)))]


def _naming(names: Sequence[str]) -> re.Pattern[str]:
    """What finds names in a text; the longer of two that begin alike."""
    return re.compile(r"\b(?:" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + r")\b")


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("".join(hashlib.sha256(text.encode()).hexdigest() for text in texts).encode()).hexdigest()
