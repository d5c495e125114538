"""lm-eval's own results files of both sides, as its `--output_path` would hold them, so that its viewers work."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lm_eval.utils import handle_non_serializable, sanitize_model_name

from dsg_cli.artifacts import Json


def results_files(found: Mapping[str, Json], *, model: str, created: str, samples: bool) -> dict[str, bytes]:
    """Paths below an evaluation's folder and their content.

    Args:
        found: Side -> what lm-eval returned.
        model: What the model is called.
        created: ISO time, which is in lm-eval's names of files.
        samples: Also its samples, which hold the prompts.
    """
    stamp = created.replace(":", "-").replace("+00-00", "")
    files = {}
    for side, results in found.items():
        name = model if side == "base" else f"{model}-guarded"
        folder = f"{side}/{sanitize_model_name(name)}"
        shown = {key: value for key, value in results.items() if key != "samples"}
        if not samples:  # A task's own examples are prompts too.
            shown["configs"] = {task: _without_examples(config) for task, config in shown.get("configs", {}).items()}
        shown["config"] = {**shown.get("config", {}), "model": name}  # Not where it lies on this machine.
        shown |= {"model_source": "dsg", "model_name": name, "model_name_sanitized": sanitize_model_name(name)}
        files[f"{folder}/results_{stamp}.json"] = _dumped(_plain(shown), indent=2)
        for task, asked in results["samples"].items() if samples else ():
            lines = b"".join(_dumped(_plain(sample)) + b"\n" for sample in asked)
            files[f"{folder}/samples_{task}_{stamp}.jsonl"] = lines
    return files


def _without_examples(config: Any) -> Any:
    fewshot = config.get("fewshot_config") if isinstance(config, Mapping) else None
    if not isinstance(fewshot, Mapping) or "samples" not in fewshot:
        return config
    return {**config, "fewshot_config": {key: value for key, value in fewshot.items() if key != "samples"}}


def _dumped(value: Any, indent: int | None = None) -> bytes:
    return json.dumps(value, indent=indent, default=handle_non_serializable, ensure_ascii=False).encode()


def _plain(value: Any) -> Any:
    """Without functions, whose only text is where they lie in memory."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items() if not callable(inner)}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
