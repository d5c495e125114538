"""What a sparse autoencoder tells methods that train weights: features by rank, their decoder rows, unknown names."""

from __future__ import annotations

from pathlib import Path

import torch

from dsg_cli.artifacts import FeatureSet
from dsg_cli.errors import DsgError
from dsg_cli.methods.given import Features
from dsg_cli.methods.mentions import Mentions, find_mentions
from dsg_cli.methods.names import section_of
from dsg_cli.methods.text import Text, rows_of
from dsg_cli.model import LoadedModel
from dsg_cli.prompt_files import read_prompts
from dsg_cli.recipe import Recipe
from dsg_cli.sae import load_encoder
from dsg_cli.selection import EPSILON, scores_of, select_features
from dsg_cli.slicing import slice_sae
from dsg_cli.stages.chain import chain_sae
from dsg_cli.stages.material import Material
from dsg_cli.workspace import Stored, Workspace


def features_of(recipe: Recipe, workspace: Workspace, method: str, features: Stored, *, device: str) -> Features:
    """The SAE of a features artifact, and what its statistics say of it.

    Raises:
        DsgError: The SAE is another one now, or too few features are relevant or irrelevant.
    """
    assert features.header.sae is not None
    sae = chain_sae(features.header.sae, features.id)
    settings, body = getattr(recipe.methods, section_of(method)), features.body_as(FeatureSet)
    tensors = workspace.tensors(features)
    forget_F, retain_F = scores_of(body.score, tensors)
    n_relevant = getattr(settings, "n_relevant", len(body.features))
    n_irrelevant = getattr(settings, "n_irrelevant", 1)
    percentile = features.header.settings["ratio_percentile"]
    chosen = select_features(forget_F, retain_F, n_features=n_relevant, ratio_percentile=percentile)
    relevant = [feature.index for feature in chosen.features]
    live_F = (tensors["retain_rate"] > 0) & (tensors["forget_rate"] > 0)
    ratio_F = torch.where(live_F, forget_F / (retain_F + EPSILON), torch.inf)
    irrelevant = [i for i in ratio_F.argsort().tolist() if bool(live_F[i]) and i not in relevant][:n_irrelevant]
    if len(irrelevant) < n_irrelevant:
        raise DsgError(f"Only {len(irrelevant)} features are irrelevant.", "Lower methods.sspu.n_irrelevant.")
    rows = [slice_sae(sae, indices)[1]["W_dec"].to(device) for indices in (relevant, irrelevant)]
    return Features(sae.site, load_encoder(sae, device=device), relevant, *rows)


def unknown_text(recipe: Recipe, material: Material, loaded: LoadedModel, forget: Text) -> Text | Mentions:
    """Entities that do not exist: in the texts of a file, or in forget text in the place of its names."""
    path = recipe.methods.sae_representation.unknown_file
    if path:
        return rows_of(loaded.tokenizer, read_prompts((), Path(path)), bos=material.bos, like=forget)
    return find_mentions(loaded.tokenizer, forget, bos=material.bos, seed=recipe.seed)
