"""Load the model and the SAE of an artifact, and check that they still are what the artifact says."""

from __future__ import annotations

from pathlib import Path

import torch

from dsg_cli.artifacts import Guardrail, Header, ModelIdentity, SaeIdentity
from dsg_cli.errors import DsgError
from dsg_cli.guardrail import GuardrailModule
from dsg_cli.lab import data as lab
from dsg_cli.model import LoadedModel, fingerprint, load_model, parse_hook_site
from dsg_cli.recipe import Recipe
from dsg_cli.sae import SaeSlice, SaeSource, read_sae
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
    if sae.identity.sha256 != wanted.sha256:
        raise DsgError(
            f"The SAE in {wanted.source} is not the one that {made} was made with: its weights have changed.",
            "Start again with dsg select.",
        )
    return sae


def parent(stored: Stored, kind: str) -> Stored:
    """The artifact of a kind that this one was made from, next to it in its workspace.

    Raises:
        DsgError: It is gone, or another than the one recorded.
    """
    recorded = next(item for item in stored.header.inputs if item.id.startswith(f"{kind}-"))
    found = Workspace(stored.path.parent).find(kind, recorded.id)
    if found.json["sha256"] != recorded.sha256:
        raise DsgError(f"{stored.id} was made from another {recorded.id} than the one in {stored.path.parent}.")
    return found


def load_guardrail_module(workspace: Workspace, stored: Stored) -> GuardrailModule:
    """The guardrail of an artifact as a module, from its own tensors."""
    body = stored.body_as(Guardrail)
    tensors = workspace.tensors(stored)
    sae = SaeSlice(tensors["W_enc"], tensors["b_enc"], tensors["active_above"], tensors["W_dec"])
    site = parse_hook_site(body.hook, where=str(stored.path))
    return GuardrailModule(sae, site, threshold=body.threshold, strength=body.strength, special=tuple(body.special_ids))
