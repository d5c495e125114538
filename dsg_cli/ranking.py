"""Features ranked by how well their descriptions match a query.

A term is a word (keywords.py) that is no stop word, stemmed lightly so that singular and plural meet:

- a word of at most three letters stays as it is;
- `-ies` becomes `-y`; else a final `s` goes, but for `-ss`, `-us` and `-is`;
- then a final `e` goes: `hexes` and `hex`, `viruses` and `virus`, `disease` and `diseases` have one stem each.

Scores are BM25's, in the form of Lucene with k1 = 1.5 and b = 0.75, over the descriptions as documents: with N of them,
n_t with the term t, f_t its count in one of `length` terms,

    score = sum_t log(1 + (N - n_t + 0.5) / (n_t + 0.5)) * f_t / (f_t + k1 (1 - b + b length / mean length))

or, with an embedding model, the cosine of its mean-pooled last hidden states (embedding.py). Of equal scores the
smaller index comes first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dsg_cli.errors import DsgError
from dsg_cli.keywords import words_of

K1, B = 1.5, 0.75
_STOP_WORDS = (
    "a about after all also an and any are as at be because been before being between both but by can could did do "
    "does each etc for from had has have he her his how i if in into is it its like may more most no not of on one "
    "only or other our out over she should so some such than that the their them then there these they this those to "
    "up us was we were what when where which while who will with would you your"
)
STOP_WORDS = frozenset(_STOP_WORDS.split())


@dataclass(frozen=True)
class Match:
    """A feature whose description matches."""

    index: int
    score: float


def terms_of(text: str) -> list[str]:
    """The terms of a text, in order."""
    return [_stem(word) for word in words_of(text) if word not in STOP_WORDS]


def _stem(word: str) -> str:
    if len(word) <= 3:
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    return word[:-1] if word.endswith("e") and len(word) > 3 else word


def rank_by_terms(query: str, descriptions: Mapping[int, str]) -> list[Match]:
    """Every feature whose description shares a term with the query, the best first.

    Args:
        query: Words, in any order.
        descriptions: Of features, by index.

    Raises:
        DsgError: The query holds no term, or no description has one of it.
    """
    import bm25s

    wanted = list(dict.fromkeys(terms_of(query)))
    if not wanted:
        raise DsgError(f"The query {query[:100]!r} holds no word that tells anything.", "Name what is to be forgotten.")
    indices = sorted(descriptions)
    documents = [terms_of(descriptions[j]) for j in indices]
    known = {term for terms in documents for term in terms}
    found = [term for term in wanted if term in known]
    if not found:
        raise DsgError(
            f"No description matches {query[:100]!r}.", "Describe it in other words, or rank by --embedding NAME."
        )
    ranker = bm25s.BM25(k1=K1, b=B, method="lucene", dtype="float64")
    ranker.index(documents, show_progress=False)
    scores = ranker.get_scores(found)
    return ranked({j: float(score) for j, score in zip(indices, scores, strict=True) if score > 0})


def ranked(scores: Mapping[int, float]) -> list[Match]:
    """Features by score, the highest first; of equal ones the smaller index."""
    return [Match(j, scores[j]) for j in sorted(scores, key=lambda j: (-scores[j], j))]


def unmatched(query: str, descriptions: Iterable[str]) -> list[str]:
    """The query's words that stand in none of the descriptions."""
    known = {term for text in descriptions for term in terms_of(text)}
    return [word for word in dict.fromkeys(words_of(query)) if word not in STOP_WORDS and _stem(word) not in known]
