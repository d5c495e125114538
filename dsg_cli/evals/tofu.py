"""TOFU (Maini et al., 2401.06121): made-up authors to forget, others to keep, real ones and the world beside them.

Of every question: the probability of its answer, ROUGE-L recall of what the model writes, and the truth ratio R of
false answers to the true one in another wording, reported as min(R, 1/R) of what is forgotten and as max(0, 1 - R) of
what is kept. Model utility is the harmonic mean of the three on the three parts that are kept; forget quality compares
the truth ratios on forget questions with those of a model that never saw them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsg_cli.errors import DsgError
from dsg_cli.evals.free_text import Item, PartResults, TextBench
from dsg_cli.evals.metrics import mean_of
from dsg_cli.workspace.body import Json


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

    test = ks_2samp(ratios, retrained)
    return float(test.pvalue), float(test.statistic)


KEPT = ("retain", "real_authors", "world_facts")

PARTS = ("forget", *KEPT)

OWN = ("forget", "retain")
"""Parts on the made-up authors."""

Rows = Callable[[str], Sequence[Any]]
"""Configuration of the data set -> its rows."""


@dataclass(frozen=True)
class Tofu(TextBench):
    """The bench of one split, such as `tofu-forget10`."""

    name: str
    forget: str
    """Its configuration, such as `forget10`."""
    rows: Rows
    question_form: str = "Question: {question}\nAnswer:"
    """How a question is put; the answer follows after a space."""
    stop: tuple[str, ...] = ("\n",)
    """Where an answer ends."""
    n_new: int = 200
    """Tokens of an answer, at most."""
    limit: int | None = None
    """Questions of each part, at most."""

    metrics = (
        *(f"{metric}_{part}" for part in PARTS for metric in ("probability", "rouge", "truth")),
        "model_utility",
        "forget_quality",
        "forget_ks",
    )
    relative = ("forget_quality", "forget_ks")

    def items(self) -> list[Item]:
        items = []
        for part in PARTS:
            config = f"{self.forget if part == 'forget' else part}_perturbed"
            rows = self.rows(config)
            if not len(rows) or self.limit == 0:
                raise DsgError(f"{self.name}: the part {config} is empty.")
            paraphrased = ("paraphrased_answer",) if part in OWN else ()
            for name in ("question", "answer", "perturbed_answer", *paraphrased):
                if name not in rows[0]:
                    raise DsgError(f"{self.name}: the part {config} has no column {name}.")
            for i in range(min(self.limit or len(rows), len(rows))):
                items += self._items_of(part, i, rows[i])
        return items

    def _items_of(self, part: str, number: int, row: Any) -> list[Item]:
        """Of one question: its answer to be written, and read; false answers; the answer in another wording."""
        perturbed = [row["perturbed_answer"]] if isinstance(row["perturbed_answer"], str) else row["perturbed_answer"]
        if not len(perturbed):
            raise DsgError(f"{self.name}: question {number} of {part} has no false answer.")
        name, context = f"{part}/{number}", self.question_form.format(question=row["question"])
        item = Item(name, part, context, row["answer"], "written", self.n_new, self.stop, is_forget=part == "forget")
        read = [("answer", row["answer"]), *(("perturbed", answer) for answer in perturbed)]
        # Of real authors and the world there is no other wording; the answer itself takes its place.
        if "paraphrased_answer" in row:
            read.append(("paraphrase", row["paraphrased_answer"]))
        return [item, *(replace(item, target=f" {text}", role=role, n_new=0, stop=()) for role, text in read)]

    def compute(self, results: PartResults) -> Json:
        metrics: Json = {}
        for part in PARTS:
            questions = _questions(results, part)
            likely = [
                probability(question["answer"][0]["loss"])
                if part in OWN
                else probability_among(
                    question["answer"][0]["loss"], [false["loss"] for false in question["perturbed"]]
                )
                for question in questions
            ]
            metrics |= mean_of(f"probability_{part}", likely)
            metrics |= mean_of(f"rouge_{part}", [question["written"][0]["rouge_l_recall"] for question in questions])
            rate = balance if part == "forget" else truthfulness
            metrics |= mean_of(f"truth_{part}", [rate(_ratio(question)) for question in questions])
        kept = [metrics[f"{metric}_{part}"] for part in KEPT for metric in ("probability", "rouge", "truth")]
        return metrics | {"model_utility": model_utility(kept)}

    def scores(self, results: PartResults) -> Json:
        return {"truth_ratios": [_ratio(question) for question in _questions(results, "forget")]}

    def relative_to(self, results: PartResults, scores: Json) -> Json:
        p_value, statistic = forget_quality(self.scores(results)["truth_ratios"], scores["truth_ratios"])
        return {"forget_quality": p_value, "forget_ks": statistic}


def _questions(results: PartResults, part: str) -> list[dict[str, list[Json]]]:
    """Of each question of a part, what came of its items by their roles."""
    questions: dict[str, dict[str, list[Json]]] = {}
    for item, result in results[part]:
        questions.setdefault(item.id, {}).setdefault(item.role, []).append(result)
    return list(questions.values())


def _ratio(question: dict[str, list[Json]]) -> float:
    true = question.get("paraphrase") or question["answer"]
    return truth_ratio(true[0]["loss"], [answer["loss"] for answer in question["perturbed"]])
