"""Where an artifact came from: what every kind of them begins with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True)
class ModelIdentity:
    """Which model, and proof that it is that one."""

    source: str
    architecture: str
    n_layers: int
    width: int
    last_layer: int
    """The fingerprint covers layers 0..last_layer."""
    fingerprint: str


@dataclass(frozen=True)
class SaeIdentity:
    """Which sparse autoencoder, and where in the model it reads."""

    source: str
    architecture: str
    hook: str
    width: int
    n_features: int
    prepend_bos: bool
    config_sha256: str
    sha256: str
    """Digest of the weights file."""
    hook_out: str = ""
    """Where a transcoder's output belongs; empty for an SAE, which writes where it reads."""
    revision: str = ""
    """Commit of the repository that a release was read from; empty for others, whose source names it."""


@dataclass(frozen=True)
class InputArtifact:
    """An artifact that this one was computed from."""

    id: str
    sha256: str
    is_elsewhere: bool = False
    """It did not lie in the same workspace; what is called so there is another one."""


@dataclass(frozen=True)
class Header:
    """Provenance: what ran, on what, from what."""

    kind: str
    schema: int
    id: str
    created: str
    """UTC time, ISO 8601."""
    dsg_version: str
    git: Json
    """Commit and changes of the checkout that the package runs from; empty for an installed package."""
    packages: dict[str, str]
    device: str
    dtype: str
    seed: int
    settings: Json
    """Resolved settings of the stage."""
    model: ModelIdentity
    sae: SaeIdentity | None
    inputs: list[InputArtifact]
    files: dict[str, str] = field(default_factory=dict)
    """Side files and their sha256."""
    seconds: float = 0.0
    n_tokens: int = 0
    peak_memory_mb: float = 0.0
    notes: list[str] = field(default_factory=list)
    """What a person should know before trusting it."""
    trust_remote_code: bool = False
    """Python files that came with the model were run."""
