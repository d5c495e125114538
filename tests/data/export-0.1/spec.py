"""What a guardrail is, as plain JSON values beside its tensors, and the digests that tell one from another.

Who only reads of one needs no torch for it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

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
    """The c of METHOD: every clamped feature is set to -c."""
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
    """Of a `probe` gate, see gates.py; 0 in guardrails of earlier versions."""
    clip: float = 0.0
    clamp: str = "all"
    """`all`: on a hot token every clamped feature is set; `each`: those of them that exceed their own `above`."""
    coefficients: list[float] = field(default_factory=list)
    """What each clamped feature is set to; empty where all are set to -strength."""
    above: list[float] = field(default_factory=list)
    """Of each feature, clamped or only watched, the activation above which it makes a token hot, or `NEVER`; empty
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


def digest_of(spec: GuardrailSpec, tensors: Mapping[str, Tensor]) -> str:
    """sha256 of everything that a guardrail is."""
    said = dataclasses.asdict(spec)
    # Without what is as it always was before it could be said, a guardrail keeps the digest that it had then.
    said = {name: value for name, value in said.items() if name not in CLAMP_DEFAULTS or value != CLAMP_DEFAULTS[name]}
    text = json.dumps(said, sort_keys=True, allow_nan=False)
    return hashlib.sha256(f"{text}\n{tensors_digest(tensors)}".encode()).hexdigest()
