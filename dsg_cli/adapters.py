"""LoRA adapters in PEFT's format: a folder that names its base model, and thin matrices to be added to its weights."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from dsg_cli.errors import DsgError
from dsg_cli.integrity import parse_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


def check_peft() -> None:
    """Refuse to go on without PEFT.

    Raises:
        DsgError: It is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise DsgError("Adapters need PEFT, which is not installed.", "pip install 'dsg-cli[lora]'")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter rather than a whole model."""
    return (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()


def base_of(folder: Path) -> str:
    """The model that an adapter belongs to, as `--model` takes it.

    Raises:
        DsgError: The folder does not say.
    """
    path = folder / CONFIG_FILE
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
        base, revision = config["base_model_name_or_path"], config.get("revision")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DsgError(f"{path} does not name the model that the adapter belongs to.") from error
    if not isinstance(base, str) or not base:
        raise DsgError(f"{path} does not name the model that the adapter belongs to.", "Set base_model_name_or_path.")
    return f"{base}@{revision}" if revision and "@" not in base and not Path(base).is_dir() else base


def merged(model: PreTrainedModel, folder: Path, *, n_layers: int) -> PreTrainedModel:
    """The model with an adapter's product added to its weights.

    Args:
        model: The adapter's base, whole or cut, in float32; it is changed.
        folder: Of the adapter.
        n_layers: Layers that the model has; what an adapter adds above them is left out.

    Raises:
        DsgError: PEFT is not installed, or the adapter does not fit the model.
    """
    check_peft()
    from peft import PeftModel

    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            layers = [int(match[1]) for match in map(LAYER.search, file.keys()) if match]
        if layers and min(layers) >= n_layers:
            return model
        wrapped: Any = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
        whole: PreTrainedModel = wrapped.merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise DsgError(f"The adapter in {folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    return whole.requires_grad_(False).eval()
