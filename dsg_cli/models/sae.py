"""Read an SAE, check that it can be sliced and fits the model, and run its whole encoder.

sae-lens is imported only to run a whole encoder (`select`); everything after works on a slice (sae_slice.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsg_cli.errors import DsgError, close_to
from dsg_cli.guardrail.runtime.sites import HookSite, parse_hook_site
from dsg_cli.lab import data as lab
from dsg_cli.models.releases import CONFIG_FILE, WEIGHTS_FILE, SaeFolder, find_sae, locate_release, releases
from dsg_cli.workspace.artifacts import SaeIdentity
from dsg_cli.workspace.files import file_digest, is_folder, parse_json

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
    site: HookSite  # Where it reads.
    write: HookSite  # Where its output belongs: `site`, unless it is a transcoder.

    @property
    def is_transcoder(self) -> bool:
        return "transcoder" in self.identity.architecture

    @property
    def metadata(self) -> dict[str, Any]:
        """What the configuration says of the model and the training."""
        return self.config | (self.config.get("metadata") or {})

    @property
    def is_centred(self) -> bool:
        return _is_centred(self.config)


def _is_centred(config: dict[str, Any]) -> bool:
    """Trained on activations minus their mean over the width, as TransformerLens's `center_writing_weights` makes.

    A Hugging Face model has them with the mean, which no layer norm sees.
    """
    loaded_with = (config | (config.get("metadata") or {})).get("model_from_pretrained_kwargs")
    return isinstance(loaded_with, dict) and bool(loaded_with.get("center_writing_weights"))


def read_sae(source: str) -> SaeSource:
    """Read and check an SAE's configuration and the shape of its weights.

    `source` is `lab`, `lab-1`, `lab-2`; a folder in sae-lens's format; a release of sae-lens with an id; or such a
    folder on the hub (`org/name[@revision][/folder]`).
    """
    located = _locate(source)
    config_path, weights_path = located.folder / CONFIG_FILE, located.folder / WEIGHTS_FILE
    for path in (config_path, weights_path):
        if not path.is_file():
            raise DsgError(f"{source} is not an SAE in sae-lens's format: it has no {path.name}.")
    config, metadata = _read_config(config_path)
    width, n_features = config["d_in"], config["d_sae"]
    _check_sliceable(config, source)
    site = _site({**config, **metadata}, "", where=str(config_path))
    is_transcoder = "transcoder" in config["architecture"]
    write = _site({**config, **metadata}, "_out", where=str(config_path)) if is_transcoder else site
    _check_weights(weights_path, config["architecture"], width, n_features, config.get("d_out", width))
    identity = SaeIdentity(
        source=located.source,
        revision=located.revision,
        architecture=config["architecture"],
        hook=site.name,
        width=width,
        n_features=n_features,
        prepend_bos=bool(metadata.get("prepend_bos", config.get("prepend_bos", True))),
        config_sha256=file_digest(config_path),
        sha256=file_digest(weights_path),
        hook_out=write.name if write != site else "",
    )
    return SaeSource(folder=located.folder, config=config, identity=identity, site=site, write=write)


def check_name(source: str) -> None:
    """Refuse an SAE whose name leads nowhere; nothing is fetched."""
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
    return SaeFolder(Path(source), str(Path(source).resolve())) if is_folder(Path(source)) else find_sae(source)


def _read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DsgError(f"{path} is not valid JSON: {error}.") from error
    metadata = (config.get("metadata") or {}) if isinstance(config, dict) else None
    if not isinstance(metadata, dict):
        raise DsgError(f"{path} is not the configuration of an SAE: it, and its metadata, must be JSON objects.")
    width, n_features = config.get("d_in"), config.get("d_sae")
    if type(width) is not int or type(n_features) is not int:
        raise DsgError(f"{path}: d_in and d_sae must be whole numbers, not {width!r} and {n_features!r}.")
    return config, metadata


def _site(settings: dict[str, Any], suffix: str, *, where: str) -> HookSite:
    """The hook of a configuration, in the TransformerLens spelling or else in that of Hugging Face modules."""
    name, hf_name = settings.get(f"hook_name{suffix}"), settings.get(f"hf_hook_name{suffix}")
    try:
        return parse_hook_site(hf_name if name is None else name, where=where)
    except DsgError:
        if not (isinstance(name, str) and isinstance(hf_name, str)):
            raise
        return parse_hook_site(hf_name, where=where)


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
    for kind in (architecture, normalization):
        if isinstance(kind, str) and kind in REFUSED:
            raise DsgError(f"The SAE {source} is {kind} and cannot be sliced: {REFUSED[kind]}.")
    if not isinstance(architecture, str) or architecture not in WEIGHTS:
        raise DsgError(
            f"The SAE {source} has the architecture {architecture!r}, which this version cannot slice exactly.",
            f"Supported: {', '.join(WEIGHTS)} (BatchTopK and Matryoshka SAEs are saved as jumprelu).",
        )
    if normalization not in NORMALIZATIONS:
        value = f"normalize_activations={normalization!r}"
        raise DsgError(f"The SAE {source} has {value}, which this version cannot slice exactly.")
    # Older configurations name their activation; a `standard` SAE may then be a top-k one.
    for key in ("activation_fn", "activation_fn_str"):
        if config.get(key) not in ("relu", None) and "topk" not in architecture:
            raise DsgError(f"The SAE {source} has {key}={config[key]!r}, which this version cannot slice exactly.")
    if normalization == "constant_norm_rescale" and _is_centred(config):
        raise DsgError(f"The SAE {source} rescales centred activations, which this version cannot slice exactly.")
    if "topk" in architecture and not (type(config.get("k")) is int and 0 < config["k"] <= config["d_sae"]):
        raise DsgError(f"The SAE {source} has k={config.get('k')!r}; it must be a whole number of features.")
    if config.get("reshape_activations") not in ("none", "hook_z", None):
        shape = config["reshape_activations"]
        raise DsgError(f"The SAE {source} has reshape_activations={shape!r}, which is not known here.")


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


FAMILIES = (
    ("gemma-2b", "gemma"), ("gemma-7b", "gemma"), ("gemma-2", "gemma2"), ("gemma-3", "gemma3"),
    ("gpt2", "gpt2"), ("gpt-oss", "gpt_oss"), ("pythia", "gpt_neox"), ("mistral", "mistral"),
    ("deepseek-r1-distill-llama", "llama"), ("deepseek-r1-distill-qwen", "qwen2"), ("llama", "llama"),
    ("qwen3.5", "qwen3_5"), ("qwen3", "qwen3"), ("qwen2.5", "qwen2"), ("qwen2", "qwen2"),
)  # fmt: skip
"""Beginning of a model's name and the model type that transformers gives it; the first that fits counts."""

TUNED = re.compile(r"(-(it|instruct|chat|base|pt|deduped|hf))+$")


def check_fits(sae: SaeSource, model_config: Any, model_source: str, *, has_bos: bool = True) -> list[str]:
    """Refuse an SAE of another model; return what a person should know about one that fits."""
    notes = _compare_names(sae, model_config, model_source)
    _check_shapes(sae, model_config, model_source)
    if sae.identity.prepend_bos and not has_bos:
        notes.append("The SAE was trained on texts that begin with BOS; this model's tokenizer has none.")
    if sae.is_centred:
        notes.append("The SAE was trained on centred activations: the mean is taken out before its encoder.")
    return notes


def _check_shapes(sae: SaeSource, model_config: Any, model_source: str) -> None:
    width, n_layers = int(model_config.hidden_size), int(model_config.num_hidden_layers)
    if sae.site.point == "attn_z":
        head_dim = getattr(model_config, "head_dim", None) or width // model_config.num_attention_heads
        width = int(model_config.num_attention_heads * head_dim)
    # The width of a module named by its path is known only when the model is there.
    if sae.site.point not in ("input", "output") and sae.identity.width != width:
        raise DsgError(
            f"The SAE {sae.identity.source} reads activations of width {sae.identity.width}, "
            f"but the model {model_source} has width {width} there.",
            "Choose an SAE that was trained on this model.",
        )
    if sae.site.layer >= n_layers:
        raise DsgError(
            f"The SAE {sae.identity.source} sits at layer {sae.site.layer} (counted from 0), "
            f"but the model {model_source} has {n_layers} layers."
        )


def _compare_names(sae: SaeSource, model_config: Any, model_source: str) -> list[str]:
    trained_on = sae.metadata.get("model_name")
    if not isinstance(trained_on, str) or not trained_on:
        return ["The SAE does not say which model it was trained on; width and layer fit."]
    theirs, ours = _bare(trained_on), _bare(model_source)
    family = next((kind for start, kind in FAMILIES if theirs.startswith(start)), None)
    # A multimodal model's decoder has a type of its own, such as gemma3_text.
    kind = str(model_config.model_type).removesuffix("_text").removesuffix("_moe")
    if family is not None and kind != family and theirs != ours:
        raise DsgError(
            f"The SAE {sae.identity.source} was trained on {trained_on}, a model of another family than {model_source} "
            f"({model_config.model_type}).",
            "Choose an SAE that was trained on this model.",
        )
    if model_source == "lab" or Path(model_source).is_dir():
        # A folder's name says nothing about what lies in it.
        is_known = family is not None or (model_source == "lab" and theirs == "dsg-lab")
        return [] if is_known else [f"The SAE was trained on {trained_on}, which is not a name known here."]
    if ours == theirs:
        return []
    if TUNED.sub("", ours) == TUNED.sub("", theirs):
        return [f"The SAE was trained on {trained_on}, not on {ours}: the same model before or after tuning."]
    return [f"The SAE was trained on {trained_on}; that it fits {ours} is not known. Width and layer do."]


def _bare(name: str) -> str:
    """The last part of a name, without a revision: `google/gemma-2-2b@main` is `gemma-2-2b`."""
    bare = name.partition("@")[0].rsplit("/", 1)[-1].lower()
    return bare.replace("gpt2-small", "gpt2").replace("meta-llama-", "llama-")
