"""What a model has by heart of any corpus, and whether it still writes language after its texts begin.

`memory:CORPUS` reads texts: perplexity, exact memorisation, extraction strength, and membership scores, with their
AUCs where a corpus that the model never saw is given. `fluency:CORPUS` has the model write on from the beginnings of
texts: ROUGE-L against how they go on, and shares of gibberish and refusals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dsg_cli.errors import DsgError
from dsg_cli.evals.free_text import Item, PartResults, TextBench
from dsg_cli.evals.metrics import auc, auc_interval, mean_of
from dsg_cli.intervals import wilson
from dsg_cli.workspace.body import Json

SCORES = ("loss_score", "zlib_score", "min_k_20", "min_k_plus_20")

N_WORDS, N_NEW = 24, 64
"""Words of a text that are shown, and tokens that are written after them."""

MOST = 200
"""Texts that are taken, unless a limit says otherwise."""


@dataclass(frozen=True)
class Memory(TextBench):
    """`memory:CORPUS`: texts that are read."""

    name: str
    texts: Sequence[str]
    holdout: Sequence[str] = ()
    """Texts that the model never saw; without them there are no AUCs."""

    @property
    def metrics(self) -> tuple[str, ...]:
        own = ("perplexity", "loss", "exact_memorisation", "extraction_strength", *SCORES)
        return (*own, *(f"auc_{name}" for name in SCORES if self.holdout))

    def items(self) -> list[Item]:
        return [
            Item(f"{part}/{i}", part, "", text, is_forget=part == "texts")
            for part, texts in (("texts", self.texts), ("holdout", self.holdout))
            for i, text in enumerate(texts)
        ]

    def compute(self, results: PartResults) -> Json:
        texts = [result for _, result in results["texts"]]
        n_tokens = sum(result["n_tokens"] for result in texts)
        loss = sum(result["loss"] * result["n_tokens"] for result in texts) / n_tokens
        metrics: Json = {"perplexity": math.exp(min(loss, 700.0)), "loss": loss}
        for name in ("exact_memorisation", "extraction_strength", *SCORES):
            metrics |= mean_of(name, [result[name] for result in texts])
        for name in SCORES if self.holdout else ():
            members, others = ([result[name] for _, result in results[part]] for part in ("texts", "holdout"))
            low, high = auc_interval(members, others)
            metrics |= {f"auc_{name}": auc(members, others), f"auc_{name}_low": low, f"auc_{name}_high": high}
        return metrics


@dataclass(frozen=True)
class Fluency(TextBench):
    """`fluency:CORPUS`: texts that are written on after their first words."""

    name: str
    texts: Sequence[str]

    metrics = ("rouge_l", "gibberish", "refusal", "repetition")

    def items(self) -> list[Item]:
        items = []
        for i, text in enumerate(self.texts):
            words = text.split(" ")
            n = min(N_WORDS, len(words) // 2)
            if n:
                begins = " ".join(words[:n])
                items.append(Item(f"{i}", "written", begins, text[len(begins) :], "", N_NEW, is_judged=True))
        if not items:
            raise DsgError(f"{self.name}: no text has two words.")
        return items

    def compute(self, results: PartResults) -> Json:
        texts = [result for _, result in results["written"]]
        metrics = mean_of("rouge_l", [result["rouge_l"] for result in texts])
        metrics |= mean_of("repetition", [result["repetition"] for result in texts])
        for name in ("gibberish", "refusal"):
            k = sum(result[name] for result in texts)
            low, high = wilson(k, len(texts))
            metrics |= {name: k / len(texts), f"{name}_low": low, f"{name}_high": high}
        return metrics
