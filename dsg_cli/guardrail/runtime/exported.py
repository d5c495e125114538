"""A causal language model of transformers that carries its guardrails in its own weights and configuration.

`dsg export` writes a class that has `GuardrailMixin` in front of the model's own class. Such a model fails closed:
until its guardrails are loaded and are the ones that its configuration names, it answers nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .errors import DsgError
from .guardrail import GuardrailModule, build_guardrail
from .hooks import Attached
from .sites import decoder_of, fingerprint
from .spec import GuardrailSpec

Json = dict[str, Any]
PREFIX = "dsg_guardrails"
"""Name of the guardrails among the model's modules, and of their description in its configuration."""


def describe(guard: GuardrailModule) -> Json:
    """What a configuration says of a guardrail: all but the values of its tensors."""
    return {
        "spec": dataclasses.asdict(guard.spec),
        "shapes": {name: list(tensor.shape) for name, tensor in guard.tensors().items()},
        "sha256": guard.key,
    }


def empty_guardrail(described: Json) -> GuardrailModule:
    """A guardrail that is still to be filled."""
    tensors = {
        name: torch.zeros(shape, dtype=torch.long if name == "index" else torch.float32)
        for name, shape in described["shapes"].items()
    }
    return GuardrailModule(GuardrailSpec(**described["spec"]), tensors)


AGAIN = "Export the model again, or download it again."
ALLOW_MISMATCH = "dsg_allow_mismatch"  # Key of the configuration: also on other base weights, such as fine-tuned ones.


class GuardrailMixin(nn.Module):
    """To stand before a `...ForCausalLM` of transformers among the bases of a class.

    `model.dsg_guardrails[i].counters()` says how many sequences were seen and gated.
    """

    config: Any
    config_class: Any
    dtype: torch.dtype
    _keep_in_fp32_modules_strict: Any

    def __init__(self, config: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        self.dsg_guardrails = nn.ModuleList([empty_guardrail(described) for described in getattr(config, PREFIX)])
        # Stays in float32 when the model is loaded in another dtype.
        self._keep_in_fp32_modules_strict = {*(self._keep_in_fp32_modules_strict or ()), PREFIX}
        self.dsg_attached: Attached | None = None
        self.dsg_lock = decoder_of(self).register_forward_pre_hook(_refuse)

    def __init_subclass__(cls, **options: Any) -> None:
        """Weights are renamed and merged on loading by class and model type: this class needs its base's rules."""
        super().__init_subclass__(**options)
        base: Any = next(c for c in cls.__mro__ if c is not cls and issubclass(c, PreTrainedModel))
        rules = {cls.__name__: base.__name__, cls.config_class.model_type: base.config_class.model_type}
        for own, of_base in rules.items():
            if (conversions := get_checkpoint_conversion_mapping(of_base)) is not None:
                register_checkpoint_conversion_mapping(own, conversions, overwrite=True)

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """As transformers does it; then the guardrails are checked and put on."""
        wants_info = options.pop("output_loading_info", False)
        model, info = super().from_pretrained(*arguments, output_loading_info=True, **options)  # type: ignore[misc]
        orphans = [name for name in info["unexpected_keys"] if name.startswith(f"{PREFIX}.")]
        if orphans or not len(model.dsg_guardrails):
            raise DsgError(
                f"The configuration names other guardrails than the weights hold ({len(orphans)} tensors left over).",
                AGAIN,
            )
        if missing := info["missing_keys"]:
            raise DsgError(f"The weights lack {len(missing)} tensors, among them {min(missing)}.", AGAIN)
        model.arm_guardrails()
        return (model, info) if wants_info else model

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: transformers must fill the buffers of the base's own modules as it does for the base."""
        return False

    def arm_guardrails(self) -> None:
        """Put the guardrails on, once their tensors are loaded."""
        guards: list[GuardrailModule] = []
        for number, described in enumerate(getattr(self.config, PREFIX)):
            held: Any = self.dsg_guardrails[number]
            tensors: dict[str, Tensor] = held.tensors()
            guard = build_guardrail(GuardrailSpec(**described["spec"]), tensors, where=f"{PREFIX}.{number}")
            if guard.key != described["sha256"]:
                raise DsgError(f"The weights of {PREFIX}.{number} were altered: their digest does not match.", AGAIN)
            guards.append(guard)
        self._check_base(guards)
        attached, before = Attached(self, guards), self.dsg_attached
        self.dsg_guardrails, self.dsg_attached = nn.ModuleList(guards), attached
        if before is not None:
            before.remove()
        self.dsg_lock.remove()

    def _check_base(self, guards: list[GuardrailModule]) -> None:
        """Refuse other base weights than the guardrails were made for, where their values can be compared."""
        if getattr(self.config, ALLOW_MISMATCH, False) or getattr(self, "is_quantized", False):
            return
        if self.dtype not in (torch.float32, torch.bfloat16):
            return
        for guard in guards:
            base = guard.spec.model
            if base and fingerprint(self, base["last_layer"]) != base["fingerprint"]:
                raise DsgError(
                    "The weights of the base model are others than the guardrails were made for.",
                    f"Export the model again; or, if that is wanted, load it with {ALLOW_MISMATCH}=True.",
                )


def _refuse(*_arguments: Any) -> None:
    raise DsgError(
        "The guardrails of this model are not loaded, so it does not answer.",
        "Load it with from_pretrained, or call arm_guardrails() once its weights are there.",
    )
