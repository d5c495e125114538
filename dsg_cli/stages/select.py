"""`dsg select`: which features carry the knowledge that is to be forgotten?

Reads the `select` part of the forget and retain corpora through the model's layers up to the SAE's hook and the
whole SAE, once; ranks the features (METHOD, steps 1 to 4); writes features-NNN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsg_cli.artifacts import Feature, FeatureSet, Header, Json
from dsg_cli.checkpoints import Checkpoint
from dsg_cli.corpora import Corpus, check_disjoint, check_named, check_no_shared_texts, load_corpora
from dsg_cli.errors import DsgError
from dsg_cli.fit import check_fits
from dsg_cli.model import LoadedModel, context_length, load_model, load_tokenizer, read_config, text_config
from dsg_cli.probe import candidates, fit_probe, sampled_activations
from dsg_cli.prompting import check_chat, prompts
from dsg_cli.recipe import Recipe
from dsg_cli.sae import SaeSource, check_name, load_encoder, read_sae
from dsg_cli.selection import formatting_notes, select_features
from dsg_cli.settings import SelectSection
from dsg_cli.slicing import load_slice
from dsg_cli.stages.chain import identify, settle
from dsg_cli.stages.material import check_world, named_model
from dsg_cli.stages.provenance import Clock, new_header
from dsg_cli.stages.session import QUIET, Session
from dsg_cli.statistics import FeatureStatistics, feature_statistics, mix
from dsg_cli.streaming import estimated_tokens, stream_batches
from dsg_cli.tokens import TokenBatch, bos_to_prepend
from dsg_cli.workspace import Stored, Workspace


def run(recipe: Recipe, workspace: Workspace, *, session: Session = QUIET) -> Stored:
    """Select features and write them.

    Raises:
        DsgError: Anything the user can mend; all that can be known before weights are loaded, before they are.
    """
    clock = Clock()
    with session.workers.in_turn():
        made = prepared(recipe, workspace)
    if (stored := session.existing(workspace, made.header)) is not None:
        return stored
    with session.checkpoint(workspace, made.header) as checkpoint:
        found = selected(made, recipe.select, session, checkpoint)
        header = _noted(made, found.parts, found.body.features)
        n_tokens = found.body.forget_tokens + found.body.retain_tokens
        closed = clock.close(header, n_tokens=n_tokens)
        return session.write(workspace, lambda: workspace.write(closed, found.body, tensors=found.tensors))


Parts = dict[str, list[FeatureStatistics]]
"""Role -> the statistics of each of its corpora."""
Remembered = dict[tuple[object, ...], FeatureStatistics]
"""Statistics of corpora by all that they depend on, beside the model."""


@dataclass(frozen=True)
class Prepared:
    """All that the pass needs."""

    loaded: LoadedModel
    sae: SaeSource
    corpora: dict[str, list[Corpus]]
    header: Header
    seq_len: int


@dataclass(frozen=True)
class Selected:
    """What a pass over the corpora found."""

    body: FeatureSet
    tensors: dict[str, Tensor]
    """Statistics of every feature of the SAE."""
    parts: Parts


def prepared(recipe: Recipe, workspace: Workspace, *, loaded: LoadedModel | None = None) -> Prepared:
    """Everything checked and read.

    Args:
        recipe: Model, SAE, corpora and settings.
        workspace: Where models that are artifacts are.
        loaded: The model, if it has been loaded already.

    Raises:
        DsgError: Anything the user can mend; all that can be known before weights are loaded, before they are.
    """
    names = recipe.corpora
    check_named(names.forget, role="forget")
    check_named(names.retain, role="retain")
    check_disjoint(names.forget, names.retain)
    check_world(recipe)
    workspace.check_writable()
    check_name(recipe.sae.source)
    recipe = settle(recipe)
    changed = [workspace.find("model", recipe.model.source)] if recipe.model.source.startswith("model-") else []
    recipe = replace(recipe, model=replace(recipe.model, source=named_model(workspace, recipe.model.source)))
    model_config = text_config(read_config(recipe.model.source, trust_remote_code=recipe.model.trust_remote_code))
    tokenizer = load_tokenizer(recipe.model.source, trust_remote_code=recipe.model.trust_remote_code)
    # Small before large: gated text is found before an SAE of gigabytes is fetched.
    forget = load_corpora(names.forget, role="forget", limit=names.limit, seed=recipe.seed)
    retain = load_corpora(names.retain, role="retain", limit=names.limit, seed=recipe.seed)
    check_no_shared_texts(forget, retain)
    check_chat(tokenizer, [*forget, *retain])
    sae = read_sae(recipe.sae.source)
    notes = check_fits(sae, model_config, recipe.model.source, has_bos=tokenizer.bos_token_id is not None)
    if recipe.select.n_features > sae.identity.n_features:
        raise DsgError(
            f"{recipe.select.n_features} features were asked for; the SAE has {sae.identity.n_features}.",
            "Choose another number with -n.",
        )

    loaded = loaded or load_model(
        recipe.model.source,
        device=recipe.model.device,
        dtype=recipe.model.dtype,
        last_layer=sae.site.layer,
        device_map=recipe.model.device_map,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    header = new_header(
        "features",
        recipe,
        settings=_settings(recipe, forget, retain),
        model=identify(loaded, sae.site.layer),
        sae=sae.identity,
        inputs=changed,
        notes=notes,
    )
    seq_len = min(recipe.select.seq_len, context_length(model_config))
    return Prepared(loaded, sae, {"forget": forget, "retain": retain}, header, seq_len)


def _settings(recipe: Recipe, forget: Sequence[Corpus], retain: Sequence[Corpus]) -> Json:
    return {
        **dataclasses.asdict(recipe.select),
        "forget": [corpus.described() for corpus in forget],
        "retain": [corpus.described() for corpus in retain],
        "limit": recipe.corpora.limit,
    }


def selected(
    made: Prepared,
    settings: SelectSection,
    session: Session,
    checkpoint: Checkpoint,
    *,
    remembered: Remembered | None = None,
) -> Selected:
    """Statistics, features and probe.

    Args:
        made: From `prepared`.
        settings: Of the selection.
        session: How it is run.
        checkpoint: Where the pass goes on from, and is kept.
        remembered: What earlier calls found of the same corpora by the same SAE.

    Raises:
        DsgError: Too few features pass, or an activation is not finite.
    """
    parts = _statistics(made, settings, session, checkpoint, {} if remembered is None else remembered)
    statistics = {
        role: mix(of_role, [corpus.weight for corpus in made.corpora[role]]) for role, of_role in parts.items()
    }
    selection = select_features(
        statistics["forget"].score(settings.score),
        statistics["retain"].score(settings.score),
        n_features=settings.n_features,
        ratio_percentile=settings.ratio_percentile,
    )
    body = FeatureSet(
        features=selection.features,
        score=settings.score,
        ratio_cut=selection.ratio_cut,
        forget_cut=selection.forget_cut,
        percentiles_over=selection.percentiles_over,
        n_live=selection.n_live,
        n_passed=selection.n_passed,
        forget_tokens=statistics["forget"].n_tokens,
        retain_tokens=statistics["retain"].n_tokens,
        median_residual_norm=statistics["retain"].median_residual_norm,
        probe=_probe(made, settings, statistics, parts, session),
    )
    tensors = {name: tensor for role in statistics for name, tensor in statistics[role].tensors(role).items()}
    return Selected(body, tensors, parts)


def _statistics(
    made: Prepared, settings: SelectSection, session: Session, checkpoint: Checkpoint, remembered: Remembered
) -> Parts:
    """From one pass over each corpus's `select` part, but for those that are remembered."""
    encoder = load_encoder(made.sae, device=str(made.loaded.model.device))
    parts: Parts = {role: [] for role in made.corpora}
    for role, several in made.corpora.items():
        for corpus in several:
            at_most = _max_tokens(made, settings, role)
            key = (made.sae.identity, corpus.name, corpus.sha256, at_most, made.seq_len, settings.rows)
            if key not in remembered:
                remembered[key] = feature_statistics(
                    made.loaded.model,
                    made.sae.site,
                    encoder,
                    _batches(made, settings, role, corpus),
                    total_tokens=estimated_tokens(corpus.part("select"), at_most),
                    what=f"{role} corpus {corpus.name.rsplit('/', 1)[-1]}",
                    workers=session.workers,
                    checkpoint=checkpoint,
                    report=session.report,
                )
            parts[role].append(remembered[key])
    return parts


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
    made: Prepared, settings: SelectSection, mixed: dict[str, FeatureStatistics], parts: Parts, session: Session
) -> Json:
    """A probe of tokens, from a second pass over a sample of the same text; nothing if none is wanted."""
    if not settings.probe_features:
        return {}
    indices = candidates(mixed["forget"], mixed["retain"], settings.probe_candidates)
    watched = load_slice(made.sae, indices).to(made.loaded.model.device)
    found: dict[str, list[Tensor]] = {}
    for role, several in made.corpora.items():
        found[role] = [
            sampled_activations(
                made.loaded.model,
                made.sae.site,
                watched,
                _batches(made, settings, role, corpus),
                total_tokens=statistics.n_tokens,
                n_tokens=max(1, settings.probe_tokens // 2 // len(several)),
                workers=session.workers,
                report=session.report,
                what=f"probe, {role} corpus {corpus.name.rsplit('/', 1)[-1]}",
            )
            for corpus, statistics in zip(several, parts[role], strict=True)
        ]
    shares = [1.0 if corpus.weight is None else corpus.weight for corpus in made.corpora["retain"]]
    return fit_probe(
        torch.cat(found["forget"]),
        found["retain"],
        shares,
        indices,
        n_features=settings.probe_features,
        ridge=settings.probe_ridge,
        report=session.report,
    ).as_json()


def _noted(made: Prepared, parts: Parts, features: Sequence[Feature]) -> Header:
    """The header with what a person should know of the features: which look like formatting."""
    together = list(zip(made.corpora["retain"], parts["retain"], strict=True))
    chat, plain = ([one for corpus, one in together if corpus.is_chat == is_chat] for is_chat in (True, False))
    if not chat or not plain:
        return made.header
    chat_F, plain_F = (mix(several, [None] * len(several)).rate_F for several in (chat, plain))
    notes = formatting_notes(chat_F, plain_F, [feature.index for feature in features])
    return dataclasses.replace(made.header, notes=[*made.header.notes, *notes])
