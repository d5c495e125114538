"""The one training loop of every method: draw text, lower the method's loss by AdamW, stop where it diverges.

Weights and optimiser are float32. The order of text follows from the seed and the step, so that a training that goes
on from its checkpoint ends with the same weights, bit for bit. Also what losses are made of, the model as it was before
training, and what a training costs. Shapes: B sequences, L positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsg_cli.data.batches import TokenBatch
from dsg_cli.errors import DsgError, nearest
from dsg_cli.guardrail.runtime.sites import MLP, HookSite, decoder_layers, decoder_of
from dsg_cli.job import PLAIN_JOB, Job
from dsg_cli.methods.text import NameSpans, TrainingRows
from dsg_cli.models.language_model import add_adapters, devices_of, linear_layers
from dsg_cli.settings import RetainLoss, Training
from dsg_cli.workspace.body import Json
from dsg_cli.workspace.checkpoints import State
from dsg_cli.workspace.files import at_safe_points

RETAIN_SEED = 2**31
"""Added to the seed of retain text, so that the two orders differ."""

OUT = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "w2", "wo")
"""What families call the matrix by which an MLP writes."""


@dataclass(frozen=True)
class Features:
    """What a method may use of a sparse autoencoder."""

    site: HookSite
    """Where it reads."""
    encode: Callable[[Tensor], Tensor]
    """Residuals [T, D] -> activations [T, F], float32."""
    relevant_KD: Tensor
    """Decoder rows of the features of highest rank."""
    irrelevant_KD: Tensor
    """Decoder rows of the live features of lowest importance ratio."""


@dataclass(frozen=True)
class TrainingInputs:
    """What a method that changes weights works on."""

    model: PreTrainedModel
    """Float32, whole; the method's own to change."""
    forget: TrainingRows
    retain: TrainingRows
    features: Features | None = None
    """For methods that an SAE guides."""
    unknown: TrainingRows | NameSpans | None = None
    """Entities that do not exist, for the method that needs them."""
    seed: int = 0
    job: Job = PLAIN_JOB

    @property
    def device(self) -> str:
        return str(self.model.device)


@dataclass(frozen=True)
class TrainedWeights:
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


@dataclass(frozen=True)
class TrainableParameters:
    """Parameters that may change."""

    names: list[str]
    parameters: list[nn.Parameter]
    settings: Training
    adapter: Any = None
    """PEFT's model around the given one, in which adapters now are."""


def trainable_parameters(
    model: PreTrainedModel, settings: Training, *, layers: Sequence[int] | None = None, seed: int = 0
) -> TrainableParameters:
    """Freeze all of the model but what the settings name; adapters, whose first values the seed gives, are put into it
    in place. `layers` are those of the method, where the settings name none; None means all."""
    layers = settings.layers if settings.layers is not None else layers
    n_layers = len(decoder_layers(model))
    beyond = [layer for layer in layers or () if not 0 <= layer < n_layers]
    if beyond:
        raise DsgError(f"The model has layers 0 to {n_layers - 1}; there is no layer {beyond[0]}.")
    model.requires_grad_(False)
    prefix = next(f"{path}." for path, module in model.named_modules() if module is decoder_layers(model))

    def is_trained(name: str) -> bool:
        """Of a parameter, or of a module."""
        if not name.startswith(prefix):
            return settings.trained == "all" and layers is None
        number, _, inner = name.removeprefix(prefix).partition(".")
        parts = inner.split(".")
        is_mlp = any(part in MLP for part in parts)
        is_out = is_mlp and any(part in OUT for part in parts) and not name.endswith(".bias")
        is_kind = {"all": True, "mlp": is_mlp, "mlp-out": is_out}[settings.trained]
        return is_kind and (layers is None or int(number) in layers)

    if settings.lora:
        linear = [name for name in linear_layers(model) if name.startswith(prefix) and is_trained(name)]
        targets = _adapter_targets(linear, settings.lora_targets)
        adapter = add_adapters(model, targets, rank=settings.lora_rank, alpha=settings.lora_alpha, seed=seed)
        trained = {name: weight for name, weight in adapter.named_parameters() if weight.requires_grad}
        return TrainableParameters(list(trained), list(trained.values()), settings, adapter)
    trained = {name: weight for name, weight in model.named_parameters() if is_trained(name)}
    if not trained:
        raise DsgError(f"No weight is left to train by `{settings.trained}` in layers {layers}.")
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return TrainableParameters(list(trained), list(trained.values()), settings)


def _adapter_targets(linear: Sequence[str], endings: Sequence[str]) -> list[str]:
    """The linear layers whose names have one of these endings; all of them, if there are none."""
    targets = [name for name in linear if not endings or any(f".{name}".endswith(f".{end}") for end in endings)]
    if not targets:
        known = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise DsgError(
            f"No linear layer that would be trained has a name that ends with {', '.join(endings) or 'anything'}.",
            f"{nearest(endings[0] if endings else '', known)} They end with: {', '.join(known) or 'nothing'}.",
        )
    return targets


@dataclass(frozen=True)
class Batches:
    """The text of one forward pass."""

    forget: TokenBatch
    retain: TokenBatch
    step: int
    """Of the optimiser, from 0."""


Loss = Callable[[Batches], dict[str, Tensor]]
"""The terms of a loss by name; `loss` is what is lowered."""


def train(
    inputs: TrainingInputs, trainable: TrainableParameters, loss: Loss, *, n_steps: int | None = None
) -> TrainedWeights:
    """Lower a loss for so many steps of the optimiser; by default as many as the settings say."""
    if len(devices_of(inputs.model)) > 1:
        raise DsgError("A model that is spread over several devices cannot be trained here.", "Take one device.")
    job, n_steps = inputs.job.named("training"), trainable.settings.steps if n_steps is None else n_steps
    model = inputs.model.eval()  # No dropout: the same step gives the same weights.
    progress = _TrainingProgress(model, trainable, job.kept())
    with at_safe_points():
        for batches in _batches_of_steps(inputs, trainable.settings, n_steps, from_step=progress.step):
            progress.take_step(loss, batches)
            if progress.diverged_at is not None:
                break
            job.progress(f"training, loss {progress.losses[-1]['loss']:.3g}, steps", progress.step, n_steps)
            job.reached(progress.state)
    job.keep(progress.state())
    progress.end()
    model.requires_grad_(False)
    n = sum(parameter.numel() for parameter in trainable.parameters)
    losses, diverged_at, kept_at = progress.losses, progress.diverged_at, progress.kept_at
    return TrainedWeights(trainable.names, n, n, losses, diverged_at, kept_at, trainable.adapter)


def _batches_of_steps(
    inputs: TrainingInputs, settings: Training, n_steps: int, *, from_step: int
) -> Iterator[list[Batches]]:
    """The text of each step, in the order that the seed gives."""
    size, n_rows = settings.batch_size, settings.batch_size * settings.accumulation
    forget = inputs.forget.draws(n_steps * n_rows, inputs.seed)
    retain = inputs.retain.draws(n_steps * n_rows, inputs.seed + RETAIN_SEED)
    for step in range(from_step, n_steps):
        starts = range(step * n_rows, (step + 1) * n_rows, size)
        rows = [(forget[i : i + size], retain[i : i + size]) for i in starts]
        yield [Batches(inputs.forget.batch(own), inputs.retain.batch(others), step) for own, others in rows]


class _TrainingProgress:
    """Where a training stands: its optimiser, its losses, and the last weights that are known to be good."""

    def __init__(self, model: PreTrainedModel, trainable: TrainableParameters, kept: State | None) -> None:
        self.parameters, self.settings = trainable.parameters, trainable.settings
        self.autocast = torch.autocast(
            model.device.type,
            torch.bfloat16,
            enabled=self.settings.mixed_precision == "bfloat16",
            cache_enabled=False,  # It knows weights by their object, whose values `ReferenceWeights` exchanges.
        )
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay
        )
        self.step = 0
        self.losses: list[Json] = []
        self.diverged_at: int | None = None
        self.kept_at: int | None = None
        """The step after which the weights were as they are, where it diverged."""
        self.kept, self.kept_steps = [parameter.detach().clone() for parameter in self.parameters], 0
        """Weights that have given a finite loss, and after how many steps."""
        if kept is not None:
            self._restore(kept)

    def take_step(self, loss: Loss, passes: Sequence[Batches]) -> None:
        """One step of the optimiser; none where the loss or its gradient is not finite."""
        warmup_steps = self.settings.warmup_steps
        warmth = min(1.0, (self.step + 1) / warmup_steps) if warmup_steps else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * warmth
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        for batches in passes:
            with self.autocast:
                terms = loss(batches)
            terms["loss"].div(len(passes)).backward()  # type: ignore[no-untyped-call]
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.item() / len(passes)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_gradient_norm)
        if not torch.isfinite(torch.tensor([float(norm), *sums.values()])).all() or not self._is_finite():
            self.diverged_at = self.step + 1
            return
        for kept, parameter in zip(self.kept, self.parameters, strict=True):
            kept.copy_(parameter.detach())  # They have just given a finite loss.
        self.kept_steps = self.step
        self.optimizer.step()
        self.step += 1
        self.losses.append({"step": self.step, **sums})

    def end(self) -> None:
        """Go back to the last weights that are known to be good, where training diverged."""
        if self.diverged_at is None and self._is_finite():
            return
        self.diverged_at = self.diverged_at or self.step
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.kept, strict=True):
                parameter.copy_(value)
        if not self.losses or self.kept_steps == 0:
            raise DsgError(
                f"The loss was not finite at step {self.diverged_at}, before any weights could be kept.",
                "Lower the learning rate, or raise warmup_steps.",
            )
        self.kept_at = self.kept_steps
        self.losses = self.losses[: self.kept_at]

    def _is_finite(self) -> bool:
        return all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters)

    def state(self) -> State:
        """All that a training goes on from."""
        tensors: dict[str, Tensor] = {}
        for number, parameter in enumerate(self.parameters):
            tensors |= {f"now.{number}": parameter.detach(), f"kept.{number}": self.kept[number]}
            tensors |= {f"{key}.{number}": value for key, value in self.optimizer.state.get(parameter, {}).items()}
        counts = {"step": self.step, "kept_steps": self.kept_steps, "diverged_at": self.diverged_at}
        return {**counts, "losses": self.losses, **tensors}

    def _restore(self, kept: State) -> None:
        self.step, self.kept_steps, self.losses = kept["step"], kept["kept_steps"], kept["losses"]
        self.diverged_at = kept["diverged_at"]
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters):
                parameter.copy_(kept[f"now.{number}"])
                self.kept[number].copy_(kept[f"kept.{number}"])
                if f"step.{number}" in kept:
                    self.optimizer.state[parameter] = {
                        "step": kept[f"step.{number}"],
                        **{key: kept[f"{key}.{number}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")},
                    }


class ReferenceWeights:
    """The values of some parameters at the time when this was made: the model as it was, without a second copy of it.

    `with reference():` a model that holds them computes as it did then, without gradients. They are exchanged by
    reference, so that it costs no time; of adapters, which begin as 0, it is the base model.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.values: list[Tensor] = [parameter.detach().clone() for parameter in self.parameters]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        now = [parameter.data for parameter in self.parameters]
        try:
            for parameter, value in zip(self.parameters, self.values, strict=True):
                parameter.data = value
            with torch.no_grad():
                yield
        finally:
            for parameter, value in zip(self.parameters, now, strict=True):
                parameter.data = value


def next_token_logits(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """Logits that predict tokens 1 .. L-1, float32, [B, L-1, V]."""
    output = model(input_ids=batch.ids_BL, attention_mask=batch.mask_BL.long(), use_cache=False)
    logits_BLV: Tensor = output.logits[:, :-1].float()
    return logits_BLV


def token_losses(logits_BLV: Tensor, batch: TokenBatch) -> Tensor:
    """Negative log-likelihood of each token after the first, 0 at padding, [B, L-1].

    The likelihood of a sequence is that of its tokens after the first, whatever the first is (BOS, mostly).
    """
    target_BL = batch.ids_BL[:, 1:].masked_fill(~batch.mask_BL[:, 1:], -100)
    return F.cross_entropy(logits_BLV.transpose(1, 2), target_BL, reduction="none")


def mean_loss(logits_BLV: Tensor, batch: TokenBatch) -> Tensor:
    """Negative log-likelihood per token, over all sequences together, []."""
    return token_losses(logits_BLV, batch).sum() / batch.mask_BL[:, 1:].sum()


def sequence_losses(logits_BLV: Tensor, batch: TokenBatch) -> Tensor:
    """Negative log-likelihood of each sequence, [B]."""
    return token_losses(logits_BLV, batch).sum(-1)


def divergence(teacher_BLV: Tensor, student_BLV: Tensor, batch: TokenBatch, *, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) per token, times the squared temperature as in distillation, []."""
    teacher, student = ((logits / temperature).log_softmax(-1) for logits in (teacher_BLV, student_BLV))
    kl_BL = (teacher.exp() * (teacher - student)).sum(-1)
    mask_BL = batch.mask_BL[:, 1:]
    return kl_BL[mask_BL].sum() / mask_BL.sum() * temperature**2


def retain_term(model: PreTrainedModel, reference: ReferenceWeights, batch: TokenBatch, kind: RetainLoss) -> Tensor:
    """R(retain), which keeps the rest of the model: `nll`, or `kl` from the model as it was, []."""
    if kind == "none":
        return torch.zeros((), device=batch.ids_BL.device)
    logits_BLV = next_token_logits(model, batch)
    if kind == "nll":
        return mean_loss(logits_BLV, batch)
    with reference():
        before_BLV = next_token_logits(model, batch)
    return divergence(before_BLV, logits_BLV, batch)


@dataclass
class Cost:
    """Calls of the model, and tokens in them, padding included. A call that keeps a graph is followed by a backward
    pass."""

    forward_passes: int = 0
    backward_passes: int = 0
    forward_tokens: int = 0
    backward_tokens: int = 0

    def as_json(self) -> dict[str, int]:
        return asdict(self)


@contextmanager
def count_passes(model: nn.Module, cost: Cost) -> Iterator[None]:
    """While the block runs, every call of the model is counted."""

    def count(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        n_tokens = ids.numel() if ids is not None else kwargs["inputs_embeds"].shape[:2].numel()
        cost.forward_passes += 1
        cost.forward_tokens += n_tokens
        if torch.is_grad_enabled():
            cost.backward_passes += 1
            cost.backward_tokens += n_tokens

    handle = decoder_of(model).register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
