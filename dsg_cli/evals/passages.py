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
from dsg_cli.evals.free_text import Found, Item, mean_of
from dsg_cli.evals.metrics import auc, auc_interval
from dsg_cli.intervals import wilson
from dsg_cli.workspace.results import Json

SCORES = ("loss_score", "zlib_score", "min_k_20", "min_k_plus_20")

N_WORDS = 24

N_NEW = 64

MOST = 200
"""Texts that are taken, unless a limit says otherwise."""


@dataclass(frozen=True)
class Memory:
    """Texts that are read.

    Args:
        name: `memory:` and the corpus.
        texts: Its texts.
        holdout: Texts that the model never saw; without them there are no AUCs.
    """

    name: str
    texts: Sequence[str]
    holdout: Sequence[str] = ()

    relative = ()

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

    def measured(self, found: Found) -> Json:
        own = [one for _, one in found["texts"]]
        n_tokens = sum(one["n_tokens"] for one in own)
        loss = sum(one["loss"] * one["n_tokens"] for one in own) / n_tokens
        metrics: Json = {"perplexity": math.exp(min(loss, 700.0)), "loss": loss}
        for name in ("exact_memorisation", "extraction_strength", *SCORES):
            metrics |= mean_of(name, [one[name] for one in own])
        for name in SCORES if self.holdout else ():
            members, others = ([one[name] for _, one in found[part]] for part in ("texts", "holdout"))
            low, high = auc_interval(members, others)
            metrics |= {f"auc_{name}": auc(members, others), f"auc_{name}_low": low, f"auc_{name}_high": high}
        return metrics

    def scores(self, _found: Found) -> Json:
        return {}

    def relative_to(self, _found: Found, _scores: Json) -> Json:
        return {}


@dataclass(frozen=True)
class Fluency:
    """Texts that are written on.

    Args:
        name: `fluency:` and the corpus.
        texts: Its texts; the first words of each are the prompt.
    """

    name: str
    texts: Sequence[str]

    metrics = ("rouge_l", "gibberish", "refusal", "repetition")
    relative = ()

    def items(self) -> list[Item]:
        """Prompts, of those texts that go on after them."""
        found = []
        for i, text in enumerate(self.texts):
            words = text.split(" ")
            n = min(N_WORDS, len(words) // 2)
            if n:
                begins = " ".join(words[:n])
                found.append(Item(f"{i}", "written", begins, text[len(begins) :], "", N_NEW, is_free=True))
        if not found:
            raise DsgError(f"{self.name}: no text has two words.")
        return found

    def measured(self, found: Found) -> Json:
        own = [one for _, one in found["written"]]
        metrics = mean_of("rouge_l", [one["rouge_l"] for one in own])
        metrics |= mean_of("repetition", [one["repetition"] for one in own])
        for name in ("gibberish", "refusal"):
            k = sum(one[name] for one in own)
            low, high = wilson(k, len(own))
            metrics |= {name: k / len(own), f"{name}_low": low, f"{name}_high": high}
        return metrics

    def scores(self, _found: Found) -> Json:
        return {}

    def relative_to(self, _found: Found, _scores: Json) -> Json:
        return {}
