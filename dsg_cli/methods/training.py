"""The one training loop of every method: draw text, lower the method's loss by AdamW, stop where it diverges.

Weights and optimiser are float32. The order of text follows from the seed and the step, so that a training that goes
on from its checkpoint ends with the same weights, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from dsg_cli.data.batches import TokenBatch
from dsg_cli.errors import DsgError, nearest
from dsg_cli.guardrail.runtime.sites import MLP, HookSite, decoder_layers, decoder_of
from dsg_cli.job import Report, silent
from dsg_cli.methods.text import Mentions, Text
from dsg_cli.models.language_model import check_peft, devices_of
from dsg_cli.settings import RetainLoss, Training
from dsg_cli.workspace.checkpoints import Checkpoint, State
from dsg_cli.workspace.files import at_safe_points
from dsg_cli.workspace.results import Json


class Reference:
    """The values of some parameters at the time when this was made.

    `with reference():` a model that holds them computes as it did then, without gradients. They are exchanged by
    reference, so that it costs no time; of adapters, which begin as 0, it is the base model.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.values: list[Tensor] = [one.detach().clone() for one in self.parameters]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The block runs on the values of then."""
        now = [one.data for one in self.parameters]
        try:
            for one, value in zip(self.parameters, self.values, strict=True):
                one.data = value
            with torch.no_grad():
                yield
        finally:
            for one, value in zip(self.parameters, now, strict=True):
                one.data = value


def logits_of(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """Logits that predict tokens 1 .. L-1, float32, [B, L-1, V]."""
    found = model(input_ids=batch.ids_BL, attention_mask=batch.mask_BL.long(), use_cache=False)
    logits_BLV: Tensor = found.logits[:, :-1].float()
    return logits_BLV


def token_losses(logits_BLV: Tensor, batch: TokenBatch) -> Tensor:
    """Negative log-likelihood of each token after the first, 0 at padding, [B, L-1]."""
    wanted_BL = batch.ids_BL[:, 1:].masked_fill(~batch.mask_BL[:, 1:], -100)
    return F.cross_entropy(logits_BLV.transpose(1, 2), wanted_BL, reduction="none")


def mean_loss(logits_BLV: Tensor, batch: TokenBatch) -> Tensor:
    """Negative log-likelihood per token, over all sequences together, []."""
    return token_losses(logits_BLV, batch).sum() / batch.mask_BL[:, 1:].sum()


def sequence_losses(logits_BLV: Tensor, batch: TokenBatch) -> Tensor:
    """Negative log-likelihood of each sequence, [B]."""
    return token_losses(logits_BLV, batch).sum(-1)


def divergence(teacher_BLV: Tensor, student_BLV: Tensor, batch: TokenBatch, *, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) per token, times the squared temperature as in distillation, []."""
    teacher, student = ((one / temperature).log_softmax(-1) for one in (teacher_BLV, student_BLV))
    kl_BL = (teacher.exp() * (teacher - student)).sum(-1)
    mask_BL = batch.mask_BL[:, 1:]
    return kl_BL[mask_BL].sum() / mask_BL.sum() * temperature**2


def retain_term(model: PreTrainedModel, reference: Reference, batch: TokenBatch, kind: RetainLoss) -> Tensor:
    """What keeps the rest of the model: `nll`, or `kl` from the model as it was, []."""
    if kind == "none":
        return torch.zeros((), device=batch.ids_BL.device)
    logits_BLV = logits_of(model, batch)
    if kind == "nll":
        return mean_loss(logits_BLV, batch)
    with reference():
        before_BLV = logits_of(model, batch)
    return divergence(before_BLV, logits_BLV, batch)


OUT = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "w2", "wo")
"""What families call the matrix by which an MLP writes."""


@dataclass(frozen=True)
class Free:
    """Parameters that may change."""

    names: list[str]
    parameters: list[nn.Parameter]
    adapter: Any = None
    """PEFT's model around the given one, in which adapters now are."""
    settings: Training = field(default_factory=Training)


def freed(model: PreTrainedModel, settings: Training, *, layers: Sequence[int] | None = None, seed: int = 0) -> Free:
    """Freeze all of the model but what the settings name.

    Args:
        model: Whole; adapters are put into it in place.
        settings: Of the training.
        layers: Those of the method, where the settings name none; None means all.
        seed: Of adapters' first values.
    """
    chosen = settings.layers if settings.layers is not None else layers
    n_layers = len(decoder_layers(model))
    beyond = [layer for layer in chosen or () if not 0 <= layer < n_layers]
    if beyond:
        raise DsgError(f"The model has layers 0 to {n_layers - 1}; there is no layer {beyond[0]}.")
    model.requires_grad_(False)
    if settings.lora:
        return _adapted(model, settings, chosen, seed)
    names = [name for name, _ in model.named_parameters() if _is_chosen(model, name, settings.trained, chosen)]
    if not names:
        raise DsgError(f"No weight is left to train by `{settings.trained}` in layers {chosen}.")
    own = dict(model.named_parameters())
    for name in names:
        own[name].requires_grad_(True)
    return Free(names, [own[name] for name in names], settings=settings)


def _is_chosen(model: PreTrainedModel, name: str, trained: str, layers: Sequence[int] | None) -> bool:
    """Whether a parameter, or a module, of that name is meant."""
    prefix = next(path for path, module in model.named_modules() if module is decoder_layers(model))
    if not name.startswith(f"{prefix}."):
        return trained == "all" and layers is None
    number, _, inner = name.removeprefix(f"{prefix}.").partition(".")
    parts = inner.split(".")
    is_mlp = any(part in MLP for part in parts)
    is_out = is_mlp and any(part in OUT for part in parts) and not name.endswith(".bias")
    kind = {"all": True, "mlp": is_mlp, "mlp-out": is_out}[trained]
    return kind and (layers is None or int(number) in layers)


def _adapted(model: PreTrainedModel, settings: Training, layers: Sequence[int] | None, seed: int) -> Free:
    """Adapters on every linear layer that would be trained."""
    check_peft()
    import torch
    from peft import LoraConfig, get_peft_model

    within = [path for path, module in model.named_modules() if module is decoder_layers(model)]
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and name.startswith(f"{within[0]}.")
        and _is_chosen(model, name, settings.trained, layers)
    ]
    targets = [
        name
        for name in linear
        if not settings.lora_targets or any(f".{name}".endswith(f".{end}") for end in settings.lora_targets)
    ]
    if not targets:
        ends = sorted({name.rsplit(".", 1)[-1] for name in linear})
        wanted = ", ".join(settings.lora_targets)
        raise DsgError(
            f"No linear layer that would be trained has a name that ends with {wanted or 'anything'}.",
            f"{nearest(settings.lora_targets[0] if settings.lora_targets else '', ends)} They end with: "
            f"{', '.join(ends) or 'nothing'}.",
        )
    config = LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, lora_dropout=0.0, target_modules=targets)
    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped: Any = get_peft_model(model, config)
    found = [(name, one) for name, one in wrapped.named_parameters() if one.requires_grad]
    return Free([name for name, _ in found], [one for _, one in found], wrapped, settings)


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
        """Go back to the last weights that are known to be good, where training diverged."""
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
def counted(model: nn.Module, cost: Cost) -> Iterator[None]:
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
