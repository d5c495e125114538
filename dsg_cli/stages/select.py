"""`dsg select`: which features carry the knowledge that is to be forgotten?

Reads the `select` part of the forget and retain corpora through the model's layers up to the SAE's hook and the
whole SAE, once; ranks the features (METHOD, steps 1 to 4); writes features-NNN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from dsg_cli.artifacts import FeatureSet, Header, Json
from dsg_cli.checkpoints import Checkpoint
from dsg_cli.corpora import Corpus, check_disjoint, check_named, check_no_shared_texts, load_corpora
from dsg_cli.errors import DsgError
from dsg_cli.fit import check_fits
from dsg_cli.model import LoadedModel, context_length, load_model, load_tokenizer, read_config, text_config
from dsg_cli.prompting import check_chat, prompts
from dsg_cli.recipe import Recipe
from dsg_cli.sae import SaeSource, check_name, load_encoder, read_sae
from dsg_cli.selection import select_features
from dsg_cli.settings import ModelSection, SelectSection
from dsg_cli.stages.chain import identify, settle
from dsg_cli.stages.provenance import Clock, new_header
from dsg_cli.stages.session import QUIET, Session
from dsg_cli.statistics import FeatureStatistics, feature_statistics, mix
from dsg_cli.streaming import estimated_tokens, stream_batches
from dsg_cli.tokens import bos_to_prepend
from dsg_cli.workspace import Stored, Workspace


def run(recipe: Recipe, workspace: Workspace, *, session: Session = QUIET) -> Stored:
    """Select features and write them.

    Raises:
        DsgError: Anything the user can mend; all that can be known before weights are loaded, before they are.
    """
    clock = Clock()
    with session.workers.in_turn():
        made = _prepared(recipe, workspace)
    if (stored := session.existing(workspace, made.header)) is not None:
        return stored
    with session.checkpoint(workspace, made.header) as checkpoint:
        statistics = _statistics(made, recipe.select, session, checkpoint)
        score = recipe.select.score
        selection = select_features(
            statistics["forget"].score(score),
            statistics["retain"].score(score),
            n_features=recipe.select.n_features,
            ratio_percentile=recipe.select.ratio_percentile,
        )
        body = FeatureSet(
            features=selection.features,
            score=score,
            ratio_cut=selection.ratio_cut,
            forget_cut=selection.forget_cut,
            percentiles_over=selection.percentiles_over,
            n_live=selection.n_live,
            n_passed=selection.n_passed,
            forget_tokens=statistics["forget"].n_tokens,
            retain_tokens=statistics["retain"].n_tokens,
            median_residual_norm=statistics["retain"].median_residual_norm,
        )
        tensors = {name: tensor for role in statistics for name, tensor in statistics[role].tensors(role).items()}
        n_tokens = body.forget_tokens + body.retain_tokens
        return session.write(
            workspace, lambda: workspace.write(clock.close(made.header, n_tokens=n_tokens), body, tensors=tensors)
        )


@dataclass(frozen=True)
class _Prepared:
    """All that the pass needs."""

    loaded: LoadedModel
    sae: SaeSource
    corpora: dict[str, list[Corpus]]
    header: Header
    seq_len: int


def _prepared(recipe: Recipe, workspace: Workspace) -> _Prepared:
    """Everything checked and read.

    Raises:
        DsgError: Anything the user can mend; all that can be known before weights are loaded, before they are.
    """
    names = recipe.corpora
    check_named(names.forget, role="forget")
    check_named(names.retain, role="retain")
    check_disjoint(names.forget, names.retain)
    _check_world(recipe)
    workspace.check_writable()
    check_name(recipe.sae.source)
    recipe = settle(recipe)
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

    loaded = load_model(
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
        inputs=[],
        notes=notes,
    )
    seq_len = min(recipe.select.seq_len, context_length(model_config))
    return _Prepared(loaded, sae, {"forget": forget, "retain": retain}, header, seq_len)


def _check_world(recipe: Recipe) -> None:
    """The lab's corpora are about a world that only the lab's model knows.

    Raises:
        DsgError: They are given to the default model, which is what happens when no model is named.
    """
    names = [*recipe.corpora.forget, *recipe.corpora.retain]
    if recipe.model.source == ModelSection().source and all(name.startswith("lab-") for name in names):
        raise DsgError(f"{recipe.model.source} knows nothing of the lab's world.", "Add --model lab.")


def _settings(recipe: Recipe, forget: Sequence[Corpus], retain: Sequence[Corpus]) -> Json:
    return {
        **dataclasses.asdict(recipe.select),
        "forget": [corpus.described() for corpus in forget],
        "retain": [corpus.described() for corpus in retain],
        "limit": recipe.corpora.limit,
    }


def _statistics(
    made: _Prepared, settings: SelectSection, session: Session, checkpoint: Checkpoint
) -> dict[str, FeatureStatistics]:
    """Of the mixture of each role's corpora, from one pass over each corpus's `select` part."""
    loaded, sae = made.loaded, made.sae
    encoder = load_encoder(sae, device=str(loaded.model.device))
    bos = bos_to_prepend(loaded.tokenizer, sae.identity.prepend_bos)
    mixed = {}
    for role, several in made.corpora.items():
        max_tokens = settings.max_rows * made.seq_len // len(several)
        parts = []
        for corpus in several:
            texts = prompts(loaded.tokenizer, corpus, "select")
            batches = stream_batches(
                loaded.tokenizer,
                texts,
                bos=bos,
                seq_len=made.seq_len,
                max_tokens=max_tokens,
                is_packed=settings.rows == "packed",
                device=str(loaded.model.device),
            )
            parts.append(
                feature_statistics(
                    loaded.model,
                    sae.site,
                    encoder,
                    batches,
                    total_tokens=estimated_tokens(texts, max_tokens),
                    what=f"{role} corpus {corpus.name.rsplit('/', 1)[-1]}",
                    workers=session.workers,
                    checkpoint=checkpoint,
                    report=session.report,
                )
            )
        mixed[role] = mix(parts, [corpus.weight for corpus in several])
    return mixed
