"""The model folder: a guarded model that stock clients of transformers load, without this package.

The base model's weights are linked or copied as they are; the guardrails are one more shard. The folder has a model
type of its own, so that without `trust_remote_code` it loads nothing rather than the unguarded model.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dsg_cli.errors import DsgError
from dsg_cli.export.card import CARD_FILE
from dsg_cli.guardrail.guarded import check_causal
from dsg_cli.guardrail.loading import LIGHT_FILE
from dsg_cli.guardrail.runtime import exported
from dsg_cli.guardrail.runtime.guardrail import GuardrailModule
from dsg_cli.guardrail.runtime.spec import sealed
from dsg_cli.models.language_model import read_config, text_config
from dsg_cli.workspace.body import Json
from dsg_cli.workspace.files import write_folder

RUNTIME = Path(exported.__file__).parent
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
GUARD_SHARD = "dsg-guardrails.safetensors"
CONFIGURATION, MODELING = "configuration_dsg.py", "modeling_dsg.py"

COPIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken",
    "*.model", "generation_config.json", "chat_template*", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
"""Files that travel with the weights; whatever else lies in the folder is the user's own."""


def export_folder(
    folder: Path,
    *,
    base: Path,
    architecture: str,
    tokenizer_class: str,
    guardrails: Sequence[GuardrailModule],
    light_files: Sequence[bytes],
    card: str,
    links: bool = True,
    allow_mismatch: bool = False,
) -> None:
    """Write a guarded model with the guardrails' light files and its card into a new or empty folder, or nothing.

    Args:
        base: Folder of the base model.
        architecture: Its class in transformers, such as `Gemma2ForCausalLM`.
        links: Hard-link the base's weights where the file system can; else copy them.
        allow_mismatch: Put guardrails on weights that they were not made for.
    """
    check_causal(guard.gate.form for guard in guardrails)
    config = read_config(str(base))
    if not hasattr(transformers, architecture) or not hasattr(transformers, type(config).__name__):
        raise DsgError(f"{architecture} is no class of transformers itself, so its export could not be loaded.")
    if text_config(config) is not config:
        raise DsgError(
            f"{architecture} reads more than text; only models of text alone can be exported.",
            "Guard it in Python with dsg_cli.guarded.",
        )
    shards = _base_weights(base)

    def fill(partial: Path) -> None:
        partial.mkdir()
        _copy_small_files(base, partial, tokenizer_class)
        _place_weights(base, shards, partial, guardrails, links=links)
        values: Json = json.loads((base / "config.json").read_text(encoding="utf-8"))
        guards = {exported.ALLOW_MISMATCH: allow_mismatch, exported.PREFIX: list(map(exported.describe, guardrails))}
        _write_json(partial / "config.json", _config(values, config, architecture, guards))
        _write_code(partial, type(config).__name__, architecture)
        for number, content in enumerate(light_files):
            (partial / light_name(number)).write_bytes(content)
        (partial / CARD_FILE).write_text(card, encoding="utf-8", errors="replace")

    write_folder(folder, fill)


def light_name(number: int) -> str:
    """Name of the light file of the first, second ... guardrail in a folder or repository."""
    return LIGHT_FILE if number == 0 else LIGHT_FILE.replace(".", f"-{number + 1}.")


def _base_weights(base: Path) -> dict[str, list[str]]:
    """Files of the base's weights, and the tensors that each holds."""
    if (base / SINGLE).is_file():
        files = [SINGLE]
    elif (base / INDEX).is_file():
        try:
            files = sorted(set(json.loads((base / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise DsgError(f"{base / INDEX} is damaged: {error}.", "Save or download the model again.") from error
    else:
        raise DsgError(f"{base} has no {SINGLE} and no {INDEX}.", "Save the model as safetensors first.")
    held: dict[str, list[str]] = {}
    for name in files:
        try:
            with safe_open(base / name, framework="pt") as file:
                held[name] = list(file.keys())
        except (SafetensorError, OSError) as error:
            raise DsgError(f"{base / name} cannot be read: {error}.") from error
    return held


def _copy_small_files(base: Path, partial: Path, tokenizer_class: str) -> None:
    for path in sorted(base.iterdir()):
        if path.is_file() and any(fnmatch.fnmatchcase(path.name, pattern) for pattern in COPIED):
            shutil.copyfile(path, partial / path.name)
    settings = partial / "tokenizer_config.json"
    values: Json = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else {}
    values.pop("name_or_path", None)
    # Without it transformers chooses by the model type, which is another one here.
    values.setdefault("tokenizer_class", tokenizer_class)
    _write_json(settings, values)


def _place_weights(
    base: Path, shards: dict[str, list[str]], partial: Path, guardrails: Sequence[GuardrailModule], *, links: bool
) -> None:
    """The base's files, the guardrails' shard, and the index over both.

    The base's files get names that `save_pretrained` never writes: what is linked must not be overwritten.
    """
    weight_map: dict[str, str] = {}
    n_bytes = 0
    for number, (name, tensors) in enumerate(shards.items(), start=1):
        placed = f"base-{number:05d}-of-{len(shards):05d}.safetensors"
        source = (base / name).resolve()
        try:
            (os.link if links else shutil.copyfile)(source, partial / placed)
        except OSError:  # Another file system, or one without links.
            shutil.copyfile(source, partial / placed)
        n_bytes += (partial / placed).stat().st_size
        weight_map |= dict.fromkeys(tensors, placed)
    held = {
        f"{exported.PREFIX}.{number}.{name}": tensor.contiguous()
        for number, guard in enumerate(guardrails)
        for name, tensor in guard.state_dict().items()
    }
    (partial / GUARD_SHARD).write_bytes(save(held, metadata={"format": "pt"}))
    weight_map |= dict.fromkeys(held, GUARD_SHARD)
    index = {"metadata": {"total_size": n_bytes + (partial / GUARD_SHARD).stat().st_size}, "weight_map": weight_map}
    _write_json(partial / INDEX, index)


def _config(values: Json, config: Any, architecture: str, guards: Json) -> Json:
    """The base's configuration with a model type of its own, which names the code to load it by."""
    values.pop("_name_or_path", None)
    values |= {
        # The base's type stays readable in it: clients look for parts of it, such as `gemma`.
        "model_type": f"dsg_{config.model_type}",
        # `transformers serve` looks for a class of this name in transformers itself.
        "architectures": ["AutoModelForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{CONFIGURATION.removesuffix('.py')}.DsgConfig",
            "AutoModelForCausalLM": f"{MODELING.removesuffix('.py')}.Dsg{architecture}",
        },
    }
    return sealed({"vocab_size": config.vocab_size} | values | guards)


def _write_code(partial: Path, config_class: str, architecture: str) -> None:
    for path in RUNTIME.glob("*.py"):
        if path.name != "__init__.py":
            shutil.copyfile(path, partial / path.name)
    (partial / CONFIGURATION).write_text(
        f'''"""Configuration of a guarded model: the base model's, and its guardrails."""

from transformers import {config_class}

from .spec import SealedConfig


class DsgConfig(SealedConfig, {config_class}):
    model_type = "dsg_" + {config_class}.model_type
'''
    )
    (partial / MODELING).write_text(
        f'''"""{architecture} of transformers under its guardrails; see README.md."""

from transformers import {architecture}

from .configuration_dsg import DsgConfig
from .exported import GuardrailMixin


class Dsg{architecture}(GuardrailMixin, {architecture}):
    config_class = DsgConfig
'''
    )


def _write_json(path: Path, data: Json) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
