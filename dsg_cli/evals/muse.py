"""MUSE (Shi et al., 2407.06460): verbatim memorisation, knowledge, and what membership inference sees.

VerbMem: ROUGE-L F1 of 128 tokens that the model writes after the beginning of a forget text, against as many of the
text. KnowMem: ROUGE-L F1 of answers of at most 32 tokens, after a few questions with theirs. PrivLeak: the AUC with
which Min-40 % tells holdout text from forget text, relative to that of a model that never saw either
(metrics.py). All times 100, as published.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dsg_cli.errors import DsgError
from dsg_cli.evals.free_text import Item, PartResults, TextBench
from dsg_cli.evals.metrics import auc, auc_interval, mean_of, privleak
from dsg_cli.workspace.body import Json

MIN_K = "min_k_40"

Rows = Callable[[str, str], Sequence[Any]]
"""Configuration and split of the data set -> its rows."""


@dataclass(frozen=True)
class Muse(TextBench):
    """The bench of one corpus."""

    name: str
    rows: Rows
    question_form: str = "Question: {question}\nAnswer:"
    """How a question is put; the answer follows after a space."""
    example_form: str = "Question: {question}\nAnswer: {answer}\n\n"
    """How a question is shown with its answer, before others."""
    stop: tuple[str, ...] = ("\n\n", "\nQuestion", "Question:")
    """Where an answer ends."""
    n_verbatim: int = 128
    """Tokens that are written after the beginning of a text."""
    n_answer: int = 32
    """Tokens of an answer, at most."""
    limit: int | None = None
    """Items of each part, at most."""

    metrics = ("verbmem_forget", "knowmem_forget", "knowmem_retain", "auc_forget", "privleak")
    relative = ("privleak",)

    def items(self) -> list[Item]:
        items = [
            Item(f"verbmem/{i}", "verbmem_forget", prompt, truth, n_new=self.n_verbatim, is_judged=True, is_forget=True)
            for i, (prompt, truth) in enumerate(self._columns("verbmem", "forget", "prompt", "gt"))
        ]
        for side in ("forget", "retain"):
            part, is_forget = f"knowmem_{side}", side == "forget"
            examples = self._columns("knowmem", f"{side}_qa_icl", "question", "answer", is_limited=False)
            before = "".join(self.example_form.format(question=q, answer=answer) for q, answer in examples)
            for i, (question, answer) in enumerate(self._columns("knowmem", f"{side}_qa", "question", "answer")):
                context = before + self.question_form.format(question=question)
                items.append(Item(f"{part}/{i}", part, context, answer, "", self.n_answer, self.stop, False, is_forget))
        for split in ("forget", "holdout"):
            part = f"privleak_{split}"
            for i, (text,) in enumerate(self._columns("privleak", split, "text")):
                items.append(Item(f"{part}/{i}", part, "", text, is_forget=split == "forget"))
        return items

    def compute(self, results: PartResults) -> Json:
        metrics: Json = {}
        for part in ("verbmem_forget", "knowmem_forget", "knowmem_retain"):
            metrics |= mean_of(part, [result["rouge_l"] for _, result in results[part]], factor=100)
        holdout, forget = _min_k(results)
        low, high = auc_interval(holdout, forget)
        return metrics | {"auc_forget": auc(holdout, forget), "auc_forget_low": low, "auc_forget_high": high}

    def scores(self, results: PartResults) -> Json:
        return {"auc": auc(*_min_k(results))}

    def relative_to(self, results: PartResults, scores: Json) -> Json:
        holdout, forget = _min_k(results)
        reference = float(scores["auc"])
        low, high = (privleak(bound, reference) for bound in auc_interval(holdout, forget))
        middle = privleak(auc(holdout, forget), reference)
        return {"privleak": 100 * middle, "privleak_low": 100 * low, "privleak_high": 100 * high}

    def _columns(self, config: str, split: str, *names: str, is_limited: bool = True) -> list[tuple[str, ...]]:
        rows = self.rows(config, split)
        n = len(rows) if self.limit is None or not is_limited else min(self.limit, len(rows))
        if not n:
            raise DsgError(f"{self.name}: the part {config}/{split} is empty.")
        missing = [name for name in names if name not in rows[0]]
        if missing:
            raise DsgError(f"{self.name}: the part {config}/{split} has no column {missing[0]}.")
        return [tuple(str(rows[i][name]) for name in names) for i in range(n)]


def _min_k(results: PartResults) -> tuple[list[float], list[float]]:
    """Min-K% scores of holdout and of forget text."""
    holdout, forget = ([result[MIN_K] for _, result in results[f"privleak_{split}"]] for split in ("holdout", "forget"))
    return holdout, forget
