"""What a method other than `dsg` is made from: the model and the corpora of a selection, or those of the recipe."""

from __future__ import annotations

from collections.abc import Sequence

from dsg_cli.artifacts import Json
from dsg_cli.corpora import Corpus, check_disjoint, check_named, check_no_shared_texts, load_corpora, parse_name
from dsg_cli.model import LoadedModel, load_model, load_tokenizer, read_config, text_config
from dsg_cli.prompting import check_chat
from dsg_cli.recipe import Recipe
from dsg_cli.stages.calibrate import spelled
from dsg_cli.stages.chain import load_chain_model
from dsg_cli.stages.select import check_world
from dsg_cli.tokens import bos_to_prepend
from dsg_cli.workspace import Stored

ROLES = ("forget", "retain")


def named_corpora(recipe: Recipe, features: Stored | None) -> dict[str, list[str]]:
    """Role -> corpora as they are named, weights included.

    Raises:
        DsgError: One is named in both roles, or is no known name.
    """
    if features is not None:
        return {role: [spelled(corpus) for corpus in features.header.settings[role]] for role in ROLES}
    names = {"forget": recipe.corpora.forget, "retain": recipe.corpora.retain}
    for role, several in names.items():
        if several:
            check_named(several, role=role)
    check_disjoint(names["forget"], names["retain"])
    if any(names.values()):
        check_world(recipe)
    return names


def read_corpora(
    names: dict[str, list[str]], recipe: Recipe, features: Stored | None
) -> tuple[dict[str, list[Corpus]], list[str]]:
    """Role -> corpora, those of a selection as it drew them; and a note on each that has changed since.

    Raises:
        DsgError: No corpus of a role is named, one cannot be read, text is both to be forgotten and retained, or a
            corpus needs a chat template that the model lacks.
    """
    described: dict[str, Json] = {}
    limit, seed = recipe.corpora.limit, recipe.seed
    if features is not None:
        settings = features.header.settings
        described = {one["name"]: one for role in ROLES for one in settings[role]}
        limit, seed = settings["limit"], features.header.seed
    revisions = {name: one["revision"] for name, one in described.items() if one.get("revision")}
    for role in ROLES:
        check_named(names[role], role=role)
    found = {role: load_corpora(names[role], role=role, limit=limit, seed=seed, revisions=revisions) for role in ROLES}
    check_no_shared_texts(found["forget"], found["retain"])
    source = recipe.model.source if features is None else recipe.model.instead or features.header.model.source
    tokenizer = load_tokenizer(source, trust_remote_code=recipe.model.trust_remote_code)
    check_chat(tokenizer, [corpus for corpora in found.values() for corpus in corpora])
    changed = [
        f"The {role} corpus {corpus.name} has changed since select."
        for role, corpora in found.items()
        for corpus in corpora
        if corpus.sha256 != described.get(corpus.name, {}).get("sha256", corpus.sha256)
    ]
    return found, changed


def n_layers_of(recipe: Recipe, features: Stored | None) -> int:
    """Decoder layers of the model, before its weights are loaded.

    Raises:
        DsgError: Its configuration cannot be read.
    """
    if features is not None:
        return features.header.model.n_layers
    config = read_config(recipe.model.source, trust_remote_code=recipe.model.trust_remote_code)
    return int(text_config(config).num_hidden_layers)


def load_whole_model(recipe: Recipe, features: Stored | None) -> tuple[LoadedModel, int | None]:
    """The model, whole, and the token that its texts begin with.

    Raises:
        DsgError: It cannot be loaded, or is not the one of the selection.
    """
    if features is not None:
        loaded = load_chain_model(features.header, recipe, cut=False)
        sae = features.header.sae
        return loaded, bos_to_prepend(loaded.tokenizer, sae is not None and sae.prepend_bos)
    loaded = load_model(
        recipe.model.source,
        device=recipe.model.device,
        dtype=recipe.model.dtype,
        device_map=recipe.model.device_map,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    return loaded, bos_to_prepend(loaded.tokenizer, False)


def plain_names(names: Sequence[str]) -> list[str]:
    """Corpora as later stages call them, without weights."""
    return [parse_name(name).name for name in names]
