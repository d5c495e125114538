"""`dsg select`: which features carry the knowledge that is to be forgotten?

Reads the `select` part of the forget and retain corpora through the model's layers up to the SAE's hook and the
whole SAE, once; ranks the features (METHOD, steps 1 to 4); writes features-NNN. Features that are picked by their
descriptions or by hand need no forget corpus (METHOD, step 10): then only retain text is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from dsg_cli.artifacts import Header, Json
from dsg_cli.corpora import Corpus, check_disjoint, check_named, check_no_shared_texts, load_corpora
from dsg_cli.errors import DsgError
from dsg_cli.fit import check_fits
from dsg_cli.model import LoadedModel, context_length, load_model, load_tokenizer, read_config, text_config
from dsg_cli.prompting import check_chat
from dsg_cli.recipe import Recipe
from dsg_cli.sae import check_name, read_sae
from dsg_cli.selection import formatting_notes
from dsg_cli.stages.candidates import Candidates, find_candidates, is_picked
from dsg_cli.stages.chain import identify, settle
from dsg_cli.stages.material import check_world, named_model
from dsg_cli.stages.provenance import Clock, new_header
from dsg_cli.stages.selecting import Prepared, Selected, selected
from dsg_cli.stages.session import QUIET, Session
from dsg_cli.statistics import mix
from dsg_cli.workspace import Stored, Workspace


def run(
    recipe: Recipe,
    workspace: Workspace,
    *,
    session: Session = QUIET,
    ranked: Callable[[Candidates], Any] = lambda _: None,
) -> Stored:
    """Select features and write them.

    Args:
        recipe: Model, SAE, corpora and settings.
        workspace: Where they go.
        session: How it is run.
        ranked: Called with what is picked without text, before any text is read.

    Raises:
        DsgError: Anything the user can mend; all that can be known before weights are loaded, before they are.
    """
    clock = Clock()
    with session.workers.in_turn():
        made = prepared(recipe, workspace, session=session)
    if made.candidates is not None:
        ranked(made.candidates)
    if (stored := session.existing(workspace, made.header)) is not None:
        return stored
    with session.checkpoint(workspace, made.header) as checkpoint:
        found = selected(made, recipe.select, session, checkpoint)
        header = _noted(made, found)
        n_tokens = found.body.forget_tokens + found.body.retain_tokens
        closed = clock.close(header, n_tokens=n_tokens)
        return session.write(workspace, lambda: workspace.write(closed, found.body, tensors=found.tensors))


def prepared(
    recipe: Recipe, workspace: Workspace, *, loaded: LoadedModel | None = None, session: Session = QUIET
) -> Prepared:
    """Everything checked and read.

    Args:
        recipe: Model, SAE, corpora and settings.
        workspace: Where models that are artifacts are.
        loaded: The model, if it has been loaded already.
        session: How it is run.

    Raises:
        DsgError: Anything the user can mend; all that can be known before weights are loaded, before they are.
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
    model_config = text_config(read_config(recipe.model.source, trust_remote_code=recipe.model.trust_remote_code))
    tokenizer = load_tokenizer(recipe.model.source, trust_remote_code=recipe.model.trust_remote_code)
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
    candidates = find_candidates(recipe, sae.identity, session)
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
