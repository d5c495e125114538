"""Read an SAE, prove that it fits the model, and run its whole encoder.

sae-lens is imported only to run a whole encoder (`select`); everything after works on a slice (slicing.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsg_cli.artifacts import SaeIdentity
from dsg_cli.errors import DsgError, close_to
from dsg_cli.integrity import file_digest, is_folder, parse_json
from dsg_cli.lab import data as lab
from dsg_cli.releases import CONFIG_FILE, WEIGHTS_FILE, SaeFolder, find_sae, locate_release, releases
from dsg_cli.runtime.sites import HookSite, parse_hook_site

NORMALIZATIONS = ("none", "layer_norm", "constant_norm_rescale")
_STANDARD = ("W_enc", "b_enc", "W_dec", "b_dec")
WEIGHTS = {
    "standard": _STANDARD,
    "jumprelu": (*_STANDARD, "threshold"),
    "gated": ("W_enc", "b_gate", "r_mag", "b_mag", "W_dec", "b_dec"),
    "topk": _STANDARD,
    "abstopk": _STANDARD,
    "transcoder": _STANDARD,
    "skip_transcoder": _STANDARD,
    "jumprelu_transcoder": (*_STANDARD, "threshold"),
    "jumprelu_skip_transcoder": (*_STANDARD, "threshold"),
}
"""Architectures that can be sliced exactly, and the tensors that a slice needs."""
_CHECKPOINT = "it is a training checkpoint; save it with save_inference_model, which makes it a jumprelu SAE"
REFUSED = {
    "temporal": "a feature of a token depends on all earlier tokens, through attention inside the SAE",
    "matching_pursuit": "features are chosen one after another, each from what the ones before left over",
    "batchtopk": _CHECKPOINT,
    "matryoshka_batchtopk": _CHECKPOINT,
    "expected_average_only_in": "its scaling factor is in no file; fold it in with fold_activation_norm_scaling_factor",
    "covariance_whitening": "its whitening matrix is in no file; fold it in with fold_activation_whitening",
}
"""Architectures and normalisations that cannot be sliced, and why."""


@dataclass(frozen=True)
class SaeSource:
    """An SAE folder whose configuration has been read and checked; no weights yet."""

    folder: Path
    config: dict[str, Any]
    identity: SaeIdentity
    site: HookSite
    """Where it reads."""
    write: HookSite
    """Where its output belongs: `site`, unless it is a transcoder."""

    @property
    def is_transcoder(self) -> bool:
        return "transcoder" in self.identity.architecture

    @property
    def metadata(self) -> dict[str, Any]:
        """What the configuration says of the model and the training."""
        return self.config | (self.config.get("metadata") or {})

    @property
    def is_centred(self) -> bool:
        """Trained on activations minus their mean over the width, as TransformerLens's `center_writing_weights` makes.

        A Hugging Face model has them with the mean, which no layer norm sees.
        """
        return _is_centred(self.config)


def _is_centred(config: dict[str, Any]) -> bool:
    settings = config | (config.get("metadata") or {})
    loaded_with = settings.get("model_from_pretrained_kwargs")
    return isinstance(loaded_with, dict) and bool(loaded_with.get("center_writing_weights"))


def read_sae(source: str) -> SaeSource:
    """Read and check an SAE's configuration and the shape of its weights.

    Args:
        source: `lab`, `lab-1`, `lab-2`; a folder in sae-lens's format; a release of sae-lens with an id; or such a
            folder on the hub (`org/name[@revision][/folder]`).

    Raises:
        DsgError: No such SAE, no access or no network; a file missing; an architecture or setting that
            cannot be sliced exactly; no hook.
    """
    found = _locate(source)
    folder = found.folder
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise DsgError(f"{source} is not an SAE in sae-lens's format: it has no {name}.")
    config, metadata = _read_config(folder / CONFIG_FILE)
    _check_numbers(config, str(folder / CONFIG_FILE))
    _check_sliceable(config, source)
    site = _site({**config, **metadata}, "", where=str(folder / CONFIG_FILE))
    is_transcoder = "transcoder" in config["architecture"]
    write = _site({**config, **metadata}, "_out", where=str(folder / CONFIG_FILE)) if is_transcoder else site
    width, n_features = config["d_in"], config["d_sae"]
    _check_weights(folder / WEIGHTS_FILE, config["architecture"], width, n_features, config.get("d_out", width))
    identity = SaeIdentity(
        source=found.source,
        revision=found.revision,
        architecture=config["architecture"],
        hook=site.name,
        width=width,
        n_features=n_features,
        prepend_bos=bool(metadata.get("prepend_bos", config.get("prepend_bos", True))),
        config_sha256=file_digest(folder / CONFIG_FILE),
        sha256=file_digest(folder / WEIGHTS_FILE),
        hook_out=write.name if write != site else "",
    )
    return SaeSource(folder=folder, config=config, identity=identity, site=site, write=write)


def check_name(source: str) -> None:
    """Refuse an SAE whose name leads nowhere; nothing is fetched.

    Raises:
        DsgError: It is neither of the lab, nor a folder, nor a release with an id, nor of the form of a repository.
    """
    if source in lab.SAE_DIRS or is_folder(Path(source)):
        return
    if Path(source).is_absolute() or ("/" not in source and source not in releases()):
        close = close_to(source, [*lab.SAE_DIRS, *releases()])
        alike = f"Did you mean {' or '.join(close)}? " if close else ""
        raise DsgError(
            f"There is no SAE {source[:200]}.",
            f"{alike}Give RELEASE/ID (`dsg ls saes`), or a folder with {CONFIG_FILE} and {WEIGHTS_FILE}.",
        )
    locate_release(source)


def _locate(source: str) -> SaeFolder:
    check_name(source)
    if source in lab.SAE_DIRS:
        return SaeFolder(lab.SAE_DIRS[source], source)
    if is_folder(Path(source)):
        return SaeFolder(Path(source), str(Path(source).resolve()))
    return find_sae(source)


def _site(settings: dict[str, Any], suffix: str, *, where: str) -> HookSite:
    """The hook of a configuration, in the TransformerLens spelling or else in that of Hugging Face modules."""
    names = [settings.get(f"hook_name{suffix}"), settings.get(f"hf_hook_name{suffix}")]
    if isinstance(names[0], str) and isinstance(names[1], str):
        try:
            return parse_hook_site(names[0], where=where)
        except DsgError:
            return parse_hook_site(names[1], where=where)
    return parse_hook_site(names[0] if names[0] is not None else names[1], where=where)


def _read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration and its metadata."""
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DsgError(f"{path} is not valid JSON: {error}.") from error
    metadata = (config.get("metadata") or {}) if isinstance(config, dict) else None
    if not isinstance(metadata, dict):
        raise DsgError(f"{path} is not the configuration of an SAE: it, and its metadata, must be JSON objects.")
    return config, metadata


def _check_numbers(config: dict[str, Any], where: str) -> None:
    width, n_features = config.get("d_in"), config.get("d_sae")
    if type(width) is not int or type(n_features) is not int:
        raise DsgError(f"{where}: d_in and d_sae must be whole numbers, not {width!r} and {n_features!r}.")


def _check_weights(path: Path, architecture: str, width: int, n_features: int, width_out: int) -> None:
    """The tensors that a slice needs are there, in their shapes; nothing is loaded."""
    shapes = {"W_enc": [width, n_features], "W_dec": [n_features, width_out], "b_dec": [width_out]}
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
    except (SafetensorError, OSError) as error:
        raise DsgError(f"{path} cannot be read: {error}.") from error


def _check_sliceable(config: dict[str, Any], source: str) -> None:
    architecture, normalization = config.get("architecture"), config.get("normalize_activations") or "none"
    for found in (architecture, normalization):
        if isinstance(found, str) and found in REFUSED:
            raise DsgError(f"The SAE {source} is {found} and cannot be sliced: {REFUSED[found]}.")
    if not isinstance(architecture, str) or architecture not in WEIGHTS:
        raise DsgError(
            f"The SAE {source} has the architecture {architecture!r}, which this version cannot slice exactly.",
            f"Supported: {', '.join(WEIGHTS)} (BatchTopK and Matryoshka SAEs are saved as jumprelu).",
        )
    if normalization not in NORMALIZATIONS:
        raise DsgError(
            f"The SAE {source} has normalize_activations={normalization!r}, which this version cannot slice exactly."
        )
    # Older configurations name their activation; a `standard` SAE may then be a top-k one.
    for key in ("activation_fn", "activation_fn_str"):
        if config.get(key) not in ("relu", None) and "topk" not in architecture:
            raise DsgError(f"The SAE {source} has {key}={config[key]!r}, which this version cannot slice exactly.")
    if normalization == "constant_norm_rescale" and _is_centred(config):
        raise DsgError(f"The SAE {source} rescales centred activations, which this version cannot slice exactly.")
    if "topk" in architecture and not (type(config.get("k")) is int and 0 < config["k"] <= config["d_sae"]):
        raise DsgError(f"The SAE {source} has k={config.get('k')!r}; it must be a whole number of features.")
    if config.get("reshape_activations") not in ("none", "hook_z", None):
        raise DsgError(
            f"The SAE {source} has reshape_activations={config['reshape_activations']!r}, which is not known here."
        )


def load_encoder(sae: SaeSource, *, device: str) -> Callable[[Tensor], Tensor]:
    """The whole SAE's encoder, through sae-lens: residuals [T, D] -> activations [T, F] in float32."""
    from sae_lens import SAE

    whole = SAE.load_from_disk(sae.folder, device=device, dtype="float32")
    whole.requires_grad_(False)
    if sae.config.get("reshape_activations") == "hook_z":
        whole.turn_off_forward_pass_hook_z_reshaping()  # Heads lie side by side already.

    def encode(resid_TD: Tensor) -> Tensor:
        resid_TD = resid_TD.float()
        acts_TF: Tensor = whole.encode(resid_TD - resid_TD.mean(-1, keepdim=True) if sae.is_centred else resid_TD)
        return acts_TF

    return encode
