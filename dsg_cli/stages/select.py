"""`dsg select`: which features carry the knowledge that is to be forgotten?

Reads the `select` part of the forget and retain corpora through the model's layers up to the SAE's hook and the
whole SAE, once; ranks the features (METHOD, steps 1 to 4); writes features-NNN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import replace

from dsg_cli.artifacts import Feature, Header, Json
from dsg_cli.corpora import Corpus, check_disjoint, check_named, check_no_shared_texts, load_corpora
from dsg_cli.errors import DsgError
from dsg_cli.fit import check_fits
from dsg_cli.model import LoadedModel, context_length, load_model, load_tokenizer, read_config, text_config
from dsg_cli.prompting import check_chat
from dsg_cli.recipe import Recipe
from dsg_cli.sae import check_name, read_sae
from dsg_cli.selection import formatting_notes
from dsg_cli.stages.chain import identify, settle
from dsg_cli.stages.material import check_world, named_model
from dsg_cli.stages.provenance import Clock, new_header
from dsg_cli.stages.selecting import Parts, Prepared, selected
from dsg_cli.stages.session import QUIET, Session
from dsg_cli.statistics import mix
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


def _noted(made: Prepared, parts: Parts, features: Sequence[Feature]) -> Header:
    """The header with what a person should know of the features: which look like formatting."""
    together = list(zip(made.corpora["retain"], parts["retain"], strict=True))
    chat, plain = ([one for corpus, one in together if corpus.is_chat == is_chat] for is_chat in (True, False))
    if not chat or not plain:
        return made.header
    chat_F, plain_F = (mix(several, [None] * len(several)).rate_F for several in (chat, plain))
    notes = formatting_notes(chat_F, plain_F, [feature.index for feature in features])
    return dataclasses.replace(made.header, notes=[*made.header.notes, *notes])
