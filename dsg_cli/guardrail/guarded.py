"""Guardrails from artifacts, and the context manager that puts them on a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dsg_cli.artifacts import Guardrail, ModelIdentity
from dsg_cli.errors import DsgError
from dsg_cli.model import fingerprint, text_config
from dsg_cli.runtime.attach import Attached
from dsg_cli.runtime.gates import CAUSAL_FORMS
from dsg_cli.runtime.guardrail import GuardrailModule, build_guardrail
from dsg_cli.runtime.sites import decoder_layers
from dsg_cli.runtime.spec import GuardrailSpec

__all__ = ["GuardrailModule", "guarded", "last_decisions", "module_from_artifact", "spec_of"]


def spec_of(body: Guardrail, model: ModelIdentity) -> GuardrailSpec:
    """What the runtime needs of an artifact."""
    return GuardrailSpec(
        gate=body.gate,
        threshold=body.threshold,
        window=body.window,
        strength=body.strength,
        read=body.hook,
        write=body.hook_out,
        slice=body.slice,
        special_ids=body.special_ids,
        bias=body.bias,
        clip=body.clip,
        clamp=body.clamp,
        coefficients=body.coefficients,
        above=body.above,
        model={key: value for key, value in dataclasses.asdict(model).items() if key != "source"},
    )


def module_from_artifact(
    body: Guardrail, model: ModelIdentity, tensors: Mapping[str, Tensor], *, where: str
) -> GuardrailModule:
    """The guardrail of an artifact as a module.

    Raises:
        DsgError: A tensor is missing or not finite.
    """
    return build_guardrail(spec_of(body, model), tensors, where=where)


@contextmanager
def guarded(
    model: nn.Module, guardrails: GuardrailModule | Sequence[GuardrailModule], *, allow_mismatch: bool = False
) -> Iterator[nn.Module]:
    """While the block runs, the model answers under one guardrail or under several, each with a gate of its own.

    Hooks are gone after the block, also after an exception; a model compiled before it is compiled again.

    Args:
        model: A causal language model of transformers, compiled or not.
        guardrails: From `load_guardrail`; with none, the model is as it is.
        allow_mismatch: Also on another model than the one that a guardrail was made for, such as a fine-tuned copy.

    Raises:
        DsgError: Before the block, if the model is another one. Inside it, on a call whose sequences cannot be told
            apart or were begun without the guardrail. After it, if a residual was a NaN or an infinity: the sequence
            was treated as gated.
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
    """Of each row of the last call: the statistic of the guardrail nearest to firing, whether any fired, and the
    largest change of a token's residual, relative to its norm."""
    statistic_GB = torch.stack([guard.last_statistic_B.cpu() for guard in guards])
    threshold_G = torch.tensor([guard.gate.threshold for guard in guards])
    nearest_B = (statistic_GB - threshold_G[:, None]).argmax(0)
    gated_B = torch.stack([guard.last_gated_B.cpu() for guard in guards]).any(0)
    edit_B = torch.stack([guard.last_edit_B.cpu() for guard in guards if guard.last_edit_B is not None]).amax(0)
    statistic_B = statistic_GB.gather(0, nearest_B[None])[0]
    return list(zip(statistic_B.tolist(), gated_B.tolist(), edit_B.tolist(), strict=True))


def check_causal(forms: Iterable[str]) -> None:
    """Refuse gates that cannot decide while text is written.

    Raises:
        DsgError: One of them is such a gate.
    """
    for form in forms:
        if form not in CAUSAL_FORMS:
            raise DsgError(
                f"The gate `{form}` needs whole sequences; it cannot guard text while it is written.",
                "Name another guardrail with --from, or calibrate with another --gate and apply.",
            )


def check_model(model: nn.Module, guard: GuardrailModule) -> None:
    """Refuse a model that is not the one the guardrail was made for.

    Raises:
        DsgError: Its architecture, width, layers or weights are others.
    """
    wanted = guard.spec.model
    config = text_config(model.config)
    names = {cls.__name__ for cls in type(model).__mro__}
    found = {
        "architecture": wanted["architecture"] if wanted["architecture"] in names else type(model).__name__,
        "width": int(config.hidden_size),
        "n_layers": len(decoder_layers(model)),
    }
    hint = "Use the model it was made for; allow_mismatch=True (--allow-mismatch) puts it on this one all the same."
    for key, value in found.items():
        if value != wanted[key]:
            raise DsgError(f"The guardrail was made for a model with {key} {wanted[key]}; this one has {value}.", hint)
    if fingerprint(model, wanted["last_layer"]) != wanted["fingerprint"]:
        raise DsgError("The guardrail was made for a model with other weights.", hint)
