"""How the lab is trained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LabSettings:
    """How the lab is trained. The defaults made the shipped weights."""

    hidden_size: int = 128
    n_layers: int = 4
    n_steps: int = 900
    """Optimiser steps of the language model."""
    rows: int = 32
    """Rows of a short batch."""
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
