"""The one training loop of every method: draw text, lower the method's loss by AdamW, stop where it diverges.

Weights and optimiser are float32. The order of text follows from the seed and the step, so that a training that goes
on from its checkpoint ends with the same weights, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsg_cli.artifacts import Json
from dsg_cli.checkpoints import State
from dsg_cli.errors import DsgError
from dsg_cli.interruption import at_safe_points
from dsg_cli.methods.freedom import Free
from dsg_cli.methods.given import Changed, Given
from dsg_cli.model import devices_of
from dsg_cli.tokens import TokenBatch

RETAIN_SEED = 2**31
"""Added to the seed of retain text, so that the two orders differ."""


@dataclass(frozen=True)
class Batches:
    """The text of one forward pass."""

    forget: TokenBatch
    retain: TokenBatch
    step: int
    """Of the optimiser, from 0."""


Loss = Callable[[Batches], dict[str, Tensor]]
"""The terms of a loss by name; `loss` is what is lowered."""


def train(given: Given, free: Free, loss: Loss) -> Changed:
    """Lower a loss.

    Args:
        given: Model, text and seed.
        free: What may change, and the settings of training.
        loss: The method's.

    Raises:
        DsgError: It was not finite from the first step on, or the model is spread over several devices.
    """
    if len(devices_of(given.model)) > 1:
        raise DsgError("A model that is spread over several devices cannot be trained here.", "Take one device.")
    settings, model = free.settings, given.model.eval()  # No dropout: the same step gives the same weights.
    run = _Run(given, free)
    with at_safe_points():
        for several in _drawn(given, free, from_step=run.step):
            run.take(loss, several)
            if run.diverged_at is not None:
                break
            given.report(f"training, loss {run.losses[-1]['loss']:.3g}, steps", run.step, settings.steps)
            given.checkpoint.reached("training", run.state)
    given.checkpoint.keep("training", run.state())
    run.end()
    model.requires_grad_(False)
    n_parameters = sum(one.numel() for one in free.parameters)
    return Changed(free.names, n_parameters, n_parameters, run.losses, run.diverged_at, run.kept_at, free.adapter)


def _drawn(given: Given, free: Free, *, from_step: int) -> Iterator[list[Batches]]:
    """The text of each step, in the order that the seed gives."""
    settings = free.settings
    size, a_step = settings.batch_size, settings.batch_size * settings.accumulation
    forget = given.forget.draws(settings.steps * a_step, given.seed)
    retain = given.retain.draws(settings.steps * a_step, given.seed + RETAIN_SEED)
    for step in range(from_step, settings.steps):
        starts = range(step * a_step, (step + 1) * a_step, size)
        yield [
            Batches(given.forget.batch(forget[i : i + size]), given.retain.batch(retain[i : i + size]), step)
            for i in starts
        ]


class _Run:
    """Where a training stands."""

    def __init__(self, given: Given, free: Free) -> None:
        self.free, self.settings = free, free.settings
        self.autocast = torch.autocast(
            given.model.device.type,
            torch.bfloat16,
            enabled=free.settings.mixed_precision == "bfloat16",
            cache_enabled=False,  # It knows weights by their object, whose values a `Reference` exchanges.
        )
        self.optimizer = torch.optim.AdamW(
            free.parameters, lr=free.settings.learning_rate, weight_decay=free.settings.weight_decay
        )
        self.step = 0
        self.losses: list[Json] = []
        self.diverged_at: int | None = None
        self.kept_at: int | None = None
        """The step after which the weights were as they are, where it diverged."""
        self.kept, self.kept_steps = self._values(), 0
        """Weights that have given a finite loss, and after how many steps."""
        if (entry := given.checkpoint.entry("training")) is not None:
            self._restore(entry)

    def take(self, loss: Loss, several: Sequence[Batches]) -> None:
        """One step of the optimiser; none where the loss or its gradient is not finite."""
        self._set_rate()
        self.optimizer.zero_grad(set_to_none=True)
        terms: dict[str, float] = {}
        for batches in several:
            with self.autocast:
                found = loss(batches)
            found["loss"].div(len(several)).backward()  # type: ignore[no-untyped-call]
            for name, value in found.items():
                terms[name] = terms.get(name, 0.0) + value.item() / len(several)
        norm = torch.nn.utils.clip_grad_norm_(self.free.parameters, self.settings.max_gradient_norm)
        if not torch.isfinite(torch.tensor([float(norm), *terms.values()])).all() or not self._is_finite():
            self.diverged_at = self.step + 1
            return
        for kept, one in zip(self.kept, self.free.parameters, strict=True):
            kept.copy_(one.detach())  # They have just given a finite loss.
        self.kept_steps = self.step
        self.optimizer.step()
        self.step += 1
        self.losses.append({"step": self.step, **terms})

    def end(self) -> None:
        """Go back to the last weights that are known to be good, where training diverged.

        Raises:
            DsgError: There are none but those that it began with.
        """
        if self.diverged_at is None and self._is_finite():
            return
        self.diverged_at = self.diverged_at or self.step
        with torch.no_grad():
            for one, value in zip(self.free.parameters, self.kept, strict=True):
                one.copy_(value)
        if not self.losses or self.kept_steps == 0:
            raise DsgError(
                f"The loss was not finite at step {self.diverged_at}, before any weights could be kept.",
                "Lower the learning rate, or raise warmup_steps.",
            )
        self.kept_at = self.kept_steps
        self.losses = self.losses[: self.kept_at]

    def _set_rate(self) -> None:
        share = min(1.0, (self.step + 1) / self.settings.warmup_steps) if self.settings.warmup_steps else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * share

    def _is_finite(self) -> bool:
        return all(bool(torch.isfinite(one).all()) for one in self.free.parameters)

    def _values(self) -> list[Tensor]:
        return [one.detach().clone() for one in self.free.parameters]

    def state(self) -> State:
        """All that a training goes on from."""
        tensors: dict[str, Tensor] = {}
        for number, one in enumerate(self.free.parameters):
            tensors |= {f"now.{number}": one.detach(), f"kept.{number}": self.kept[number]}
            tensors |= {f"{key}.{number}": value for key, value in self.optimizer.state.get(one, {}).items()}
        counts = {"step": self.step, "kept_steps": self.kept_steps, "diverged_at": self.diverged_at}
        return {**counts, "losses": self.losses, **tensors}

    def _restore(self, entry: State) -> None:
        self.step, self.kept_steps, self.losses = entry["step"], entry["kept_steps"], entry["losses"]
        self.diverged_at = entry["diverged_at"]
        with torch.no_grad():
            for number, one in enumerate(self.free.parameters):
                one.copy_(entry[f"now.{number}"])
                self.kept[number].copy_(entry[f"kept.{number}"])
                if f"step.{number}" in entry:
                    self.optimizer.state[one] = {
                        "step": entry[f"step.{number}"],
                        **{key: entry[f"{key}.{number}"].to(one.device) for key in ("exp_avg", "exp_avg_sq")},
                    }
