"""Guardrails from artifacts, and the context manager that puts them on a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsg_cli.data.batches import TokenBatch, batches
from dsg_cli.errors import DsgError
from dsg_cli.guardrail.runtime.gates import CAUSAL_FORMS
from dsg_cli.guardrail.runtime.guardrail import GuardrailModule, build_guardrail
from dsg_cli.guardrail.runtime.hooks import Attached
from dsg_cli.guardrail.runtime.sites import decoder_layers, decoder_of, find_module, fingerprint
from dsg_cli.guardrail.runtime.spec import GuardrailSpec
from dsg_cli.models.language_model import LoadedModel, final_norm, text_config
from dsg_cli.models.residuals import OomSplitter
from dsg_cli.workspace.artifacts import Guardrail, ModelIdentity


def module_from_artifact(
    body: Guardrail, model: ModelIdentity, tensors: Mapping[str, Tensor], *, where: str
) -> GuardrailModule:
    """The guardrail of an artifact as a module."""
    same = ("gate", "threshold", "window", "strength", "slice", "special_ids", "bias", "clip", "clamp", "coefficients")
    spec = GuardrailSpec(
        **{name: getattr(body, name) for name in (*same, "above")},
        read=body.hook,
        write=body.hook_out,
        model=model.model_dump(exclude={"source"}),
    )
    return build_guardrail(spec, tensors, where=where)


@contextmanager
def guarded(
    model: nn.Module, guardrails: GuardrailModule | Sequence[GuardrailModule], *, allow_mismatch: bool = False
) -> Iterator[nn.Module]:
    """While the block runs, the model answers under one guardrail or under several, each with a gate of its own.

    Hooks are gone after the block, also after an exception. The model may be compiled or not: one that was
    compiled before is compiled again. With no guardrail it is as it is. `allow_mismatch` takes another model than the
    one that a guardrail was made for, such as a fine-tuned copy.
    """
    guards = [guardrails] if isinstance(guardrails, GuardrailModule) else list(guardrails)
    if not guards:
        yield model
        return
    inner = getattr(model, "_orig_mod", model)
    if not allow_mismatch:
        for guard in guards:
            check_model(inner, guard)
    n_broken = [int(guard.n_broken) for guard in guards]
    attached = Attached(inner, guards)
    try:
        yield model
    finally:
        attached.remove()
    for guard, before in zip(guards, n_broken, strict=True):
        if (n := int(guard.n_broken) - before) > 0:
            raise DsgError(
                f"The residual of {n} tokens at {guard.read.name} was not finite; they were treated as gated.",
                "Check the model's weights, or run it in float32.",
            )


def last_decisions(guards: Sequence[GuardrailModule]) -> list[tuple[float, bool, float]]:
    """Statistic of the guardrail nearest to firing, whether any fired, and the largest change of a token's residual
    relative to its norm: one triple for each row of the last call."""
    statistic_GB = torch.stack([guard.last_statistic_B.cpu() for guard in guards])
    threshold_G = torch.tensor([guard.gate.threshold for guard in guards])
    nearest_B = (statistic_GB - threshold_G[:, None]).argmax(0)
    gated_B = torch.stack([guard.last_gated_B.cpu() for guard in guards]).any(0)
    edit_B = torch.stack([guard.last_edit_B.cpu() for guard in guards if guard.last_edit_B is not None]).amax(0)
    statistic_B = statistic_GB.gather(0, nearest_B[None])[0]
    return list(zip(statistic_B.tolist(), gated_B.tolist(), edit_B.tolist(), strict=True))


def check_causal(forms: Iterable[str]) -> None:
    """Refuse gates that cannot decide while text is written."""
    for form in forms:
        if form not in CAUSAL_FORMS:
            raise DsgError(
                f"The gate `{form}` needs whole sequences; it cannot guard text while it is written.",
                "Name another guardrail with --from, or calibrate with another --gate and apply.",
            )


def check_model(model: nn.Module, guard: GuardrailModule) -> None:
    """Refuse a model that is not the one the guardrail was made for."""
    expected = guard.spec.model
    config = text_config(model.config)
    is_architecture = expected["architecture"] in {cls.__name__ for cls in type(model).__mro__}
    actual = {
        "architecture": expected["architecture"] if is_architecture else type(model).__name__,
        "width": int(config.hidden_size),
        "n_layers": len(decoder_layers(model)),
    }
    hint = "Use the model it was made for; allow_mismatch=True (--allow-mismatch) puts it on this one all the same."
    for key, value in actual.items():
        if value != expected[key]:
            made_for = f"a model with {key} {expected[key]}"
            raise DsgError(f"The guardrail was made for {made_for}; this one has {value}.", hint)
    if fingerprint(model, expected["last_layer"]) != expected["fingerprint"]:
        raise DsgError("The guardrail was made for a model with other weights.", hint)


def protected_parameters(
    model: nn.Module, guardrail: GuardrailModule | Sequence[GuardrailModule]
) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters to freeze before fine-tuning: all that the activation at the guardrail's hook depends on.

    With `parameter.requires_grad_(False)` on each, the gate's statistic of any text is bit for bit what it was. Those
    are the parameters of every layer up to the hook's (without that one if the hook is its input, whole if the hook
    lies inside it), and whatever is not known to come after the layers: embeddings and their norms. A head that is
    tied to the embeddings is frozen with them. Adapters must not be put on frozen modules either.

    Of several guardrails the highest hook counts.
    """
    guards = [guardrail] if isinstance(guardrail, GuardrailModule) else list(guardrail)
    if not guards:
        return []
    model = getattr(model, "_orig_mod", model)
    for guard in guards:
        find_module(model, guard.read)
    n_frozen = max(guard.read.layer + (guard.read.point != "resid_pre") for guard in guards)
    get_head = getattr(model, "get_output_embeddings", lambda: None)
    after = {id(module) for module in (*decoder_layers(model)[n_frozen:], final_norm(model), get_head())}
    free = tuple(f"{name}." for name, module in model.named_modules(remove_duplicate=False) if id(module) in after)
    # By identity: a parameter that is used both below and above has several names, of which one may look free.
    frozen = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if not name.startswith(free)}
    return [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in frozen]


@dataclass(frozen=True)
class Effect:
    """What a guardrail did to some rows."""

    n_rows: int
    gate_rate: float
    """Share of rows that were gated."""
    changed_rate: float
    """Share of rows whose activations after the last guarded layer differ from the unguarded model's in any bit."""
    n_clamped: int
    """Tokens that were clamped."""
    edit: float
    """Largest change of a token's residual, relative to its norm."""


@torch.inference_mode()
def measure_effect(loaded: LoadedModel, guard: GuardrailModule, rows: Sequence[list[int]]) -> Effect:
    """Run at least one row of token ids with and without the guardrail, on its model, whole or cut after its layer."""
    decoder = decoder_of(loaded.model)
    n_gated = n_changed = 0
    before = guard.counters()["n_clamped"]

    def run(batch: TokenBatch) -> Tensor:
        options = {"input_ids": batch.ids_BL, "attention_mask": batch.mask_BL.long(), "use_cache": False}
        return decoder(**options).last_hidden_state.to(batch.ids_BL.device)

    def both(batch: TokenBatch) -> tuple[Tensor, Tensor]:
        plain_BLD = run(batch)
        # That it is the right model has been checked when it was loaded; here it may be cut.
        with guarded(loaded.model, guard, allow_mismatch=True):
            guarded_BLD = run(batch)
        differs_BL = (plain_BLD != guarded_BLD).any(-1) & batch.mask_BL
        return guard.last_gated_B.clone(), differs_BL.any(-1)

    split_on_oom = OomSplitter()
    for whole in batches(rows, loaded.tokenizer, device=str(loaded.model.device)):
        for _, (gated_B, changed_B) in split_on_oom(whole, both):
            n_gated += int(gated_B.sum())
            n_changed += int(changed_B.sum())
    counters = guard.counters()
    return Effect(
        n_rows=len(rows),
        gate_rate=n_gated / len(rows),
        changed_rate=n_changed / len(rows),
        n_clamped=int(counters["n_clamped"] - before),
        edit=counters["largest_edit"],
    )
