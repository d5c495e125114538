"""`dsg select`: which features carry the knowledge that is to be forgotten?

Reads the `select` part of the forget and retain corpora through the model's layers up to the SAE's hook and the
whole SAE, once; ranks the features (METHOD, steps 1 to 4); writes features-NNN. Features that are picked by their
descriptions or by hand need no forget corpus (METHOD, step 10): then only retain text is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
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
from dsg_cli.guardrail.selection import Selection, formatting_notes, picked_features, select_features
from dsg_cli.guardrail.statistics import CHUNK_TOKENS, FeatureStatistics, feature_statistics, mix
from dsg_cli.inspection.descriptions import (
    Candidates,
    Descriptions,
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
from dsg_cli.stages.stage import QUIET, RunOptions, new_header, settle
from dsg_cli.workspace.artifacts import FeatureSet, Header, SaeIdentity
from dsg_cli.workspace.checkpoints import Checkpoint
from dsg_cli.workspace.provenance import Clock
from dsg_cli.workspace.results import Json
from dsg_cli.workspace.store import Stored, Workspace

KEPT = 1000
"""Of a ranking, the best that an artifact names."""


def is_picked(settings: SelectSection) -> bool:
    """Whether features are picked without text."""
    return settings.describe is not None or bool(settings.features)


def find_candidates(recipe: Recipe, sae: SaeIdentity, options: RunOptions) -> Candidates | None:
    """What the settings pick; None if forget text says which features to take.

    Args:
        recipe: Its selection, and the device for an embedding model.
        sae: Whose features they are.
        options: Who downloads, and progress.
    """
    settings = recipe.select
    if settings.features:
        beyond = [j for j in settings.features if j >= sae.n_features]
        if beyond:
            raise DsgError(f"The SAE has {sae.n_features:,} features; there is no {beyond[0]}.", "Check the list.")
        return Candidates([Match(j, 0.0) for j in settings.features], {}, {}, [])
    if settings.describe is None:
        return None
    found = _descriptions(settings, sae, options)
    if settings.embedding is None:
        ranking = rank_by_terms(settings.describe, found.texts)
        ranker, missing = "bm25", unmatched(settings.describe, found.texts.values())
    else:
        ranking = rank_by_embedding(
            settings.describe, found.texts, settings.embedding, device=recipe.model.device, report=options.report
        )
        ranker, missing = f"embedding {settings.embedding}", []
    rows: list[Json] = [{"index": match.index, "score": match.score} for match in ranking[:KEPT]]
    if settings.samples:
        rows = [row | {"description": found.texts[row["index"]]} for row in rows]
    said: Json = {"query": settings.describe, "ranker": ranker, "source": found.source, "sha256": found.sha256}
    said["n_matched"] = len(ranking)
    notes = [f"No description has the word {' or '.join(missing)}."] if missing else []
    return Candidates(ranking, found.texts, said | {"ranking": rows}, notes)


def _descriptions(settings: SelectSection, sae: SaeIdentity, options: RunOptions) -> Descriptions:
    """From the file that is named, or else Neuronpedia's."""
    if settings.descriptions is not None:
        return read_descriptions(Path(settings.descriptions), sae.n_features)
    name = place_of(sae.source)
    if name is None:
        raise DsgError(f"Nobody is known to have described the features of {sae.source}.", INSTEAD)
    path = fetch_descriptions(name, sae.n_features, report=options.report)
    return read_descriptions(path, sae.n_features, source=f"neuronpedia:{name}")


@dataclass(frozen=True)
class Prepared:
    """All that the pass needs."""

    loaded: LoadedModel
    sae: SaeSource
    corpora: dict[str, list[Corpus]]
    header: Header
    seq_len: int
    candidates: Candidates | None = None
    """Features that are picked without any text; then there may be no forget corpus."""


Parts = dict[str, list[FeatureStatistics]]
"""Role -> the statistics of each of its corpora."""


@dataclass(frozen=True)
class Remembered:
    """What earlier passes found of corpora, by all that it depends on beside the model."""

    statistics: dict[object, FeatureStatistics] = field(default_factory=dict)
    residuals: dict[object, Tensor] = field(default_factory=dict)
    """Of sampled retain tokens, [T, D] on the CPU."""


@dataclass(frozen=True)
class Selected:
    """What a pass over the corpora found."""

    body: FeatureSet
    tensors: dict[str, Tensor]
    """Statistics of every feature of the SAE."""
    parts: Parts
    notes: tuple[str, ...] = ()
    """On the choice."""


def selected(
    made: Prepared,
    settings: SelectSection,
    options: RunOptions,
    checkpoint: Checkpoint,
    *,
    remembered: Remembered | None = None,
) -> Selected:
    """Statistics, features and probe.

    Args:
        made: From `prepared`.
        settings: Of the selection.
        options: How it is run.
        checkpoint: Where the pass goes on from, and is kept.
        remembered: What earlier calls found of the same corpora by the same SAE.
    """
    parts = _statistics(made, settings, options, checkpoint, remembered or Remembered())
    statistics = {
        role: mix(of_role, [corpus.weight for corpus in made.corpora[role]])
        for role, of_role in parts.items()
        if of_role
    }
    selection = _selection(made.candidates, settings, statistics)
    body = FeatureSet(
        features=selection.features,
        score=settings.score,
        ratio_cut=selection.ratio_cut,
        forget_cut=selection.forget_cut,
        percentiles_over=selection.percentiles_over,
        n_live=selection.n_live,
        n_passed=selection.n_passed,
        forget_tokens=statistics["forget"].n_tokens if "forget" in statistics else 0,
        retain_tokens=statistics["retain"].n_tokens,
        median_residual_norm=statistics["retain"].median_residual_norm,
        probe=_probe(made, settings, statistics, parts, options, remembered),
        described=made.candidates.described if made.candidates is not None else {},
    )
    tensors = {name: tensor for role in statistics for name, tensor in statistics[role].tensors(role).items()}
    return Selected(body, tensors, parts, selection.notes)


def _selection(
    candidates: Candidates | None, settings: SelectSection, statistics: dict[str, FeatureStatistics]
) -> Selection:
    """By forget text, unless the features are picked without it."""
    retain = statistics["retain"]
    scores = {role: of_role.score(settings.score) for role, of_role in statistics.items()}
    if candidates is None:
        return select_features(
            scores["forget"],
            scores["retain"],
            n_features=settings.n_features,
            ratio_percentile=settings.ratio_percentile,
        )
    return picked_features(
        candidates.indices,
        scores.get("forget"),
        scores["retain"],
        retain.rate_F,
        n_features=settings.n_features if candidates.described else None,
        max_retain_rate=settings.max_retain_rate,
    )


def _statistics(
    made: Prepared, settings: SelectSection, options: RunOptions, checkpoint: Checkpoint, remembered: Remembered
) -> Parts:
    """From one pass over each corpus's `select` part, but for those that are remembered."""
    encoder = load_encoder(made.sae, device=str(made.loaded.model.device))
    parts: Parts = {role: [] for role in made.corpora}
    job = Job(options.workers, checkpoint, options.report)
    for role, several in made.corpora.items():
        for corpus in several:
            at_most = _max_tokens(made, settings, role)
            key = _key(made, settings, role, corpus)
            if key not in remembered.statistics:
                remembered.statistics[key] = feature_statistics(
                    made.loaded.model,
                    made.sae.site,
                    encoder,
                    _batches(made, settings, role, corpus),
                    total_tokens=estimated_tokens(corpus.part("select"), at_most),
                    job=job.named(f"{role} corpus {corpus.name.rsplit('/', 1)[-1]}"),
                )
            parts[role].append(remembered.statistics[key])
    return parts


def _key(made: Prepared, settings: SelectSection, role: str, corpus: Corpus) -> tuple[object, ...]:
    """What a pass over a corpus depends on; where the corpus is read whole, not on how much may be read."""
    n_bytes = sum(len(text.encode()) for text in corpus.texts)  # No token has less than one.
    at_most = min(_max_tokens(made, settings, role), n_bytes)
    return (made.sae.identity, corpus.name, corpus.sha256, at_most, made.seq_len, settings.rows)


def _max_tokens(made: Prepared, settings: SelectSection, role: str) -> int:
    return settings.max_rows * made.seq_len // len(made.corpora[role])


def _batches(made: Prepared, settings: SelectSection, role: str, corpus: Corpus) -> Iterator[TokenBatch]:
    """The `select` part of one corpus."""
    return stream_batches(
        made.loaded.tokenizer,
        prompts(made.loaded.tokenizer, corpus, "select"),
        bos=bos_to_prepend(made.loaded.tokenizer, made.sae.identity.prepend_bos),
        seq_len=made.seq_len,
        max_tokens=_max_tokens(made, settings, role),
        is_packed=settings.rows == "packed",
        device=str(made.loaded.model.device),
    )


def _probe(
    made: Prepared,
    settings: SelectSection,
    mixed: dict[str, FeatureStatistics],
    parts: Parts,
    options: RunOptions,
    remembered: Remembered | None,
) -> Json:
    """A probe of tokens, from a second pass over a sample of the same text; nothing if none is wanted, or possible."""
    if not settings.probe_features or "forget" not in mixed:
        return {}
    indices = candidates(mixed["forget"], mixed["retain"], settings.probe_candidates)
    watched = load_slice(made.sae, indices).to(made.loaded.model.device)

    def encode(resid_TD: Tensor) -> Tensor:
        return watched(resid_TD).acts.abs()

    job = Job(options.workers, progress=options.report)
    found: dict[str, list[Tensor]] = {}
    for role, several in made.corpora.items():
        found[role] = []
        for corpus, statistics in zip(several, parts[role], strict=True):
            sample = partial(
                sampled_activations,
                made.loaded.model,
                made.sae.site,
                batches=_batches(made, settings, role, corpus),
                total_tokens=statistics.n_tokens,
                n_tokens=max(1, settings.probe_tokens // 2 // len(several)),
                job=job.named(f"probe, {role} corpus {corpus.name.rsplit('/', 1)[-1]}"),
            )
            if remembered is None or role == "forget":
                found[role].append(sample(encode, len(indices)))
                continue
            # Other forget text asks for other features of the same retain text, whose residuals are kept.
            key = (_key(made, settings, role, corpus), settings.probe_tokens, len(several))
            if key not in remembered.residuals:
                remembered.residuals[key] = sample(Tensor.float, made.sae.identity.width)
            device = made.loaded.model.device
            chunks = [
                encode(resid_TD.to(device)).cpu() for resid_TD in torch.split(remembered.residuals[key], CHUNK_TOKENS)
            ]
            found[role].append(torch.cat(chunks))
    shares = [1.0 if corpus.weight is None else corpus.weight for corpus in made.corpora["retain"]]
    return fit_probe(
        torch.cat(found["forget"]),
        found["retain"],
        shares,
        indices,
        n_features=settings.probe_features,
        ridge=settings.probe_ridge,
        job=job,
    ).as_json()


def run(
    recipe: Recipe,
    workspace: Workspace,
    *,
    options: RunOptions = QUIET,
    ranked: Callable[[Candidates], Any] = lambda _: None,
) -> Stored:
    """Select features and write them.

    Args:
        recipe: Model, SAE, corpora and settings.
        workspace: Where they go.
        options: How it is run.
        ranked: Called with what is picked without text, before any text is read.
    """
    clock = Clock()
    with options.workers.in_turn():
        made = prepared(recipe, workspace, options=options)
    if made.candidates is not None:
        ranked(made.candidates)
    if (stored := options.existing(workspace, made.header)) is not None:
        return stored
    with options.checkpoint(workspace, made.header) as checkpoint:
        found = selected(made, recipe.select, options, checkpoint)
        header = _noted(made, found)
        n_tokens = found.body.forget_tokens + found.body.retain_tokens
        closed = clock.close(header, n_tokens=n_tokens)
        return options.write(workspace, lambda: workspace.write(closed, found.body, tensors=found.tensors))


def prepared(
    recipe: Recipe, workspace: Workspace, *, loaded: LoadedModel | None = None, options: RunOptions = QUIET
) -> Prepared:
    """Everything checked and read.

    Args:
        recipe: Model, SAE, corpora and settings.
        workspace: Where models that are artifacts are.
        loaded: The model, if it has been loaded already.
        options: How it is run.
    """
    names = recipe.corpora
    if names.forget or not is_picked(recipe.select):
        check_named(names.forget, role="forget")
    check_named(names.retain, role="retain")
    check_disjoint(names.forget, names.retain)
    check_world(recipe)
    workspace.check_writable()
    check_name(recipe.sae.source)
    recipe = settle(recipe)
    changed = [workspace.find("model", recipe.model.source)] if recipe.model.source.startswith("model-") else []
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
    if not recipe.select.features and recipe.select.n_features > sae.identity.n_features:
        raise DsgError(
            f"{recipe.select.n_features} features were asked for; the SAE has {sae.identity.n_features}.",
            "Choose another number with -n.",
        )
    candidates = find_candidates(recipe, sae.identity, options)
    loaded = loaded or load_model(recipe.model.source, recipe.model, last_layer=sae.site.layer)
    header = new_header(
        "features",
        recipe,
        settings=_settings(recipe, forget, retain, candidates),
        model=identify(loaded, sae.site.layer),
        sae=sae.identity,
        inputs=changed,
        notes=[*notes, *(candidates.notes if candidates is not None else [])],
    )
    seq_len = min(recipe.select.seq_len, context_length(model_config))
    return Prepared(loaded, sae, {"forget": forget, "retain": retain}, header, seq_len, candidates)


def _settings(
    recipe: Recipe, forget: Sequence[Corpus], retain: Sequence[Corpus], candidates: Candidates | None
) -> Json:
    described = candidates.described if candidates is not None else {}
    return {
        **dataclasses.asdict(recipe.select),
        **({"descriptions_sha256": described["sha256"]} if described else {}),
        "forget": [corpus.described() for corpus in forget],
        "retain": [corpus.described() for corpus in retain],
        "limit": recipe.corpora.limit,
    }


def _noted(made: Prepared, found: Selected) -> Header:
    """The header with what a person should know of the choice, and of the features: which look like formatting."""
    together = list(zip(made.corpora["retain"], found.parts["retain"], strict=True))
    chat, plain = ([one for corpus, one in together if corpus.is_chat == is_chat] for is_chat in (True, False))
    notes = [*made.header.notes, *found.notes]
    if chat and plain:
        chat_F, plain_F = (mix(several, [None] * len(several)).rate_F for several in (chat, plain))
        notes += formatting_notes(chat_F, plain_F, [feature.index for feature in found.body.features])
    return dataclasses.replace(made.header, notes=notes)
