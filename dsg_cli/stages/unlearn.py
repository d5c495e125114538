"""`dsg apply --method npo` and its like: a method that changes the model's weights.

Reads the forget and retain corpora but for the split that measures (`finetune` reads all of its own), lets the method
change a float32 copy of the model, and writes model-NNN with the weights in a folder of that name: a whole model, or a
LoRA adapter.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch

from dsg_cli.data.readers import read_prompts
from dsg_cli.data.tokens import special_ids
from dsg_cli.errors import DsgError
from dsg_cli.guardrail.selection import EPSILON, scores_of, select_features
from dsg_cli.methods import METHODS, load_method, section_of
from dsg_cli.methods.text import find_name_spans, finetune_rows, training_rows, unknown_rows
from dsg_cli.methods.training import Cost, Features, TrainedWeights, TrainingInputs, count_passes
from dsg_cli.models.language_model import LoadedModel, context_length
from dsg_cli.models.sae import load_encoder
from dsg_cli.models.sae_slice import slice_sae
from dsg_cli.settings import CorporaSection, Recipe
from dsg_cli.stages.inputs import chain_sae, identify, load_whole, read_method_inputs, taken_from
from dsg_cli.stages.stage import QUIET, RunOptions, settle, stage
from dsg_cli.workspace.artifacts import FeatureSet, ModelWeights
from dsg_cli.workspace.body import Json
from dsg_cli.workspace.files import Content
from dsg_cli.workspace.provenance import Clock
from dsg_cli.workspace.store import Stored, Workspace


def run(
    recipe: Recipe, workspace: Workspace, method: str, *, origin: Stored | None = None, options: RunOptions = QUIET
) -> Stored:
    """Change the weights of a model by a method, and write them.

    `origin` is features (which a method that an SAE guides must have) or a model, whose model and corpora are taken.
    """
    if options.workers.n > 1:
        raise DsgError(f"{method} trains in one process.", "Run dsg apply without torchrun.")
    clock, kind, settings = Clock(), METHODS[method], getattr(recipe.methods, section_of(method))
    recipe = taken_from(recipe, origin)
    if kind.finetunes:
        recipe = dataclasses.replace(recipe, corpora=CorporaSection(limit=settings.limit))
    inputs = read_method_inputs(recipe, workspace, method, origin)
    workspace.check_writable()
    recipe = settle(recipe)
    # Weights and what is added to them are float32, whatever the model is run in later.
    loaded = load_whole(inputs, recipe, dtype="float32")
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, dtype="float32"))
    features = origin if kind.needs_sae else None
    cost = Cost()
    header_settings: Json = {
        "method": method,
        **dataclasses.asdict(settings),
        **inputs.described(),
        "limit": recipe.corpora.limit,
    }
    with stage(
        "model",
        recipe,
        workspace,
        options,
        clock,
        header_settings,
        inputs=inputs.artifacts,
        model=identify(loaded, loaded.n_layers - 1),
        sae=features.header.sae if features is not None else None,
        notes=inputs.notes,
    ) as this:
        if this.existing:
            return this.existing
        with count_passes(loaded.model, cost):
            device, bos = str(loaded.model.device), inputs.bos
            longest = min(settings.max_tokens, context_length(loaded.model.config))
            encoding: Json = {"bos": bos, "max_tokens": longest, "device": device}
            if kind.finetunes:
                forget = retain = finetune_rows(loaded.tokenizer, inputs.corpora["train"], settings, **encoding)
            else:
                forget, retain = (
                    training_rows(loaded.tokenizer, inputs.corpora[role], **encoding) for role in ("forget", "retain")
                )
            training_inputs = TrainingInputs(loaded.model, forget, retain, seed=recipe.seed, job=this.job)
            if features is not None:
                sae_features = features_of(recipe, workspace, method, features, device=device)
                training_inputs = dataclasses.replace(training_inputs, features=sae_features)
            if method == "sae-representation":
                # Entities that do not exist: in the texts of a file, or in forget text in the place of its names.
                file = recipe.methods.sae_representation.unknown_file
                unknown = (
                    unknown_rows(loaded.tokenizer, read_prompts((), Path(file)), bos=bos, like=forget)
                    if file
                    else find_name_spans(loaded.tokenizer, forget, bos=bos, seed=recipe.seed)
                )
                training_inputs = dataclasses.replace(training_inputs, unknown=unknown)
            trained: TrainedWeights = load_method(method)(training_inputs, settings)
        notes = []
        if trained.diverged_at is not None:
            notes.append(
                f"Training diverged at step {trained.diverged_at}: its loss was not finite. The weights are those "
                f"after step {trained.kept_at}. Lower the learning rate."
            )
        with tempfile.TemporaryDirectory(prefix=".weights-", suffix=".tmp", dir=workspace.folder) as scratch:
            model = save(loaded, trained, Path(scratch), base=inputs.model, dtype=settings.save_dtype)
            identity = identify(dataclasses.replace(loaded, model=model), loaded.n_layers - 1)
            body = ModelWeights(
                method=method,
                form="adapter" if trained.adapter is not None else "whole",
                # Where it lies follows from the artifact's own place.
                result=identity.replace(source=""),
                trained={
                    "n_parameters": trained.n_parameters,
                    "n_changed": trained.n_changed,
                    "modules": sorted({name.rpartition(".")[0] for name in trained.names}),
                    **({"corpora": [corpus.name for corpus in inputs.corpora["train"]]} if kind.finetunes else {}),
                },
                losses=trained.losses,
                diverged_at=trained.diverged_at,
                cost=cost.as_json(),
                features=[feature["index"] for feature in features.json["features"]] if features is not None else [],
                special_ids=list(special_ids(loaded.tokenizer)),
                bos=bos,
                forget=inputs.names["forget"],
                retain=inputs.names["retain"],
            )
            files: dict[str, Content] = {
                path.relative_to(scratch).as_posix(): path
                for path in sorted(Path(scratch).rglob("*"))
                if path.is_file()
            }
            return this.write(body, n_tokens=cost.forward_tokens, notes=notes, folder=files)


def features_of(recipe: Recipe, workspace: Workspace, method: str, features: Stored, *, device: str) -> Features:
    """The SAE of a features artifact, and what its statistics say of it."""
    sae = chain_sae(features)
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
    return Features(sae.site, load_encoder(sae, device=device), *rows)


def save(loaded: LoadedModel, trained: TrainedWeights, folder: Path, *, base: str, dtype: str) -> Any:
    """Write what was trained, as transformers or PEFT read it; the trained model, without adapters in it.

    `base` is the model that it was made from, by its name; `dtype` is of a whole model's weights.
    """
    if trained.adapter is None:
        model = loaded.model.to(getattr(torch, dtype))
        model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        return model
    config = trained.adapter.peft_config["default"]
    config.base_model_name_or_path, _, revision = base.partition("@")
    config.revision = revision or None
    trained.adapter.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # A form to fill in.
    return trained.adapter.merge_and_unload().requires_grad_(False).eval()
