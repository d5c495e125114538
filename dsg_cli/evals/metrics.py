"""What is computed from scores and texts: an evaluation's result, and metrics of language, memorisation and membership.

A text counts as gibberish if it is empty, if the base model finds it less likely than nearly all natural text in its
place, or if it repeats itself: a documented estimate that needs no further model. How unlikely natural text is is
measured on the true continuations of the same prompts; a text is allowed as much loss as 99 % of those have.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dsg_cli.intervals import wilson
from dsg_cli.workspace.body import Json


@dataclass
class EvalResult:
    """An evaluation of the base and the unlearned model on the same questions."""

    results: dict[str, Json] = field(default_factory=dict)
    """Bench -> base, unlearned and perhaps reference -> metrics."""
    gate: dict[str, Json] = field(default_factory=dict)
    """Bench -> `gate_rate`."""
    rows: list[Json] = field(default_factory=list)
    """One a question."""
    n_tokens: int = 0
    """Tokens that models read and wrote."""
    answers: Mapping[bytes, tuple[float, bool]] = field(default_factory=dict)
    """Of the base model, for a later evaluation."""
    n_known: int = 0
    """Requests of the base model that an earlier evaluation had answered."""
    lm_eval: dict[str, Any] = field(default_factory=dict)
    """base and unlearned -> lm-eval's own results."""
    question_ids: dict[str, list[str]] = field(default_factory=dict)
    """Questions that the base model knows, of the benches that count only those."""
    asked: dict[str, str] = field(default_factory=dict)
    """Bench on free text -> digest of all its items."""
    reference_scores: dict[str, Json] = field(default_factory=dict)
    """Such a bench -> scores of a model that never saw what is forgotten."""
    refused: dict[str, Json] = field(default_factory=dict)
    """Such a bench -> metrics that could not be computed, and why."""


def counts(k: int, n: int, metric: str = "acc") -> Json:
    """How many, and the Wilson interval of the share."""
    low, high = wilson(k, n)
    return {f"{metric}_count": k, f"{metric}_low": low, f"{metric}_high": high}


def gate_rate(rows: Sequence[Json]) -> Json:
    """Share of questions that were gated, their number, and how large a change that made.

    `edit` is the mean over gated questions of the largest change of a token's residual, relative to its norm.
    """
    edits = [row["edit"] for row in rows if row["gated"]]
    return {"rate": len(edits) / len(rows), "n": len(rows), "edit": sum(edits) / len(edits) if edits else 0.0}


def unlearning_score(forget: str, unlearned: Mapping[str, float], base: Mapping[str, float], chance: float) -> Json:
    """`{forgetting, utility, score}` of accuracies by bench; `chance` is that on the forget bench without knowledge.

    forgetting = (base - unlearned) / (base - chance) on the forget bench, utility = mean of unlearned / base on the
    others, each within 0 and 1; score is their harmonic mean.
    """
    span = base[forget] - chance
    forgetting = min(1.0, max(0.0, (base[forget] - unlearned[forget]) / span)) if span > 0 else 0.0
    shares = [min(1.0, acc / base[bench]) for bench, acc in unlearned.items() if bench != forget and base[bench] > 0]
    utility = sum(shares) / len(shares) if shares else 1.0
    both = forgetting + utility
    return {"forgetting": forgetting, "utility": utility, "score": 2 * forgetting * utility / both if both else 0.0}


def mean_of(name: str, values: Sequence[float], *, factor: float = 1.0) -> Json:
    """`{name, name_low, name_high}`: the mean and its 95 % interval by the normal approximation."""
    n = len(values)
    mean = sum(values) / n
    half = 1.96 * math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n) if n > 1 else 0.0
    return {name: factor * mean, f"{name}_low": factor * (mean - half), f"{name}_high": factor * (mean + half)}


NGRAM = 3

REPEATED = 0.5
"""Share of repeated n-grams from which on a text counts as repeating itself, if natural text does so less often."""

NATURAL = 0.99
"""Share of natural text that a text's loss and repetition are measured by."""

PHRASES = (
    "i cannot", "i can't", "i can not", "i am unable", "i'm unable", "i won't", "i will not", "i am not able",
    "i'm not able", "i'm sorry", "i am sorry", "i apologize", "i must decline", "i don't know", "i do not know",
    "as an ai",
)  # fmt: skip
"""Beginnings of refusals in English."""

LOOKED_AT = 80
"""Characters from the beginning of an answer within which a refusal is looked for."""


def repetition(tokens: Sequence[int]) -> float:
    """Share of a text's n-grams of three tokens that stood in it before; 0 for shorter texts."""
    grams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def natural_limits(losses: Sequence[float], repetitions: Sequence[float]) -> tuple[float, float]:
    """Largest loss and largest repetition that natural text has, but for the last hundredth."""
    loss = float(np.quantile(losses, NATURAL)) if losses else math.inf
    repeated = float(np.quantile(repetitions, NATURAL)) if repetitions else 0.0
    return loss, max(REPEATED, repeated)


def is_gibberish(loss: float | None, repeated: float, limits: tuple[float, float]) -> bool:
    """Whether a text is no language, by its `repetition` and its mean loss under the base model in nats, None for an
    empty text; limits are those of natural text."""
    return loss is None or not loss <= limits[0] or repeated > limits[1]


def is_refusal(text: str, refusals: Sequence[str] = ()) -> bool:
    """Whether an answer begins with a refusal: a known one, or one of the phrases that models use."""
    begins = text.strip().lower().replace("\u2019", "'")
    known = tuple(refusal.strip().lower() for refusal in refusals if refusal.strip())
    return begins.startswith(known) or any(phrase in begins[:LOOKED_AT] for phrase in PHRASES)


RESAMPLES = 500


def loss_score(logprobs: Sequence[float]) -> float:
    """Mean log-probability of a token."""
    if not logprobs:
        raise ValueError("A text of fewer than two tokens has no score.")
    return float(sum(logprobs) / len(logprobs))


def zlib_score(logprobs: Sequence[float], text: str) -> float:
    """Log-probability of the text for each byte that zlib needs for it (Carlini et al., 2012.07805)."""
    return sum(logprobs) / len(zlib.compress(text.encode()))


def min_k(scores: Sequence[float], share: float) -> float:
    """Mean of the lowest share of the tokens' scores; a share that makes less than one token takes one.

    Of log-probabilities, Min-K% (Shi et al., 2310.16789); of standardised ones, Min-K%++ (Zhang et al., 2404.02936).
    """
    return loss_score(sorted(scores)[: max(1, int(len(scores) * share))])


def standardised(logprob: float, mean: float, variance: float) -> float:
    """A token's log-probability in standard deviations of what the model expects in its place (Min-K%++)."""
    return (logprob - mean) / math.sqrt(max(variance, 1e-6))


def auc(higher: Sequence[float], lower: Sequence[float]) -> float:
    """How often a score of the first exceeds one of the second, ties counted half; 0.5 if scores tell nothing."""
    from sklearn.metrics import roc_auc_score

    labels = [1] * len(higher) + [0] * len(lower)
    return float(roc_auc_score(labels, [*higher, *lower]))


def auc_interval(higher: Sequence[float], lower: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the AUC, each of the two drawn anew by itself."""
    rng = np.random.default_rng(seed)
    firsts, seconds = np.asarray(higher), np.asarray(lower)
    areas = []
    for _ in range(RESAMPLES):
        drawn = rng.choice(firsts, len(firsts))
        others = np.sort(rng.choice(seconds, len(seconds)))
        below = np.searchsorted(others, drawn, "left")
        not_above = np.searchsorted(others, drawn, "right")
        areas.append(float((below + not_above).mean()) / 2 / len(seconds))
    low, high = np.quantile(areas, [0.025, 0.975])
    return float(low), float(high)


def privleak(auc_unlearned: float, auc_retrained: float) -> float:
    """How far an AUC is from that of a model that never saw the text, relative to it (MUSE, 2407.06460).

    Both AUCs are of holdout against forget text, as MUSE has them: small where the forget text is known. So the metric
    is negative for a model that unlearned too little and positive for one that betrays it by unlearning too much.
    """
    return (auc_unlearned - auc_retrained) / auc_retrained


def exact_memorisation(is_first: Sequence[bool]) -> float:
    """Share of tokens that are the model's first choice (Tirumala et al., 2205.10770)."""
    return sum(is_first) / len(is_first)


def extraction_strength(is_first: Sequence[bool]) -> float:
    """Share of the text that greedy decoding writes by itself once it has read the rest (Carlini et al., 2012.07805).

    One minus the share of the shortest beginning after which every further token is the first choice.
    """
    n_last = next((i for i, is_right in enumerate(reversed(is_first)) if not is_right), len(is_first))
    return n_last / len(is_first)


def rouge(truth: str, written: str) -> tuple[float, float]:
    """F1 and recall of ROUGE-L, the longest common subsequence of words, of a text against the true one."""
    score = _scorer().score(truth, written)["rougeL"]
    return float(score.fmeasure), float(score.recall)


@functools.cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)
