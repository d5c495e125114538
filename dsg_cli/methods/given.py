"""What a method that changes weights is given, and what it gives back.

Each such method is a module of this package with one function, `unlearn(given, settings) -> Changed`, that changes the
weights of `given.model` in place. Its settings are the dataclass of its name in settings.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsg_cli.artifacts import Json
from dsg_cli.checkpoints import Checkpoint
from dsg_cli.methods.mentions import Mentions
from dsg_cli.methods.text import Text
from dsg_cli.progress import Report, silent
from dsg_cli.runtime.sites import HookSite


@dataclass(frozen=True)
class Features:
    """What a method may use of a sparse autoencoder."""

    site: HookSite
    """Where it reads."""
    encode: Callable[[Tensor], Tensor]
    """Residuals [T, D] -> activations [T, F], float32."""
    ranked: Sequence[int]
    """Features that tell forget text from retain text, the first the most."""
    relevant_KD: Tensor
    """Decoder rows of the features of highest rank."""
    irrelevant_KD: Tensor
    """Decoder rows of the live features of lowest importance ratio."""


@dataclass(frozen=True)
class Given:
    """What a method has in hand."""

    model: PreTrainedModel
    """Float32, whole; the method's own to change."""
    tokenizer: PreTrainedTokenizerBase
    forget: Text
    retain: Text
    features: Features | None = None
    """For methods that an SAE guides."""
    unknown: Text | Mentions | None = None
    """Entities that do not exist, for the method that needs them."""
    seed: int = 0
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    """Where the training goes on from, and is kept."""
    report: Report = silent

    @property
    def device(self) -> str:
        return str(self.model.device)


@dataclass(frozen=True)
class Changed:
    """What was done to the weights."""

    names: list[str]
    """Of the parameters that were free to change."""
    n_parameters: int
    n_changed: int
    losses: list[Json]
    """[{step, loss, <term>, ...}]; steps count from 1."""
    diverged_at: int | None = None
    kept_at: int | None = None
    """Where it diverged, the step after which the weights were as they are now."""
    adapter: Any = None
    """PEFT's model, if adapters were trained."""
