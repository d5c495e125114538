"""`dsg apply --method npo` and its like: a method that changes the model's weights.

Reads the forget and retain corpora but for the part that measures (`finetune`, which teaches, reads all of its own),
lets the method change a float32 copy of the model, and writes model-NNN with the weights in a folder of that name: a
whole model, or a LoRA adapter.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dsg_cli.data.readers import read_prompts
from dsg_cli.data.tokens import special_ids
from dsg_cli.errors import DsgError
from dsg_cli.guardrail.selection import EPSILON, scores_of, select_features
from dsg_cli.methods import METHODS, load_method, section_of
from dsg_cli.methods.representation import find_mentions
from dsg_cli.methods.text import Mentions, Text, lesson_of, rows_of, text_of
from dsg_cli.methods.training import Changed, Cost, Features, Given, counted
from dsg_cli.models.language_model import LoadedModel, context_length
from dsg_cli.models.sae import load_encoder
from dsg_cli.models.sae_slice import slice_sae
from dsg_cli.settings import CorporaSection, Recipe
from dsg_cli.stages.inputs import Material, chain_sae, find_lesson, find_material, identify, load_whole, taken_from
from dsg_cli.stages.stage import QUIET, RunOptions, new_header, settle
from dsg_cli.workspace.artifacts import FeatureSet, Header, ModelWeights
from dsg_cli.workspace.files import Content
from dsg_cli.workspace.provenance import Clock
from dsg_cli.workspace.store import Stored, Workspace


def features_of(recipe: Recipe, workspace: Workspace, method: str, features: Stored, *, device: str) -> Features:
    """The SAE of a features artifact, and what its statistics say of it."""
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


def run(
    recipe: Recipe, workspace: Workspace, method: str, *, origin: Stored | None = None, options: RunOptions = QUIET
) -> Stored:
    """Change the weights of a model by a method, and write them.

    Args:
        recipe: Model, corpora, and the method's settings.
        workspace: Where the artifact goes.
        method: One that changes weights.
        origin: Features (which a method that an SAE guides must have) or a model, whose model and corpora are taken.
        options: How it is run.
    """
    if options.workers.n > 1:
        raise DsgError(f"{method} trains in one process.", "Run dsg apply without torchrun.")
    clock, settings = Clock(), getattr(recipe.methods, section_of(method))
    recipe = taken_from(recipe, origin)
    if METHODS[method].teaches:
        recipe = dataclasses.replace(recipe, corpora=CorporaSection(limit=settings.limit))
        material = find_lesson(recipe, workspace, origin)
    else:
        material = find_material(recipe, workspace, method, origin)
    workspace.check_writable()
    recipe = settle(recipe)
    # Weights and what is added to them are float32, whatever the model is run in later.
    loaded = load_whole(material, recipe, dtype="float32")
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, dtype="float32"))
    header = new_header(
        "model",
        recipe,
        settings={
            "method": method,
            **dataclasses.asdict(settings),
            **material.described(),
            "limit": recipe.corpora.limit,
        },
        model=identify(loaded, loaded.n_layers - 1),
        sae=origin.header.sae if origin is not None and METHODS[method].needs_sae else None,
        inputs=material.inputs,
        notes=material.notes,
    )
    if (stored := options.existing(workspace, header)) is not None:
        return stored
    cost = Cost()
    with options.checkpoint(workspace, header) as checkpoint, counted(loaded.model, cost):
        given = _given(recipe, workspace, method, material, loaded, origin, options)
        given = dataclasses.replace(given, checkpoint=checkpoint)
        changed: Changed = load_method(method)(given, settings)
        return _written(workspace, clock, header, material, loaded, changed, cost, settings)


def _given(
    recipe: Recipe,
    workspace: Workspace,
    method: str,
    material: Material,
    loaded: LoadedModel,
    origin: Stored | None,
    options: RunOptions,
) -> Given:
    settings = getattr(recipe.methods, section_of(method))
    longest = min(settings.max_tokens, context_length(loaded.model.config))
    encoding: dict[str, Any] = {"bos": material.bos, "max_tokens": longest, "device": str(loaded.model.device)}
    if METHODS[method].teaches:
        text = lesson_of(loaded.tokenizer, material.train, settings, **encoding)
        return Given(loaded.model, loaded.tokenizer, text, text, seed=recipe.seed, report=options.report)
    forget, retain = (text_of(loaded.tokenizer, corpora, **encoding) for corpora in (material.forget, material.retain))
    given = Given(loaded.model, loaded.tokenizer, forget, retain, seed=recipe.seed, report=options.report)
    if METHODS[method].needs_sae:
        assert origin is not None
        features = features_of(recipe, workspace, method, origin, device=given.device)
        given = dataclasses.replace(given, features=features)
    if method == "sae-representation":
        given = dataclasses.replace(given, unknown=unknown_text(recipe, material, loaded, forget))
    return given


def _written(
    workspace: Workspace,
    clock: Clock,
    header: Header,
    material: Material,
    loaded: LoadedModel,
    changed: Changed,
    cost: Cost,
    settings: Any,
) -> Stored:
    """The artifact, its weights in a folder beside it."""
    notes = list(header.notes)
    if changed.diverged_at is not None:
        notes.append(
            f"Training diverged at step {changed.diverged_at}: its loss was not finite. The weights are those after "
            f"step {changed.kept_at}. Lower the learning rate."
        )
    with tempfile.TemporaryDirectory(prefix=".weights-", suffix=".tmp", dir=workspace.folder) as scratch:
        model = save(loaded, changed, Path(scratch), base=material.model, dtype=settings.save_dtype)
        loaded = dataclasses.replace(loaded, model=model)
        body = ModelWeights(
            method=header.settings["method"],
            form="adapter" if changed.adapter is not None else "whole",
            # Where it lies follows from the artifact's own place.
            result=dataclasses.replace(identify(loaded, loaded.n_layers - 1), source=""),
            trained={
                "n_parameters": changed.n_parameters,
                "n_changed": changed.n_changed,
                "modules": sorted({name.rpartition(".")[0] for name in changed.names}),
                **({"corpora": [corpus.name for corpus in material.train]} if material.train else {}),
            },
            losses=changed.losses,
            diverged_at=changed.diverged_at,
            cost=cost.as_json(),
            features=list(_features(header, material)),
            special_ids=list(special_ids(loaded.tokenizer)),
            bos=material.bos,
            forget=material.names["forget"],
            retain=material.names["retain"],
        )
        header = clock.close(dataclasses.replace(header, notes=notes), n_tokens=cost.forward_tokens)
        return workspace.write(header, body, folder=_contents(Path(scratch)))


def _features(header: Header, material: Material) -> list[int]:
    if header.sae is None:
        return []
    return [one["index"] for one in material.inputs[0].json["features"]]


def save(loaded: LoadedModel, changed: Changed, folder: Path, *, base: str, dtype: str) -> Any:
    """Write what was changed, as transformers or PEFT read it; the changed model, without adapters in it.

    Args:
        loaded: The model.
        changed: What a method did to it.
        folder: Where to.
        base: The model that it was made from, by its name.
        dtype: Of a whole model's weights.
    """
    if changed.adapter is None:
        model = loaded.model.to(getattr(torch, dtype))
        model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        return model
    config = changed.adapter.peft_config["default"]
    config.base_model_name_or_path, _, revision = base.partition("@")
    config.revision = revision or None
    changed.adapter.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # A form to fill in.
    return changed.adapter.merge_and_unload().requires_grad_(False).eval()


def _contents(folder: Path) -> Mapping[str, Content]:
    files: dict[str, Content] = {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    return files
