"""Load the model and the SAE of an artifact, and check that they still are what the artifact says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from dsg_cli.artifacts import Guardrail, Header, ModelIdentity, SaeIdentity
from dsg_cli.errors import DsgError
from dsg_cli.guardrail import GuardrailModule
from dsg_cli.lab import data as lab
from dsg_cli.model import LoadedModel, fingerprint, load_model, parse_hook_site
from dsg_cli.recipe import Recipe
from dsg_cli.sae import SaeSlice, SaeSource, read_sae
from dsg_cli.tokens import special_ids
from dsg_cli.workspace import Stored, Workspace


def absolute(source: str) -> str:
    """A name of the lab as it is, a folder by its absolute path: artifacts are read from anywhere."""
    return source if source == "lab" or source in lab.SAE_DIRS else str(Path(source).resolve())


def check_device(device: str) -> None:
    """Refuse a device that torch does not have.

    Raises:
        DsgError: Unknown or absent.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DsgError(f"The device {device} is not available here.", "Try --device cpu.") from error


def identify(loaded: LoadedModel, last_layer: int) -> ModelIdentity:
    """The identity of a loaded model, whole or cut after `last_layer`."""
    config = loaded.model.config.get_text_config(decoder=True)
    return ModelIdentity(
        source=absolute(loaded.source),
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
    check_device(recipe.model.device)
    wanted = header.model
    loaded = load_model(
        wanted.source,
        device=recipe.model.device,
        dtype=recipe.model.dtype,
        last_layer=wanted.last_layer if cut else None,
    )
    found = identify(loaded, wanted.last_layer)
    if found != wanted:
        raise DsgError(
            f"The model in {wanted.source} is not the one that {header.id} was made with: its weights have changed.",
            "Start again with dsg select.",
        )
    return loaded


def chain_sae(wanted: SaeIdentity, made: str) -> SaeSource:
    """The SAE that an artifact was made with.

    Raises:
        DsgError: It cannot be read, or its weights are others.
    """
    sae = read_sae(wanted.source)
    if sae.identity != wanted:
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


def load_guardrail_module(workspace: Workspace, stored: Stored, loaded: LoadedModel) -> GuardrailModule:
    """The guardrail of an artifact as a module on the model's device, from its own tensors.

    Raises:
        DsgError: Its tensors are not all finite, or the tokenizer is not the one it was made with.
    """
    body = stored.body_as(Guardrail)
    check_tokens(loaded, body.special_ids, stored.id)
    tensors = workspace.tensors(stored)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise DsgError(f"{stored.id} holds values that are not finite.", "Make it again with dsg apply.")
    sae = SaeSlice(tensors["W_enc"], tensors["b_enc"], tensors["active_above"], tensors["W_dec"])
    site = parse_hook_site(body.hook, where=str(stored.path))
    return GuardrailModule(sae, site, threshold=body.threshold, strength=body.strength, special=tuple(body.special_ids))
