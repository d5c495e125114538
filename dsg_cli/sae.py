"""Load an SAE, prove that it fits the model, and slice the selected features out of it.

sae-lens is imported only to run a whole encoder (`select`); everything after works on K columns of `W_enc` and
K rows of `W_dec`, which reproduce the whole SAE's activations of those features exactly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dsg_cli.artifacts import SaeIdentity
from dsg_cli.errors import DsgError, nearest
from dsg_cli.lab import data as lab
from dsg_cli.model import HookSite, parse_hook_site

WEIGHTS_FILE = "sae_weights.safetensors"
CONFIG_FILE = "cfg.json"
SUPPORTED_SETTINGS = {
    "normalize_activations": ("none", None),
    "reshape_activations": ("none", None),
    # Older configurations name their activation; a `standard` SAE may then be a top-k one.
    "activation_fn": ("relu", None),
    "activation_fn_str": ("relu", None),
}
WEIGHTS = {
    "standard": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "jumprelu": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
}


@dataclass(frozen=True)
class SaeSource:
    """An SAE folder whose configuration has been read and checked; no weights yet."""

    folder: Path
    config: dict[str, Any]
    identity: SaeIdentity
    site: HookSite


class SaeSlice(nn.Module):
    """K features of an SAE as float32 buffers.

    `W_enc` [D, K]; `b_enc` [K], with the decoder bias that the encoder subtracts from its input folded in;
    `active_above` [K], the pre-activation that a feature must exceed to be active (0 for a ReLU); `W_dec` [K, D].
    """

    W_enc: Tensor
    b_enc: Tensor
    active_above: Tensor
    W_dec: Tensor

    def __init__(self, W_enc: Tensor, b_enc: Tensor, active_above: Tensor, W_dec: Tensor) -> None:
        super().__init__()
        self.register_buffer("W_enc", W_enc.float().contiguous())
        self.register_buffer("b_enc", b_enc.float())
        self.register_buffer("active_above", active_above.float())
        self.register_buffer("W_dec", W_dec.float().contiguous())

    def forward(self, resid: Tensor) -> Tensor:
        """Activations [..., K] of a residual [..., D], in float32."""
        pre = resid.float() @ self.W_enc + self.b_enc
        return torch.where(pre > self.active_above, pre, torch.zeros_like(pre))


def read_sae(source: str) -> SaeSource:
    """Read and check an SAE's configuration and the shape of its weights.

    Args:
        source: `lab`, `lab-1`, `lab-2`, or a folder in sae-lens's format.

    Raises:
        DsgError: No such folder; a file missing; an architecture or setting that cannot be sliced exactly; no hook.
    """
    folder = lab.SAE_DIRS.get(source, Path(source))
    if not folder.is_dir():
        hint = f"{nearest(source, lab.SAE_DIRS)} Or give a folder with {CONFIG_FILE} and {WEIGHTS_FILE}."
        raise DsgError(f"No SAE folder at {source}.", hint)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise DsgError(f"{source} is not an SAE in sae-lens's format: it has no {name}.")
    config, metadata = _read_config(folder / CONFIG_FILE)
    site = parse_hook_site(metadata.get("hook_name") or config.get("hook_name"), where=str(folder / CONFIG_FILE))
    _check_sliceable(config, source)
    width, n_features = config.get("d_in"), config.get("d_sae")
    if not isinstance(width, int) or not isinstance(n_features, int):
        raise DsgError(
            f"{folder / CONFIG_FILE}: d_in and d_sae must be whole numbers, not {width!r} and {n_features!r}."
        )
    _check_weights(folder / WEIGHTS_FILE, config["architecture"], width, n_features)
    identity = SaeIdentity(
        source=source,
        architecture=config["architecture"],
        hook=site.name,
        width=width,
        n_features=n_features,
        prepend_bos=bool(metadata.get("prepend_bos", config.get("prepend_bos", True))),
        config_sha256=_digest(folder / CONFIG_FILE),
        sha256=_digest(folder / WEIGHTS_FILE),
    )
    return SaeSource(folder=folder, config=config, identity=identity, site=site)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration and its metadata."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DsgError(f"{path} is not valid JSON: {error}.") from error
    metadata = (config.get("metadata") or {}) if isinstance(config, dict) else None
    if not isinstance(metadata, dict):
        raise DsgError(f"{path} is not the configuration of an SAE: it, and its metadata, must be JSON objects.")
    return config, metadata


def _check_weights(path: Path, architecture: str, width: int, n_features: int) -> None:
    """The tensors that a slice needs are there, in their shapes; nothing is loaded."""
    shapes = {"W_enc": [width, n_features], "W_dec": [n_features, width], "b_dec": [width]}
    try:
        with safe_open(path, framework="pt") as file:
            there = set(file.keys())
            missing = [name for name in WEIGHTS[architecture] if name not in there]
            if missing:
                raise DsgError(f"{path} has no tensor {missing[0]}, which an SAE of architecture {architecture} needs.")
            for name in WEIGHTS[architecture]:
                expected = shapes.get(name, [n_features])
                shape = list(file.get_slice(name).get_shape())
                if shape != expected:
                    raise DsgError(f"{path}: {name} has shape {shape}; by {CONFIG_FILE} it should be {expected}.")
    except SafetensorError as error:
        raise DsgError(f"{path} cannot be read: {error}.") from error


def _check_sliceable(config: dict[str, Any], source: str) -> None:
    architecture = config.get("architecture")
    if not isinstance(architecture, str) or architecture not in WEIGHTS:
        raise DsgError(
            f"The SAE {source} has the architecture {architecture!r}, which this version cannot slice exactly.",
            f"Supported: {', '.join(WEIGHTS)} (BatchTopK and Matryoshka SAEs are saved as jumprelu).",
        )
    for key, supported in SUPPORTED_SETTINGS.items():
        if config.get(key) not in supported:
            raise DsgError(f"The SAE {source} has {key}={config[key]!r}, which this version cannot slice exactly.")


def check_fits(sae: SaeSource, model_config: Any, model_source: str) -> None:
    """Prove from the configurations alone that the SAE belongs to this model.

    Raises:
        DsgError: Another width, or a layer that the model does not have.
    """
    width, n_layers = int(model_config.hidden_size), int(model_config.num_hidden_layers)
    if sae.identity.width != width:
        raise DsgError(
            f"The SAE {sae.identity.source} reads residuals of width {sae.identity.width}, "
            f"but the model {model_source} has width {width}.",
            "Choose an SAE that was trained on this model.",
        )
    if sae.site.layer >= n_layers:
        raise DsgError(
            f"The SAE {sae.identity.source} sits at layer {sae.site.layer} (counted from 0), "
            f"but the model {model_source} has {n_layers} layers."
        )


def load_encoder(sae: SaeSource, *, device: str) -> Callable[[Tensor], Tensor]:
    """The whole SAE's encoder, through sae-lens: residuals [T, D] -> activations [T, F] in float32."""
    from sae_lens import SAE

    whole = SAE.load_from_disk(sae.folder, device=device, dtype="float32")
    whole.requires_grad_(False)

    def encode(resid_TD: Tensor) -> Tensor:
        acts_TF: Tensor = whole.encode(resid_TD.float())
        return acts_TF

    return encode


def slice_sae(sae: SaeSource, indices: Sequence[int]) -> SaeSlice:
    """Columns and rows of the chosen features.

    Raises:
        DsgError: An index that the SAE does not have, or a weight that is not finite.
    """
    beyond = [index for index in indices if not 0 <= index < sae.identity.n_features]
    if beyond:
        raise DsgError(
            f"The SAE {sae.identity.source} has {sae.identity.n_features} features; there is no {beyond[0]}."
        )
    index_K = torch.tensor(list(indices), dtype=torch.long)
    with safe_open(sae.folder / WEIGHTS_FILE, framework="pt") as file:
        W_enc = file.get_tensor("W_enc")[:, index_K].double()
        b_enc = file.get_tensor("b_enc")[index_K].double()
        W_dec = file.get_tensor("W_dec")[index_K]
        if sae.config.get("apply_b_dec_to_input", True):
            b_enc = b_enc - file.get_tensor("b_dec").double() @ W_enc
        is_jumprelu = sae.config["architecture"] == "jumprelu"
        threshold = file.get_tensor("threshold")[index_K] if is_jumprelu else torch.zeros(len(index_K))
    for name, tensor in (("W_enc", W_enc), ("b_enc", b_enc), ("W_dec", W_dec), ("threshold", threshold)):
        if not torch.isfinite(tensor).all():
            raise DsgError(f"The SAE {sae.identity.source} holds a value in {name} that is not finite.")
    # A ReLU follows the threshold: below zero nothing is active.
    return SaeSlice(W_enc, b_enc, threshold.clamp(min=0.0), W_dec)
