"""What a method is applied to: a model and corpora, from flags and recipe or from an artifact that names them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from dsg_cli.artifacts import Json, ModelWeights
from dsg_cli.corpora import Corpus, check_disjoint, check_named, check_no_shared_texts, load_corpora, parse_name
from dsg_cli.errors import DsgError
from dsg_cli.methods.names import METHODS
from dsg_cli.model import LoadedModel, load_model, load_tokenizer
from dsg_cli.prompting import check_chat
from dsg_cli.recipe import Recipe
from dsg_cli.settings import CorporaSection, ModelSection
from dsg_cli.stages.chain import check_identity, spelled
from dsg_cli.tokens import bos_to_prepend
from dsg_cli.workspace import Stored, Workspace


@dataclass(frozen=True)
class Material:
    """A model by its name, and corpora."""

    model: str
    names: dict[str, list[str]]
    """forget and retain -> corpora as later stages call them."""
    forget: list[Corpus]
    retain: list[Corpus]
    """Empty where a method has no use for their texts."""
    bos: int | None
    """Token that every sequence begins with."""
    inputs: list[Stored]
    notes: list[str]
    train: list[Corpus] = field(default_factory=list)
    """What is taught, by the method that does."""

    def described(self) -> Json:
        """What an artifact's settings say of the corpora."""
        roles = {"forget": self.forget, "retain": self.retain} | ({"train": self.train} if self.train else {})
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
        forget, retain = ([spelled(one) for one in settings[role]] for role in ("forget", "retain"))
        corpora = replace(corpora, forget=forget, retain=retain, limit=settings.get("limit"))
    source = folder_of(origin) if isinstance(origin.body, ModelWeights) else origin.header.model.source
    return replace(recipe, corpora=corpora, model=replace(recipe.model, source=source))


def find_material(
    recipe: Recipe, workspace: Workspace, method: str, origin: Stored | None, *, reads_text: bool = True
) -> Material:
    """Read the corpora, and check all that can be checked before weights are loaded.

    Args:
        recipe: Names the model and the corpora.
        workspace: Where models that are artifacts are.
        method: What for; one without a forget corpus may have no corpora at all.
        origin: A features or a model artifact that the recipe was taken from.
        reads_text: Whether the method reads corpora, or only says their names.

    Raises:
        DsgError: None named, unknown, both forgotten and retained, or unfit for the model.
    """
    names = {"forget": recipe.corpora.forget, "retain": recipe.corpora.retain}
    for role, named in names.items():
        if named or METHODS[method].needs_forget:
            check_named(named, role=role)
    check_disjoint(names["forget"], names["retain"])
    check_world(recipe)
    source = named_model(workspace, recipe.model.source)
    tokenizer = load_tokenizer(source, trust_remote_code=recipe.model.trust_remote_code)
    found: dict[str, list[Corpus]] = {"forget": [], "retain": []}
    notes: list[str] = []
    for role, named in names.items() if reads_text else ():
        found[role], changed = read_corpora(named, role, recipe, origin)
        notes += changed
    check_no_shared_texts(found["forget"], found["retain"])
    check_chat(tokenizer, [*found["forget"], *found["retain"]])
    sae_prepends = bool(origin is not None and origin.header.sae is not None and origin.header.sae.prepend_bos)
    return Material(
        model=source,
        names={role: [parse_name(name).name for name in named] for role, named in names.items()},
        forget=found["forget"],
        retain=found["retain"],
        bos=bos_to_prepend(tokenizer, sae_prepends),
        inputs=[] if origin is None else [origin],
        notes=notes,
    )


def find_lesson(recipe: Recipe, workspace: Workspace, origin: Stored | None) -> Material:
    """Read what is to be taught, and check all that can be checked before weights are loaded.

    Args:
        recipe: Names the model, and in the method's settings the corpora and how many documents of each.
        workspace: Where models that are artifacts are.
        origin: A features or a model artifact whose model is trained on.

    Raises:
        DsgError: No corpus is named, or one is unknown or unfit for the model.
    """
    names = recipe.methods.finetune.corpora
    check_named(names, role="train")
    limit = recipe.methods.finetune.limit
    recipe = replace(recipe, corpora=CorporaSection(forget=names, limit=limit))
    check_world(recipe)
    source = named_model(workspace, recipe.model.source)
    tokenizer = load_tokenizer(source, trust_remote_code=recipe.model.trust_remote_code)
    train, notes = read_corpora(names, "train", recipe, origin)
    check_chat(tokenizer, train)
    inputs = [] if origin is None else [origin]
    nothing: dict[str, list[str]] = {"forget": [], "retain": []}
    return Material(source, nothing, [], [], bos_to_prepend(tokenizer, False), inputs, notes, train)


def load_whole(material: Material, recipe: Recipe, *, dtype: str) -> LoadedModel:
    """The model, whole.

    Raises:
        DsgError: It cannot be loaded, or is not the one that features were selected on.
    """
    loaded = load_model(
        material.model,
        device=recipe.model.device,
        dtype=dtype,
        device_map=recipe.model.device_map,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    for stored in material.inputs:
        if stored.header.kind == "features":
            check_identity(loaded, stored.header)
    return loaded


def check_world(recipe: Recipe) -> None:
    """The lab's corpora are about a world that only the lab's model knows.

    Raises:
        DsgError: They are given to the default model, which is what happens when no model is named.
    """
    names = [*recipe.corpora.forget, *recipe.corpora.retain]
    is_lab = bool(names) and all(name.startswith("lab-") for name in names)
    if recipe.model.source == ModelSection().source and is_lab:
        raise DsgError(f"{recipe.model.source} knows nothing of the lab's world.", "Add --model lab.")


def read_corpora(
    names: Sequence[str], role: str, recipe: Recipe, origin: Stored | None
) -> tuple[list[Corpus], list[str]]:
    """Corpora, those of an artifact as it drew them; and a note on each that has changed since.

    Raises:
        DsgError: One cannot be read.
    """
    said: dict[str, Json] = {}
    if origin is not None:
        said = {one["name"]: one for one in origin.header.settings.get(role, [])}
    is_taken = origin is not None and {parse_name(name).name for name in names} == set(said)
    found = load_corpora(
        names,
        role=role,
        limit=recipe.corpora.limit,
        seed=origin.header.seed if origin is not None and is_taken else recipe.seed,
        revisions={name: one["revision"] for name, one in said.items() if one.get("revision")},
    )
    changed = [one.name for one in found if is_taken and one.sha256 != said[one.name]["sha256"]]
    return found, [f"The {role} corpus {name} has changed since {origin.id if origin else ''}." for name in changed]
