"""MUSE (Shi et al., 2407.06460): verbatim memorisation, knowledge, and what membership inference sees.

VerbMem: ROUGE-L F1 of 128 tokens that the model writes after the beginning of a forget text, against as many of the
text. KnowMem: ROUGE-L F1 of answers of at most 32 tokens, after a few questions with theirs. PrivLeak: the AUC with
which Min-40 % tells holdout text from forget text, relative to that of a model that never saw either
(metrics/membership.py). All times 100, as published.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dsg_cli.errors import DsgError
from dsg_cli.evals.free_text import Found, Item, mean_of
from dsg_cli.evals.metrics import auc, auc_interval, privleak
from dsg_cli.workspace.results import Json

N_VERBATIM = 128

N_ANSWER = 32

STOP = ("\n\n", "\nQuestion", "Question:")

MIN_K = "min_k_40"

Rows = Callable[[str, str], Sequence[Any]]
"""Configuration and split of the data set -> its rows."""


@dataclass(frozen=True)
class Muse:
    """The bench of one corpus.

    Args:
        name: Such as `muse-news`.
        rows: Where its data are.
        asked: How a question is put, with `{question}`; the answer follows after a space.
        shown: How a question is shown with its answer, before others, with `{question}` and `{answer}`.
        stop: Where an answer ends.
        n_verbatim: Tokens that are written after the beginning of a text.
        n_answer: Tokens of an answer, at most.
        limit: Items of each part, at most.
    """

    name: str
    rows: Rows
    asked: str = "Question: {question}\nAnswer:"
    shown: str = "Question: {question}\nAnswer: {answer}\n\n"
    stop: tuple[str, ...] = STOP
    n_verbatim: int = N_VERBATIM
    n_answer: int = N_ANSWER
    limit: int | None = None

    metrics = ("verbmem_forget", "knowmem_forget", "knowmem_retain", "auc_forget", "privleak")
    relative = ("privleak",)

    def items(self) -> list[Item]:
        """Everything that is asked."""
        found = [
            Item(f"verbmem/{i}", "verbmem_forget", prompt, truth, n_new=self.n_verbatim, is_free=True, is_forget=True)
            for i, (prompt, truth) in enumerate(self._columns("verbmem", "forget", "prompt", "gt"))
        ]
        for side in ("forget", "retain"):
            examples = self._columns("knowmem", f"{side}_qa_icl", "question", "answer", limit=False)
            before = "".join(self.shown.format(question=question, answer=answer) for question, answer in examples)
            found += [
                Item(
                    f"knowmem_{side}/{i}",
                    f"knowmem_{side}",
                    before + self.asked.format(question=question),
                    answer,
                    n_new=self.n_answer,
                    stop=self.stop,
                    is_forget=side == "forget",
                )
                for i, (question, answer) in enumerate(self._columns("knowmem", f"{side}_qa", "question", "answer"))
            ]
        for split in ("forget", "holdout"):
            found += [
                Item(f"privleak_{split}/{i}", f"privleak_{split}", "", text, is_forget=split == "forget")
                for i, (text,) in enumerate(self._columns("privleak", split, "text"))
            ]
        return found

    def measured(self, found: Found) -> Json:
        metrics: Json = {}
        for part in ("verbmem_forget", "knowmem_forget", "knowmem_retain"):
            metrics |= mean_of(part, [one["rouge_l"] for _, one in found[part]], factor=100)
        holdout, forget = _scores(found)
        low, high = auc_interval(holdout, forget)
        return metrics | {"auc_forget": auc(holdout, forget), "auc_forget_low": low, "auc_forget_high": high}

    def scores(self, found: Found) -> Json:
        return {"auc": auc(*_scores(found))}

    def relative_to(self, found: Found, scores: Json) -> Json:
        holdout, forget = _scores(found)
        reference = float(scores["auc"])
        low, high = (privleak(one, reference) for one in auc_interval(holdout, forget))
        middle = privleak(auc(holdout, forget), reference)
        return {"privleak": 100 * middle, "privleak_low": 100 * low, "privleak_high": 100 * high}

    def _columns(self, config: str, split: str, *names: str, limit: bool = True) -> list[tuple[str, ...]]:
        rows = self.rows(config, split)
        n = len(rows) if self.limit is None or not limit else min(self.limit, len(rows))
        if not n:
            raise DsgError(f"{self.name}: the part {config}/{split} is empty.")
        missing = [name for name in names if name not in rows[0]]
        if missing:
            raise DsgError(f"{self.name}: the part {config}/{split} has no column {missing[0]}.")
        return [tuple(str(rows[i][name]) for name in names) for i in range(n)]


def _scores(found: Found) -> tuple[list[float], list[float]]:
    """Min-K% scores of holdout and of forget text."""
    holdout, forget = ([one[MIN_K] for _, one in found[f"privleak_{split}"]] for split in ("holdout", "forget"))
    return holdout, forget
