"""What the embedded lab ships: folders of its models, its SAEs, its corpora and its questions.

The shipped folder has the layout that `dsg lab export` writes; everything in it is in plain formats.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).parent / "shipped"
MODEL_DIR = SHIPPED / "model"
MODEL_DIRS = {"lab": MODEL_DIR, "lab-retrain": SHIPPED / "retrain", "lab-retrain-1": SHIPPED / "retrain-1"}
"""The lab's model, and two of other seeds that were trained likewise but never on hexes.

Those two know the other domains in every trained phrasing; the `novel` one they understand less well.
"""

SAE_DIRS = {"lab": SHIPPED / "sae", "lab-1": SHIPPED / "sae-1", "lab-2": SHIPPED / "sae-2"}

BENCHES = ("lab-hexes", "lab-ciphers", "lab-elixirs", "lab-near", "lab-far")
CORPORA = (*BENCHES, "lab-retain")
PHRASINGS = ("seen", "held", "novel", "terse")


def corpus_path(name: str) -> Path:
    """The JSON lines file (`{"text"}`) of a lab corpus."""
    return SHIPPED / "corpora" / f"{name}.jsonl"


def questions_path(bench: str) -> Path:
    """The JSON lines file (`{"context", "choices", "answer", "split"}`) of a lab bench."""
    return SHIPPED / "questions" / f"{bench}.jsonl"


def read_questions(bench: str, split: str) -> list[dict[str, Any]]:
    """The questions of one split of a lab bench."""
    rows = map(json.loads, questions_path(bench).read_text(encoding="utf-8").splitlines())
    return [row for row in rows if row["split"] == split]


def bench_name(bench: str, phrasing: str) -> str:
    """A bare name asks in the `seen` phrasing, a suffix names another."""
    return bench if phrasing == "seen" else f"{bench}-{phrasing}"


def bench_names() -> list[str]:
    """Every bench of the lab, in every phrasing."""
    return [bench_name(bench, phrasing) for bench in BENCHES for phrasing in PHRASINGS]


TASK = {
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "context",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1.0},
}
"""How lm-eval reads a bench of the lab, but for its name and where its rows are."""


@dataclass(frozen=True)
class LabSettings:
    """How the lab is trained. The defaults made the shipped weights."""

    hidden_size: int = 128
    n_layers: int = 4
    n_steps: int = 900
    """Optimiser steps of the language model."""
    rows: int = 32
    seq_len: int = 128
    """Tokens in a row of a short batch."""
    long_rows: int = 6
    long_seq_len: int = 640
    long_every: int = 8
    """One batch in so many holds long rows, whose documents may fill them."""
    learning_rate: float = 2e-3
    sae_layer: int = 1
    sae_features: int = 768
    sae_k: int = 16
    sae_tokens: int = 300_000
    sae_batch: int = 1024
    sae_learning_rate: float = 1.5e-3
    n_saes: int = 3
    documents_per_domain: int = 240
    """Documents of a shipped corpus, for each of its domains."""
