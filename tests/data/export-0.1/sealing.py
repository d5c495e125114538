"""The configuration file of an exported model is of no use to the base model's own classes.

Else `Gemma2ForCausalLM.from_pretrained(EXPORT)` would load the weights without their guardrails. The size of the
vocabulary is kept under another key, and in its place stands a word that no class takes for a number.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
