"""`dsg select`: which features carry the knowledge that is to be forgotten?

Reads the `select` split of the forget and retain corpora through the model's layers up to the SAE's hook and the whole
SAE, once; ranks the features (arXiv 2504.08192, section 4); writes features-NNN. Features that are picked by their
descriptions or by hand need no forget corpus: then only retain text is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsg_cli.data.batches import TokenBatch, estimated_tokens, stream_batches
from dsg_cli.data.corpora import Corpus, check_disjoint, check_named, check_no_shared_texts, load_corpora
from dsg_cli.data.tokens import bos_to_prepend, check_chat, prompts
from dsg_cli.errors import DsgError
from dsg_cli.guardrail.probe import candidates, fit_probe, sampled_activations
from dsg_cli.guardrail.selection import formatting_notes, picked_features, select_features
from dsg_cli.guardrail.statistics import CHUNK_TOKENS, FeatureStatistics, feature_statistics, mix
from dsg_cli.inspection.descriptions import (
    Candidates,
    Match,
    rank_by_embedding,
    rank_by_terms,
    read_descriptions,
    unmatched,
)
from dsg_cli.inspection.neuronpedia import INSTEAD, fetch_descriptions, place_of
from dsg_cli.job import Job
from dsg_cli.models.language_model import (
    LoadedModel,
    context_length,
    load_model,
    load_tokenizer,
    read_config,
    text_config,
)
from dsg_cli.models.sae import SaeSource, check_fits, check_name, load_encoder, read_sae
from dsg_cli.models.sae_slice import load_slice
from dsg_cli.settings import Recipe, SelectSection
from dsg_cli.stages.inputs import check_world, identify, named_model
from dsg_cli.stages.stage import QUIET, RunOptions, settle, stage
from dsg_cli.workspace.artifacts import FeatureSet, SaeIdentity
from dsg_cli.workspace.body import Json
from dsg_cli.workspace.provenance import Clock
from dsg_cli.workspace.store import Stored, Workspace


def run(
    recipe: Recipe,
    workspace: Workspace,
    *,
    options: RunOptions = QUIET,
    ranked: Callable[[Candidates], Any] = lambda _: None,
) -> Stored:
    """Select features and write them; `ranked` is called with what is picked without text, before any text is read."""
    clock = Clock()
    with options.workers.in_turn():
        inputs = read_inputs(recipe, workspace, options=options)
    recipe, described = inputs.recipe, inputs.described
    if inputs.candidates is not None:
        ranked(inputs.candidates)
    header_settings: Json = {
        **dataclasses.asdict(recipe.select),
        **({"descriptions_sha256": described["sha256"]} if described else {}),
        **{role: [corpus.described() for corpus in corpora] for role, corpora in inputs.corpora.items()},
        "limit": recipe.corpora.limit,
    }
    with stage(
        "features",
        recipe,
        workspace,
        options,
        clock,
        header_settings,
        inputs=inputs.models,
        model=identify(inputs.loaded, inputs.sae.site.layer),
        sae=inputs.sae.identity,
        notes=inputs.notes,
    ) as this:
        if this.existing:
            return this.existing
        cache = PassCache()
        features, tensors, notes = select(inputs, recipe.select, this.job, cache, keeps_residuals=False)
        n_tokens = features.forget_tokens + features.retain_tokens
        return this.write(features, n_tokens=n_tokens, notes=notes, tensors=tensors)


def is_picked(settings: SelectSection) -> bool:
    """Whether features are picked without text."""
    return settings.describe is not None or bool(settings.features)


@dataclass(frozen=True)
class SelectionInputs:
    """What features are selected from."""

    recipe: Recipe
    """Settled."""
    models: list[Stored]
    """The artifact whose weights the model has, if it is one."""
    loaded: LoadedModel
    sae: SaeSource
    corpora: dict[str, list[Corpus]]
    """forget and retain; features that are picked need no forget corpus."""
    seq_len: int
    candidates: Candidates | None
    """Features that are picked without any text."""
    notes: list[str]

    @property
    def described(self) -> Json:
        """What descriptions the features were picked by; empty if by none."""
        return self.candidates.described if self.candidates is not None else {}

    @property
    def bos(self) -> int | None:
        return bos_to_prepend(self.loaded.tokenizer, self.sae.identity.prepend_bos)


def read_inputs(
    recipe: Recipe, workspace: Workspace, *, loaded: LoadedModel | None = None, options: RunOptions = QUIET
) -> SelectionInputs:
    """Everything checked and read; the model too, unless it has been loaded already."""
    names, settings = recipe.corpora, recipe.select
    if names.forget or not is_picked(settings):
        check_named(names.forget, role="forget")
    check_named(names.retain, role="retain")
    check_disjoint(names.forget, names.retain)
    check_world(recipe, [*names.forget, *names.retain])
    workspace.check_writable()
    check_name(recipe.sae.source)
    recipe = settle(recipe)
    models = [workspace.find("model", recipe.model.source)] if recipe.model.source.startswith("model-") else []
    recipe = replace(recipe, model=replace(recipe.model, source=named_model(workspace, recipe.model.source)))
    model_config = text_config(read_config(recipe.model.source, recipe.model))
    tokenizer = load_tokenizer(recipe.model.source, recipe.model)
    # Small before large: gated text is found before an SAE of gigabytes is fetched.
    forget = load_corpora(names.forget, role="forget", limit=names.limit, seed=recipe.seed) if names.forget else []
    retain = load_corpora(names.retain, role="retain", limit=names.limit, seed=recipe.seed)
    check_no_shared_texts(forget, retain)
    check_chat(tokenizer, [*forget, *retain])
    sae = read_sae(recipe.sae.source)
    notes = check_fits(sae, model_config, recipe.model.source, has_bos=tokenizer.bos_token_id is not None)
    if not settings.features and settings.n_features > sae.identity.n_features:
        raise DsgError(
            f"{settings.n_features} features were asked for; the SAE has {sae.identity.n_features}.",
            "Choose another number with -n.",
        )
    candidates = find_candidates(recipe, sae.identity, options)
    return SelectionInputs(
        recipe=recipe,
        models=models,
        loaded=loaded or load_model(recipe.model.source, recipe.model, last_layer=sae.site.layer),
        sae=sae,
        corpora={"forget": forget, "retain": retain},
        seq_len=min(settings.seq_len, context_length(model_config)),
        candidates=candidates,
        notes=[*notes, *(candidates.notes if candidates is not None else [])],
    )


KEPT = 1000
"""Of a ranking, the best that an artifact names."""


def find_candidates(recipe: Recipe, sae: SaeIdentity, options: RunOptions) -> Candidates | None:
    """What the settings pick by hand or by description; None if forget text says which features to take."""
    settings = recipe.select
    if settings.features:
        beyond = [j for j in settings.features if j >= sae.n_features]
        if beyond:
            raise DsgError(f"The SAE has {sae.n_features:,} features; there is no {beyond[0]}.", "Check the list.")
        return Candidates([Match(j, 0.0) for j in settings.features], {}, {}, [])
    query = settings.describe
    if query is None:
        return None
    if settings.descriptions is not None:
        descriptions = read_descriptions(Path(settings.descriptions), sae.n_features)
    else:
        name = place_of(sae.source)
        if name is None:
            raise DsgError(f"Nobody is known to have described the features of {sae.source}.", INSTEAD)
        path = fetch_descriptions(name, sae.n_features, report=options.report)
        descriptions = read_descriptions(path, sae.n_features, source=f"neuronpedia:{name}")
    notes: list[str] = []
    if settings.embedding is None:
        ranking, ranker = rank_by_terms(query, descriptions.texts), "bm25"
        if missing := unmatched(query, descriptions.texts.values()):
            notes.append(f"No description has the word {' or '.join(missing)}.")
    else:
        ranker = f"embedding {settings.embedding}"
        ranking = rank_by_embedding(
            query, descriptions.texts, settings.embedding, device=recipe.model.device, report=options.report
        )
    rows: list[Json] = [{"index": match.index, "score": match.score} for match in ranking[:KEPT]]
    if settings.samples:
        rows = [row | {"description": descriptions.texts[row["index"]]} for row in rows]
    described: Json = {
        "query": query,
        "ranker": ranker,
        "source": descriptions.source,
        "sha256": descriptions.sha256,
        "n_matched": len(ranking),
        "ranking": rows,
    }
    return Candidates(ranking, descriptions.texts, described, notes)


@dataclass(frozen=True)
class PassCache:
    """What passes over corpora have computed, by all that it depends on beside the model."""

    statistics: dict[object, FeatureStatistics] = field(default_factory=dict)
    residuals: dict[object, Tensor] = field(default_factory=dict)
    """Of sampled retain tokens, [T, D] on the CPU."""


def select(
    inputs: SelectionInputs, settings: SelectSection, job: Job, cache: PassCache, *, keeps_residuals: bool
) -> tuple[FeatureSet, dict[str, Tensor], list[str]]:
    """Features and probe, the statistics of every feature of the SAE, and notes.

    `cache` has what earlier calls with the same model computed; `keeps_residuals` if further calls will fit probes on
    the same retain text.
    """
    encoder = load_encoder(inputs.sae, device=str(inputs.loaded.model.device))
    by_role: dict[str, list[FeatureStatistics]] = {role: [] for role in inputs.corpora}
    for role, corpora in inputs.corpora.items():
        for corpus in corpora:
            key = _pass_key(inputs, settings, role, corpus)
            if key not in cache.statistics:
                cache.statistics[key] = feature_statistics(
                    inputs.loaded.model,
                    inputs.sae.site,
                    encoder,
                    _batches(inputs, settings, role, corpus),
                    total_tokens=estimated_tokens(corpus.part("select"), _max_tokens(inputs, settings, role)),
                    job=job.named(f"{role} corpus {corpus.name.rsplit('/', 1)[-1]}"),
                )
            by_role[role].append(cache.statistics[key])
    mixed = {
        role: mix(statistics, [corpus.weight for corpus in inputs.corpora[role]])
        for role, statistics in by_role.items()
        if statistics
    }
    retain = mixed["retain"]
    scores = {role: statistics.score(settings.score) for role, statistics in mixed.items()}
    if inputs.candidates is None:
        selection = select_features(
            scores["forget"],
            scores["retain"],
            n_features=settings.n_features,
            ratio_percentile=settings.ratio_percentile,
        )
    else:
        selection = picked_features(
            inputs.candidates.indices,
            scores.get("forget"),
            scores["retain"],
            retain.rate_F,
            n_features=settings.n_features if inputs.described else None,
            max_retain_rate=settings.max_retain_rate,
        )
    features = FeatureSet(
        features=selection.features,
        score=settings.score,
        ratio_cut=selection.ratio_cut,
        forget_cut=selection.forget_cut,
        percentiles_over=selection.percentiles_over,
        n_live=selection.n_live,
        n_passed=selection.n_passed,
        forget_tokens=mixed["forget"].n_tokens if "forget" in mixed else 0,
        retain_tokens=retain.n_tokens,
        median_residual_norm=retain.median_residual_norm,
        probe=_probe(inputs, settings, mixed, by_role, job, cache.residuals if keeps_residuals else None),
        described=inputs.described,
    )
    tensors = {name: tensor for role in mixed for name, tensor in mixed[role].tensors(role).items()}
    notes = list(selection.notes)
    of_retain = list(zip(inputs.corpora["retain"], by_role["retain"], strict=True))
    chat, plain = ([stats for corpus, stats in of_retain if corpus.is_chat == is_chat] for is_chat in (True, False))
    if chat and plain:
        chat_F, plain_F = (mix(statistics, [None] * len(statistics)).rate_F for statistics in (chat, plain))
        notes += formatting_notes(chat_F, plain_F, [feature.index for feature in selection.features])
    return features, tensors, notes


def _pass_key(inputs: SelectionInputs, settings: SelectSection, role: str, corpus: Corpus) -> tuple[object, ...]:
    """What a pass over a corpus depends on; where the corpus is read whole, not on how much may be read."""
    n_bytes = sum(len(text.encode()) for text in corpus.texts)  # No token has less than one.
    at_most = min(_max_tokens(inputs, settings, role), n_bytes)
    return (inputs.sae.identity, corpus.name, corpus.sha256, at_most, inputs.seq_len, settings.rows)


def _max_tokens(inputs: SelectionInputs, settings: SelectSection, role: str) -> int:
    return settings.max_rows * inputs.seq_len // len(inputs.corpora[role])


def _batches(inputs: SelectionInputs, settings: SelectSection, role: str, corpus: Corpus) -> Iterator[TokenBatch]:
    """The `select` split of one corpus."""
    return stream_batches(
        inputs.loaded.tokenizer,
        prompts(inputs.loaded.tokenizer, corpus, "select"),
        bos=inputs.bos,
        seq_len=inputs.seq_len,
        max_tokens=_max_tokens(inputs, settings, role),
        is_packed=settings.rows == "packed",
        device=str(inputs.loaded.model.device),
    )


def _probe(
    inputs: SelectionInputs,
    settings: SelectSection,
    mixed: dict[str, FeatureStatistics],
    by_role: dict[str, list[FeatureStatistics]],
    job: Job,
    residuals: dict[object, Tensor] | None,
) -> Json:
    """A probe of tokens, from a second pass over a sample of the same text; nothing if none is wanted, or possible."""
    if not settings.probe_features or "forget" not in mixed:
        return {}
    indices = candidates(mixed["forget"], mixed["retain"], settings.probe_candidates)
    device = inputs.loaded.model.device
    sae_slice = load_slice(inputs.sae, indices).to(device)
    job = Job(job.workers, progress=job.progress)  # A sample is read fast: no checkpoint.

    def encode(resid_TD: Tensor) -> Tensor:
        return sae_slice(resid_TD).acts.abs()

    samples: dict[str, list[Tensor]] = {role: [] for role in inputs.corpora}
    for role, corpora in inputs.corpora.items():
        for corpus, statistics in zip(corpora, by_role[role], strict=True):
            sample = partial(
                sampled_activations,
                inputs.loaded.model,
                inputs.sae.site,
                batches=_batches(inputs, settings, role, corpus),
                total_tokens=statistics.n_tokens,
                n_tokens=max(1, settings.probe_tokens // 2 // len(corpora)),
                job=job.named(f"probe, {role} corpus {corpus.name.rsplit('/', 1)[-1]}"),
            )
            if residuals is None or role == "forget":
                samples[role].append(sample(encode, len(indices)))
                continue
            # Other forget text asks for other features of the same retain text, whose residuals are kept.
            key = (_pass_key(inputs, settings, role, corpus), settings.probe_tokens, len(corpora))
            if key not in residuals:
                residuals[key] = sample(Tensor.float, inputs.sae.identity.width)
            chunks = torch.split(residuals[key], CHUNK_TOKENS)
            samples[role].append(torch.cat([encode(resid_TD.to(device)).cpu() for resid_TD in chunks]))
    weights = [1.0 if corpus.weight is None else corpus.weight for corpus in inputs.corpora["retain"]]
    return fit_probe(
        torch.cat(samples["forget"]),
        samples["retain"],
        weights,
        indices,
        n_features=settings.probe_features,
        ridge=settings.probe_ridge,
        job=job,
    ).as_json()
