"""Settings of training that have the right type and still make no sense, so that it is said before anything runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from dsg_cli.methods.settings import Finetune, MethodsSection, Ssd, Training

Check = tuple[bool, str]
AT_LEAST_1 = ("steps", "batch_size", "accumulation", "lora_rank", "n_relevant", "n_irrelevant", "n_rows", "max_steps")
POSITIVE = ("epochs", "learning_rate", "max_gradient_norm", "lora_alpha", "beta", "temperature", "alpha", "coefficient")
NOT_NEGATIVE = (
    "warmup_steps",
    "weight_decay",
    "forget_weight",
    "retain_weight",
    "subspace_weight",
    "push_weight",
    "kl_weight",
    "nll_weight",
    "dampening",
    "min_steps",
    "gamma",
    "last_max_step",
    "layer",
)


def checks(section: MethodsSection) -> tuple[Check, ...]:
    """Whether each number of each method that changes weights is in its range, and what to say if not."""
    trained = {
        field.name: getattr(section, field.name)
        for field in dataclasses.fields(section)
        if isinstance(getattr(section, field.name), Training | Ssd)
    }
    return tuple(check for name, settings in trained.items() for check in _of(f"methods.{name}", settings))


def _of(prefix: str, settings: Any) -> Iterator[Check]:
    values = dataclasses.asdict(settings)
    for name, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if name == "steps" and isinstance(settings, Finetune):
            yield value >= 0, f"{prefix}.steps is {value}; 0 takes as many as the epochs need."
        elif name in AT_LEAST_1:
            yield value >= 1, f"{prefix}.{name} is {value}; take at least 1."
        elif name in POSITIVE:
            yield 0 < value < math.inf, f"{prefix}.{name} is {value:g}; it must be a positive number."
        elif name in NOT_NEGATIVE and is_number:
            yield 0 <= value < math.inf, f"{prefix}.{name} is {value:g}; it must not be negative."
    yield values["max_tokens"] >= 2, f"{prefix}.max_tokens is {values['max_tokens']}; it must be at least 2."
    layers = values.get("layers")
    yield layers is None or bool(layers), f"{prefix}.layers is empty; leave it out to train all."
    if isinstance(settings, Finetune):
        is_either = settings.rows == "documents" or settings.answer_after is None
        yield is_either, f"{prefix}.answer_after needs {prefix}.rows=documents; packed rows count whole."
        yield settings.answer_after != "", f"{prefix}.answer_after is empty; leave it out to count whole documents."
