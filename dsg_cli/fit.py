"""Prove from configurations alone that an SAE belongs to a model; say what cannot be proved."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dsg_cli.errors import DsgError
from dsg_cli.sae import SaeSource

FAMILIES = (
    ("gemma-2b", "gemma"),
    ("gemma-7b", "gemma"),
    ("gemma-2", "gemma2"),
    ("gemma-3", "gemma3"),
    ("gpt2", "gpt2"),
    ("gpt-oss", "gpt_oss"),
    ("pythia", "gpt_neox"),
    ("mistral", "mistral"),
    ("deepseek-r1-distill-llama", "llama"),
    ("deepseek-r1-distill-qwen", "qwen2"),
    ("llama", "llama"),
    ("qwen3.5", "qwen3_5"),
    ("qwen3", "qwen3"),
    ("qwen2.5", "qwen2"),
    ("qwen2", "qwen2"),
)
"""Beginning of a model's name and the model type that transformers gives it; the first that fits counts."""
TUNED = re.compile(r"-(it|instruct|chat|base|pt|deduped|hf)$")


def check_fits(sae: SaeSource, model_config: Any, model_source: str, *, has_bos: bool = True) -> list[str]:
    """Refuse an SAE of another model; return what a person should know about one that fits.

    Args:
        sae: The SAE, its configuration read.
        model_config: The decoder's configuration.
        model_source: What the model is called.
        has_bos: Whether its tokenizer has a BOS token.

    Raises:
        DsgError: Another width, a layer that the model does not have, or another family of models.
    """
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
    named = sae.metadata.get("model_name")
    if not isinstance(named, str) or not named:
        return ["The SAE does not say which model it was trained on; width and layer fit."]
    theirs = _bare(named)
    family = next((kind for start, kind in FAMILIES if theirs.startswith(start)), None)
    # A multimodal model's decoder has a type of its own, such as gemma3_text.
    kind = str(model_config.model_type).removesuffix("_text").removesuffix("_moe")
    if family is not None and kind != family and theirs != _bare(model_source):
        raise DsgError(
            f"The SAE {sae.identity.source} was trained on {named}, a model of another family than {model_source} "
            f"({model_config.model_type}).",
            "Choose an SAE that was trained on this model.",
        )
    if model_source == "lab" or Path(model_source).is_dir():
        # A folder's name says nothing about what lies in it.
        is_known = family is not None or (model_source == "lab" and theirs == "dsg-lab")
        return [] if is_known else [f"The SAE was trained on {named}, which is not a name known here."]
    ours = _bare(model_source)
    if ours == theirs:
        return []
    if _untuned(ours) == _untuned(theirs):
        return [f"The SAE was trained on {named}, not on {ours}: the same model before or after tuning."]
    return [f"The SAE was trained on {named}; that it fits {ours} is not known. Width and layer do."]


def _bare(name: str) -> str:
    """The last part of a name, without a revision: `google/gemma-2-2b@main` is `gemma-2-2b`."""
    bare = name.partition("@")[0].rsplit("/", 1)[-1].lower()
    return bare.replace("gpt2-small", "gpt2").replace("meta-llama-", "llama-")


def _untuned(name: str) -> str:
    while (shorter := TUNED.sub("", name)) != name:
        name = shorter
    return name
