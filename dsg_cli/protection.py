"""Which parameters must stay as they are, so that fine-tuning cannot move what a guardrail reads."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from dsg_cli.model import final_norm
from dsg_cli.runtime.guardrail import GuardrailModule
from dsg_cli.runtime.sites import decoder_layers, find_module


def protected_parameters(
    model: nn.Module, guardrail: GuardrailModule | Sequence[GuardrailModule]
) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters to freeze before fine-tuning: all that the activation at the guardrail's hook depends on.

    With `parameter.requires_grad_(False)` on each, the gate's statistic of any text is bit for bit what it was. Those
    are the parameters of every layer up to the hook's (without that one if the hook is its input, whole if the hook
    lies inside it), and whatever is not known to come after the layers: embeddings and their norms. A head that is
    tied to the embeddings is frozen with them. Adapters must not be put on frozen modules either.

    Args:
        model: A causal language model of transformers.
        guardrail: One guardrail or several: of several, the highest hook counts.

    Raises:
        DsgError: The model has no such layer or module.
    """
    guards = [guardrail] if isinstance(guardrail, GuardrailModule) else list(guardrail)
    if not guards:
        return []
    model = getattr(model, "_orig_mod", model)
    for guard in guards:
        find_module(model, guard.read)
    n_frozen = max(guard.read.layer + (guard.read.point != "resid_pre") for guard in guards)
    get_head = getattr(model, "get_output_embeddings", lambda: None)
    after = [*decoder_layers(model)[n_frozen:], final_norm(model), get_head()]
    free = tuple(
        f"{name}."
        for name, module in model.named_modules(remove_duplicate=False)
        if any(module is one for one in after)
    )
    # By identity: a parameter that is used both below and above has several names, of which one may look free.
    frozen = {id(one) for name, one in model.named_parameters(remove_duplicate=False) if not name.startswith(free)}
    return [(name, one) for name, one in model.named_parameters() if id(one) in frozen]
