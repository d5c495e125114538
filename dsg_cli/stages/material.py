"""What a method is applied to: a model and corpora, from flags and recipe or from an artifact that names them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dsg_cli.artifacts import Json, ModelWeights
from dsg_cli.corpora import Corpus, check_disjoint, check_named, check_no_shared_texts, load_corpora
from dsg_cli.errors import DsgError
from dsg_cli.methods.names import METHODS
from dsg_cli.model import load_tokenizer
from dsg_cli.prompting import check_chat
from dsg_cli.recipe import Recipe
from dsg_cli.settings import ModelSection
from dsg_cli.tokens import bos_to_prepend
from dsg_cli.workspace import Stored, Workspace


@dataclass(frozen=True)
class Material:
    """A model by its name, and corpora."""

    model: str
    forget: list[Corpus]
    retain: list[Corpus]
    bos: int | None
    """Token that every sequence begins with."""
    inputs: list[Stored]

    def described(self) -> Json:
        """What an artifact's settings say of the corpora."""
        roles = {"forget": self.forget, "retain": self.retain}
        return {role: [corpus.described() for corpus in several] for role, several in roles.items()}


def folder_of(stored: Stored) -> str:
    """Where a model artifact's weights lie, as `--model` takes it."""
    return str(stored.path.with_suffix("").resolve())


def named_model(workspace: Workspace, source: str) -> str:
    """The model that `--model` means: `model-003` is that artifact's weights, verified.

    Raises:
        DsgError: It is such a name, and there is no such artifact.
    """
    return folder_of(workspace.find("model", source)) if source.startswith("model-") else source


def taken_from(recipe: Recipe, origin: Stored | None) -> Recipe:
    """The recipe with the model, and unless it names any the corpora, of an artifact that is gone on from."""
    if origin is None:
        return recipe
    settings, corpora = origin.header.settings, recipe.corpora
    if origin.header.kind == "features" or not corpora.forget:
        forget, retain = ([_spelled(one) for one in settings[role]] for role in ("forget", "retain"))
        corpora = replace(corpora, forget=forget, retain=retain, limit=settings.get("limit"))
    source = folder_of(origin) if isinstance(origin.body, ModelWeights) else origin.header.model.source
    return replace(recipe, corpora=corpora, model=replace(recipe.model, source=source))


def find_material(recipe: Recipe, workspace: Workspace, method: str, origin: Stored | None) -> Material:
    """Read the corpora, and check all that can be checked before weights are loaded.

    Args:
        recipe: Names the model and the corpora.
        workspace: Where models that are artifacts are.
        method: What for; one without a forget corpus may have no corpora at all.
        origin: A features or a model artifact that the recipe was taken from.

    Raises:
        DsgError: None named, unknown, both forgotten and retained, or unfit for the model.
    """
    names = recipe.corpora
    is_needed = METHODS[method].needs_forget
    for role, named in (("forget", names.forget), ("retain", names.retain)):
        if named or is_needed:
            check_named(named, role=role)
    check_disjoint(names.forget, names.retain)
    check_world(recipe)
    source = named_model(workspace, recipe.model.source)
    tokenizer = load_tokenizer(source, trust_remote_code=recipe.model.trust_remote_code)
    read = origin.header.settings if origin is not None else {}
    forget, retain = (
        _corpora(named, role, recipe, read.get(role, [])) if named else []
        for role, named in (("forget", names.forget), ("retain", names.retain))
    )
    check_no_shared_texts(forget, retain)
    check_chat(tokenizer, [*forget, *retain])
    sae_prepends = bool(origin is not None and origin.header.sae is not None and origin.header.sae.prepend_bos)
    bos = bos_to_prepend(tokenizer, sae_prepends)
    return Material(source, forget, retain, bos, [] if origin is None else [origin])


def check_world(recipe: Recipe) -> None:
    """The lab's corpora are about a world that only the lab's model knows.

    Raises:
        DsgError: They are given to the default model, which is what happens when no model is named.
    """
    names = [*recipe.corpora.forget, *recipe.corpora.retain]
    is_lab = bool(names) and all(name.startswith("lab-") for name in names)
    if recipe.model.source == ModelSection().source and is_lab:
        raise DsgError(f"{recipe.model.source} knows nothing of the lab's world.", "Add --model lab.")


def _corpora(names: Sequence[str], role: str, recipe: Recipe, read: Sequence[Json]) -> list[Corpus]:
    revisions = {one["name"]: one["revision"] for one in read if one.get("revision")}
    return load_corpora(names, role=role, limit=recipe.corpora.limit, seed=recipe.seed, revisions=revisions)


def _spelled(corpus: Json) -> str:
    """A corpus as it was named, weight included."""
    return f"{corpus['name']}={corpus['weight']}" if corpus.get("weight") else str(corpus["name"])
