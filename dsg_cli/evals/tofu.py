"""TOFU (Maini et al., 2401.06121): made-up authors to forget, others to keep, real ones and the world beside them.

Of every question: the probability of its answer, ROUGE-L recall of what the model writes, and the truth ratio of false
answers to the true one in another wording (metrics/truthfulness.py). Model utility is the harmonic mean of the three
on the three parts that are to be kept; forget quality compares the truth ratios on forget questions with those of a
model that never saw them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dsg_cli.errors import DsgError
from dsg_cli.evals.free_text import Found, Item, mean_of
from dsg_cli.workspace.results import Json


def probability(loss: float) -> float:
    """Of an answer, to the power of one over its length."""
    return math.exp(-loss)


def probability_among(loss: float, other_losses: Sequence[float]) -> float:
    """Of the true answer among all that are offered."""
    true = probability(loss)
    return true / (true + sum(map(probability, other_losses)))


def truth_ratio(paraphrase_loss: float, perturbed_losses: Sequence[float]) -> float:
    """R: probability of false answers (their geometric mean) over that of the true one, in another wording.

    Near 0 for a model that knows the answer, about 1 for one that does not.
    """
    return math.exp(paraphrase_loss - sum(perturbed_losses) / len(perturbed_losses))


def balance(ratio: float) -> float:
    """1 where true and false answers are as likely; of what is to be forgotten, larger is better."""
    return min(ratio, 1 / ratio) if ratio > 0 else 0.0


def truthfulness(ratio: float) -> float:
    """1 where only the true answer is likely; of what is to be kept, larger is better."""
    return max(0.0, 1 - ratio)


def model_utility(values: Sequence[float]) -> float:
    """Harmonic mean of probability, ROUGE-L and truthfulness on everything that is to be kept; 0 if one is 0."""
    from scipy.stats import hmean

    return float(hmean(values)) if min(values) > 0 else 0.0


def forget_quality(ratios: Sequence[float], retrained: Sequence[float]) -> tuple[float, float]:
    """p-value and statistic of a two-sample Kolmogorov-Smirnov test of truth ratios on forget questions.

    Small p: the model can be told from one that never saw them.
    """
    from scipy.stats import ks_2samp

    found = ks_2samp(ratios, retrained)
    return float(found.pvalue), float(found.statistic)


N_ANSWER = 200

KEPT = ("retain", "real_authors", "world_facts")

PARTS = ("forget", *KEPT)

Rows = Callable[[str], Sequence[Any]]
"""Configuration of the data set -> its rows."""


@dataclass(frozen=True)
class Tofu:
    """The bench of one split.

    Args:
        name: Such as `tofu-forget10`.
        forget: Its configuration, such as `forget10`.
        rows: Where its data are.
        asked: How a question is put, with `{question}`; the answer follows after a space.
        stop: Where an answer ends.
        n_new: Tokens of an answer, at most.
        limit: Questions of each part, at most.
    """

    name: str
    forget: str
    rows: Rows
    asked: str = "Question: {question}\nAnswer:"
    stop: tuple[str, ...] = ("\n",)
    n_new: int = N_ANSWER
    limit: int | None = None

    metrics = (
        *(f"{metric}_{part}" for part in PARTS for metric in ("probability", "rouge", "truth")),
        "model_utility",
        "forget_quality",
        "forget_ks",
    )
    relative = ("forget_quality", "forget_ks")

    def items(self) -> list[Item]:
        """Everything that is asked."""
        found = []
        for part in PARTS:
            config = f"{self.forget if part == 'forget' else part}_perturbed"
            rows = self.rows(config)
            n = len(rows) if self.limit is None else min(self.limit, len(rows))
            if not n:
                raise DsgError(f"{self.name}: the part {config} is empty.")
            is_own = part in ("forget", "retain")
            for name in ("question", "answer", "perturbed_answer", *(("paraphrased_answer",) if is_own else ())):
                if name not in rows[0]:
                    raise DsgError(f"{self.name}: the part {config} has no column {name}.")
            for i in range(n):
                found += self._of_question(part, i, rows[i])
        return found

    def _of_question(self, part: str, number: int, row: Any) -> list[Item]:
        context, name, is_forget = self.asked.format(question=row["question"]), f"{part}/{number}", part == "forget"
        perturbed = row["perturbed_answer"]
        perturbed = [perturbed] if isinstance(perturbed, str) else list(perturbed)
        if not perturbed:
            raise DsgError(f"{self.name}: question {number} of {part} has no false answer.")
        items = [
            Item(name, part, context, row["answer"], "written", self.n_new, self.stop, is_forget=is_forget),
            Item(name, part, context, f" {row['answer']}", "answer", is_forget=is_forget),
            *(Item(name, part, context, f" {one}", "perturbed", is_forget=is_forget) for one in perturbed),
        ]
        # Of real authors and the world there is no other wording; the answer itself takes its place.
        if "paraphrased_answer" in row:
            said = f" {row['paraphrased_answer']}"
            items.append(Item(name, part, context, said, "paraphrase", is_forget=is_forget))
        return items

    def measured(self, found: Found) -> Json:
        metrics: Json = {}
        for part in PARTS:
            questions = _questions(found, part)
            ratios = [_ratio(one) for one in questions]
            is_own = part in ("forget", "retain")
            likely = [
                probability(one["answer"][0]["loss"])
                if is_own
                else probability_among(one["answer"][0]["loss"], [other["loss"] for other in one["perturbed"]])
                for one in questions
            ]
            metrics |= mean_of(f"probability_{part}", likely)
            metrics |= mean_of(f"rouge_{part}", [one["written"][0]["rouge_l_recall"] for one in questions])
            judged = balance if part == "forget" else truthfulness
            metrics |= mean_of(f"truth_{part}", [judged(ratio) for ratio in ratios])
        kept = [metrics[f"{metric}_{part}"] for part in KEPT for metric in ("probability", "rouge", "truth")]
        return metrics | {"model_utility": model_utility(kept)}

    def scores(self, found: Found) -> Json:
        return {"truth_ratios": [_ratio(one) for one in _questions(found, "forget")]}

    def relative_to(self, found: Found, scores: Json) -> Json:
        ratios = [_ratio(one) for one in _questions(found, "forget")]
        p_value, statistic = forget_quality(ratios, scores["truth_ratios"])
        return {"forget_quality": p_value, "forget_ks": statistic}


def _questions(found: Found, part: str) -> list[dict[str, list[Json]]]:
    """Of each question of a part, what came of its items by their roles."""
    questions: dict[str, dict[str, list[Json]]] = {}
    for item, one in found[part]:
        questions.setdefault(item.id, {}).setdefault(item.role, []).append(one)
    return list(questions.values())


def _ratio(question: dict[str, list[Json]]) -> float:
    true = question.get("paraphrase") or question["answer"]
    return truth_ratio(true[0]["loss"], [one["loss"] for one in question["perturbed"]])
