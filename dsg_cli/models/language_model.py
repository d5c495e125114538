"""Load a causal language model and its tokenizer, whole or cut after one layer; identify its weights."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from dsg_cli.data.hub import REPOSITORY, fetch_snapshot
from dsg_cli.errors import DsgError, reason_of
from dsg_cli.guardrail.runtime.sites import decoder_of, evenly_spaced
from dsg_cli.lab import data as lab
from dsg_cli.settings import ModelSection
from dsg_cli.workspace.files import is_folder, parse_json

SMALL_FILES = (
    "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken",
    "README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
"""README.md says under which licence the model is, for the card of what is exported."""

SAMPLED = 256  # Values of each tensor that `model_digest` looks at.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")
"""What families call the norm between the last layer and the head."""

WEIGHT_FILES = ("model*.safetensors", "adapter_model.safetensors")
CODE_FILES = ("*.py",)
ON_CPU = ModelSection(device="cpu", dtype="float32")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for forward passes, and where it came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    """A model of the lab, a folder by its absolute path, or a repository at the commit that was read."""
    n_layers: int
    """Decoder layers of the whole model, however many were loaded."""


def model_folder(source: str, *, weights: bool = True, with_code: bool = False) -> Path:
    """The folder of a model of the lab, of a local model, or of a repository on the hub, which is downloaded as needed.

    Without `weights` only configuration and tokenizer are fetched; `with_code` the repository's Python files too.
    """
    if source in lab.MODEL_DIRS:
        folder = lab.MODEL_DIRS[source]
    elif is_folder(Path(source)):
        folder = Path(source)
    elif REPOSITORY.fullmatch(source):
        patterns = [*SMALL_FILES, *(WEIGHT_FILES if weights else ()), *(CODE_FILES if with_code else ())]
        folder = fetch_snapshot(source, patterns)
    else:
        raise DsgError(
            f"No model folder at {source[:200]}.",
            "Give --model a Hugging Face model folder, org/name on the hub, or `lab`.",
        )
    if not (folder / "config.json").is_file() and not is_adapter(folder):
        raise DsgError(f"{source} is not a Hugging Face model folder: it has no config.json.")
    return folder


def pinned(source: str, folder: Path) -> str:
    """A model's name that will mean the same later and elsewhere: an absolute path, or a repository at a commit."""
    if source in lab.MODEL_DIRS:
        return source
    return str(folder.resolve()) if Path(source).is_dir() else f"{source.partition('@')[0]}@{folder.name}"


def read_config(source: str, settings: ModelSection = ON_CPU) -> Any:
    """The model's configuration, without its weights."""
    folder = model_folder(source, weights=False, with_code=settings.trust_remote_code)
    if is_adapter(folder):
        return read_config(base_of(folder), settings)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=settings.trust_remote_code)
    except Exception as error:  # A file of the user's: libraries raise anything on a bad one.
        raise _unreadable(str(folder / "config.json"), "read", error) from error


def text_config(config: Any) -> Any:
    """The part of a (possibly multimodal) configuration that describes the decoder; a decoder's own is itself."""
    return config.get_text_config(decoder=True)


def context_length(config: Any) -> int:
    """Tokens that the model can read at once; 2048 where its configuration sets no limit."""
    return int(getattr(text_config(config), "max_position_embeddings", None) or 2048)


def load_tokenizer(source: str, settings: ModelSection = ON_CPU) -> PreTrainedTokenizerBase:
    """The model's tokenizer, without its weights."""
    folder = model_folder(source, weights=False, with_code=settings.trust_remote_code)
    if is_adapter(folder):
        return load_tokenizer(base_of(folder), settings)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise DsgError(
            f"{source} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}).",
            "Save one beside the model: tokenizer.save_pretrained(folder).",
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=settings.trust_remote_code
        )
    except Exception as error:  # The same.
        raise _unreadable(f"The tokenizer in {source}", "loaded", error) from error
    return tokenizer


def load_model(
    source: str, settings: ModelSection = ON_CPU, *, dtype: str | None = None, last_layer: int | None = None
) -> LoadedModel:
    """Load a model for inference; of an adapter, its base with the adapter's product added to the weights.

    `source` is `lab`, `lab-retrain`, a folder, org/name or org/name@revision, not `settings.source`; device and dtype
    of the settings are resolved. With `last_layer`, only decoder layers 0..last_layer are built and read from disk:
    their outputs are bit-identical to the whole model's, the weights above are never touched.
    """
    folder = model_folder(source, with_code=settings.trust_remote_code)
    torch_dtype = getattr(torch, dtype or settings.dtype)
    if is_adapter(folder):
        # Merged in float32, so that the result does not depend on the dtype that is wanted.
        base = load_model(base_of(folder), settings, dtype="float32", last_layer=last_layer)
        n_layers = base.n_layers if last_layer is None else last_layer + 1
        model = merged(base.model, folder, n_layers=n_layers).to(torch_dtype)
        return replace(base, model=model, source=pinned(source, folder))
    tokenizer = load_tokenizer(str(folder), settings)
    config = read_config(str(folder), settings)
    decoder = text_config(config)
    n_layers = int(decoder.num_hidden_layers)
    if last_layer is not None and last_layer + 1 < n_layers:
        decoder.num_hidden_layers = last_layer + 1
        if getattr(decoder, "layer_types", None):
            decoder.layer_types = decoder.layer_types[: last_layer + 1]
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=torch_dtype,
            # Gemma 2 caps its attention scores, which sdpa cannot do.
            attn_implementation="eager" if getattr(decoder, "attn_logit_softcapping", None) else None,
            device_map=settings.device_map,
            local_files_only=True,
            trust_remote_code=settings.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # The same.
        raise _unreadable(f"The model in {source}", "loaded", error) from error
    if missing := info["missing_keys"]:
        raise DsgError(f"The weights in {source} lack {len(missing)} tensors, among them {min(missing)}.")
    model.requires_grad_(False)
    model = model.eval()
    if settings.device_map is None:
        model = model.to(settings.device)
    else:
        devices = devices_of(model)
        if len(devices) > 1 and {"cpu", "disk"} & set(devices):
            raise DsgError(
                f"The model does not fit on the GPUs that are there ({', '.join(devices)}).",
                "Use more or larger ones, or --dtype bfloat16; "
                "what lies on the processor or on disk cannot be checked.",
            )
    return LoadedModel(model=model, tokenizer=tokenizer, source=pinned(source, folder), n_layers=n_layers)


def final_norm(model: Any) -> torch.nn.Module | None:
    """The norm between the last layer and the head; None where it goes by a name that is not known."""
    decoder = decoder_of(model)
    return next((norm for name in FINAL_NORMS if (norm := getattr(decoder, name, None)) is not None), None)


def devices_of(model: Any) -> list[str]:
    """The devices that a model's layers lie on."""
    placed = getattr(model, "hf_device_map", None) or {"": model.device}
    return sorted({str(torch.device(where)) if where != "disk" else "disk" for where in placed.values()})


def _unreadable(what: str, done: str, error: Exception) -> DsgError:
    needs_code = "trust_remote_code" in str(error)
    hint = "It brings Python files of its own. Read them; --trust-remote-code runs them." if needs_code else ""
    return DsgError(f"{what} cannot be {done}: {reason_of(error)}", hint)


def model_digest(model: PreTrainedModel) -> str:
    """Digest of every tensor of a model (name, shape and evenly spaced values), its configuration and what it runs on.

    Unlike `fingerprint` it covers the head and the last layers, and tells dtypes apart.
    """
    digest = hashlib.sha256(model.config.to_json_string(use_diff=False).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(evenly_spaced(tensor, SAMPLED).view(torch.uint8).numpy().tobytes())
    if model.device.type == "cuda":
        digest.update(torch.cuda.get_device_name(model.device).encode())
    return digest.hexdigest()


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


def check_peft() -> None:
    """Refuse to go on without PEFT."""
    if importlib.util.find_spec("peft") is None:
        raise DsgError("Adapters need PEFT, which is not installed.", "pip install 'dsg-cli[lora]'")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter rather than a whole model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of(folder: Path) -> str:
    """The model that an adapter belongs to, as `--model` takes it."""
    path = folder / ADAPTER_CONFIG
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
        base, revision = config["base_model_name_or_path"], config.get("revision")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DsgError(f"{path} does not name the model that the adapter belongs to.") from error
    if not isinstance(base, str) or not base:
        raise DsgError(f"{path} does not name the model that the adapter belongs to.", "Set base_model_name_or_path.")
    return f"{base}@{revision}" if revision and "@" not in base and not Path(base).is_dir() else base


def merged(model: PreTrainedModel, folder: Path, *, n_layers: int) -> PreTrainedModel:
    """The model, in float32 and whole or cut to `n_layers`, with the product of an adapter for it added to its weights.

    What the adapter adds above those layers is left out.
    """
    check_peft()
    from peft import PeftModel

    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            layers = [int(match[1]) for match in map(LAYER.search, file.keys()) if match]
        if layers and min(layers) >= n_layers:
            return model
        wrapped: Any = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
        whole: PreTrainedModel = wrapped.merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise DsgError(f"The adapter in {folder} cannot be loaded: {reason_of(error)}") from error
    return whole.requires_grad_(False).eval()


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear | Conv1D]:
    """The linear layers of the decoder, so without the head, by their names in the model."""
    of_decoder = set(map(id, decoder_of(model).modules()))
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) in of_decoder
    }


def add_adapters(model: PreTrainedModel, names: Sequence[str], *, rank: int, alpha: float, seed: int) -> Any:
    """Put low-rank adapters on linear layers, in place; PEFT's model around the given one.

    To the output of a layer alpha / rank x A B is added; B begins as 0, so that nothing is changed yet. The seed is
    that of A.
    """
    check_peft()
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=list(names))
    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)
