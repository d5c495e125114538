"""What a guardrail is, as plain JSON values beside its tensors, and the digests that tell one from another.

Importable without torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor


CalibratedGate = Literal["mean", "causal-mean", "window", "cusum", "probe"]
Gate = Literal[CalibratedGate, "token"]
"""Gate forms, see gates.py; `token`, which is none, has no threshold to be calibrated."""

NEVER = 3.4028234663852886e38
"""An activation that no finite one exceeds: the largest number of float32, for JSON has no infinity."""

CLAMP_DEFAULTS: dict[str, Any] = {"clamp": "all", "coefficients": [], "above": []}
"""Fields of a spec that say how features are clamped, as they are where a guardrail knows of one way only."""


@dataclass(frozen=True)
class GuardrailSpec:
    """All of a guardrail but its tensors, as plain JSON values."""

    gate: str
    threshold: float
    window: int
    strength: float
    """c: every clamped feature is set to -c."""
    read: str
    """Name of the site that the features are computed from."""
    write: str
    """Name of the site that is changed; `read`, unless the SAE is a transcoder."""
    slice: dict[str, Any]
    """A `SliceSpec`."""
    special_ids: list[int]
    """Tokens that are never counted nor changed: BOS, EOS and pad."""
    model: dict[str, Any]
    """Architecture, layers, width and fingerprint of the model that it was made for."""
    bias: float = 0.0
    """b of a `probe` gate, see gates.py; 0 in guardrails of earlier versions."""
    clip: float = 0.0
    clamp: str = "all"
    """`all`: on an active token every clamped feature is set; `each`: those of them that exceed their own `above`."""
    coefficients: list[float] = field(default_factory=list)
    """What each clamped feature is set to; empty where all are set to -strength."""
    above: list[float] = field(default_factory=list)
    """Activation above which each feature, clamped or only watched, makes a token active, or `NEVER`; empty
    where every clamped feature does as soon as it is active, and no other."""


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of tensors: names, types, shapes and values."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def guardrail_digest(spec: GuardrailSpec, tensors: Mapping[str, Tensor]) -> str:
    """sha256 of everything that a guardrail is."""
    fields = dataclasses.asdict(spec)
    # Without fields that are as they were before they existed, a guardrail keeps the digest that it had then.
    fields = {k: value for k, value in fields.items() if k not in CLAMP_DEFAULTS or value != CLAMP_DEFAULTS[k]}
    text = json.dumps(fields, sort_keys=True, allow_nan=False)
    return hashlib.sha256(f"{text}\n{tensors_digest(tensors)}".encode()).hexdigest()


KEY, KEPT = "vocab_size", "dsg_vocab_size"
SEAL = "guarded: load this model with an auto class and trust_remote_code"


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """The content of a configuration file, made useless to the base's classes."""
    return values if values.get(KEY) == SEAL else {**values, KEY: SEAL, KEPT: values[KEY]}


def unsealed(values: dict[str, Any]) -> dict[str, Any]:
    """What a configuration is made of."""
    if values.get(KEY) != SEAL:
        return values
    return {key: value for key, value in values.items() if key != KEPT} | {KEY: values[KEPT]}


class SealedConfig:
    """To stand before a configuration of transformers among the bases of a class."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """As transformers does it, from what the seal hides."""
        return super().from_dict(unsealed(config_dict), **options)  # type: ignore[misc]

    def to_json_file(self, json_file_path: Any, *arguments: Any, **options: Any) -> None:
        """As transformers does it; then sealed."""
        super().to_json_file(json_file_path, *arguments, **options)  # type: ignore[misc]
        path = Path(json_file_path)
        values = {KEY: getattr(self, KEY)} | json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(sealed(values), indent=2, sort_keys=True) + "\n", encoding="utf-8")
