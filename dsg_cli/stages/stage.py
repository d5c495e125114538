"""Load the model and the SAE of an artifact, and check that they still are what the artifact says."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from dsg_cli.artifacts import Header, Json, ModelIdentity, SaeIdentity
from dsg_cli.errors import DsgError
from dsg_cli.model import LoadedModel, fingerprint, load_model
from dsg_cli.recipe import Recipe
from dsg_cli.sae import SaeSource, read_sae
from dsg_cli.tokens import special_ids
from dsg_cli.workers import launched


def settle(recipe: Recipe, made: Header | None = None) -> Recipe:
    """The recipe with `auto` replaced: the GPU if there is one, and the dtype of the artifact that is gone on from.

    Raises:
        DsgError: The device is unknown or absent, or processes share out what a device map does.
    """
    device = recipe.model.device
    if recipe.model.device_map is not None and launched().n > 1:
        raise DsgError("--device-map and torchrun both share out the GPUs.", "Take one of them.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"  # Each process that torchrun starts on a machine has its own.
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DsgError(f"The device {device} is not available here.", "Try --device cpu.") from error
    dtype: Any = recipe.model.dtype
    if dtype == "auto" and made is not None:
        dtype = made.dtype
    elif dtype == "auto":
        has_bfloat16 = device.startswith("cuda") and torch.cuda.is_bf16_supported()
        dtype = "bfloat16" if has_bfloat16 else "float32"
    return replace(recipe, model=replace(recipe.model, device=device, dtype=dtype))


def identify(loaded: LoadedModel, last_layer: int) -> ModelIdentity:
    """The identity of a loaded model, whole or cut after `last_layer`."""
    config = loaded.model.config.get_text_config(decoder=True)
    return ModelIdentity(
        source=loaded.source,
        architecture=type(loaded.model).__name__,
        n_layers=loaded.n_layers,
        width=int(config.hidden_size),
        last_layer=last_layer,
        fingerprint=fingerprint(loaded.model, last_layer),
    )


def load_chain_model(header: Header, recipe: Recipe, *, cut: bool) -> LoadedModel:
    """The model that an artifact was made with.

    Args:
        header: Of that artifact.
        recipe: For device and dtype.
        cut: Load layers up to the hook only.

    Raises:
        DsgError: It cannot be loaded, or its weights are others.
    """
    wanted = header.model
    loaded = load_model(
        recipe.model.instead or wanted.source,
        device=recipe.model.device,
        dtype=recipe.model.dtype,
        last_layer=wanted.last_layer if cut else None,
        device_map=recipe.model.device_map,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    if not recipe.model.allow_mismatch:
        check_identity(loaded, header)
    return loaded


def check_identity(loaded: LoadedModel, header: Header) -> None:
    """Refuse a model that is not the one an artifact was made with.

    Raises:
        DsgError: It is another one.
    """
    wanted = header.model
    if replace(identify(loaded, wanted.last_layer), source=wanted.source) != wanted:
        raise DsgError(
            f"The model in {loaded.source} is not the one that {header.id} was made with: its weights have changed.",
            "Start again with dsg select"
            + (", or put it on this model all the same with --allow-mismatch." if header.kind == "guardrail" else "."),
        )


def chain_sae(wanted: SaeIdentity, made: str) -> SaeSource:
    """The SAE that an artifact was made with.

    Raises:
        DsgError: It cannot be read, or its weights are others.
    """
    sae = read_sae(wanted.source)
    if replace(sae.identity, revision=wanted.revision) != wanted:
        changed = "weights" if sae.identity.sha256 != wanted.sha256 else "configuration"
        raise DsgError(
            f"The SAE in {wanted.source} is not the one that {made} was made with: its {changed} changed.",
            "Start again with dsg select.",
        )
    return sae


def check_tokens(loaded: LoadedModel, special: Sequence[int], made: str) -> None:
    """Refuse a tokenizer with other special tokens than the artifact was made with.

    Raises:
        DsgError: It has.
    """
    if list(special) != list(special_ids(loaded.tokenizer)):
        raise DsgError(
            f"The tokenizer of {loaded.source} has other special tokens than when {made} was made.",
            "Start again with dsg select.",
        )


def spelled(corpus: Json) -> str:
    """A corpus of select as it was named there, weight included."""
    return f"{corpus['name']}={corpus['weight']}" if corpus.get("weight") else str(corpus["name"])
