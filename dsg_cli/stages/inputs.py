"""What a stage reads again: models and SAEs of earlier artifacts, checked to be the same ones, and their corpora.

`MethodInputs` is what a method starts from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dsg_cli.data.corpora import Corpus, check_disjoint, check_named, check_no_shared_texts, load_corpora, parse_name
from dsg_cli.data.tokens import bos_to_prepend, check_chat, special_ids
from dsg_cli.errors import DsgError
from dsg_cli.guardrail.runtime.sites import fingerprint
from dsg_cli.methods import METHODS, finetunes
from dsg_cli.models.language_model import LoadedModel, load_model, load_tokenizer
from dsg_cli.models.sae import SaeSource, read_sae
from dsg_cli.settings import ModelSection, Recipe
from dsg_cli.workspace.artifacts import Header, ModelIdentity, ModelWeights
from dsg_cli.workspace.body import Json
from dsg_cli.workspace.store import Stored, Workspace


def identify(loaded: LoadedModel, last_layer: int) -> ModelIdentity:
    """The identity of a loaded model, whole or cut after `last_layer`."""
    config = loaded.model.config.get_text_config(decoder=True)
    return ModelIdentity(
        source=loaded.source,
        architecture=type(loaded.model).__name__,
        n_layers=loaded.n_layers,
        width=int(config.hidden_size),
        last_layer=last_layer,
        fingerprint=fingerprint(loaded.model, last_layer),
    )


def load_chain_model(header: Header, recipe: Recipe, *, cut: bool) -> LoadedModel:
    """The model that an artifact was made with, whole or (`cut`) up to the hook; device and dtype are the recipe's."""
    source = recipe.model.instead or header.model.source
    loaded = load_model(source, recipe.model, last_layer=header.model.last_layer if cut else None)
    if not recipe.model.allow_mismatch:
        check_identity(loaded, header)
    return loaded


def check_identity(loaded: LoadedModel, header: Header) -> None:
    """Refuse a model that is not the one an artifact was made with."""
    identity = header.model
    if identify(loaded, identity.last_layer).replace(source=identity.source) != identity:
        raise DsgError(
            f"The model in {loaded.source} is not the one that {header.id} was made with: its weights have changed.",
            "Start again with dsg select"
            + (", or put it on this model all the same with --allow-mismatch." if header.kind == "guardrail" else "."),
        )


def chain_sae(stored: Stored) -> SaeSource:
    """The SAE that an artifact was made with."""
    identity = stored.header.sae
    assert identity is not None
    sae = read_sae(identity.source)
    if sae.identity.replace(revision=identity.revision) != identity:
        changed = "weights" if sae.identity.sha256 != identity.sha256 else "configuration"
        raise DsgError(
            f"The SAE in {identity.source} is not the one that {stored.id} was made with: its {changed} changed.",
            "Start again with dsg select.",
        )
    return sae


def check_tokens(loaded: LoadedModel, special: Sequence[int], artifact_id: str) -> None:
    """Refuse a tokenizer with other special tokens than the artifact was made with."""
    if list(special) != list(special_ids(loaded.tokenizer)):
        raise DsgError(
            f"The tokenizer of {loaded.source} has other special tokens than when {artifact_id} was made.",
            "Start again with dsg select.",
        )


def spelled(corpus: Json) -> str:
    """A corpus of select as it was named there, weight included."""
    return f"{corpus['name']}={corpus['weight']}" if corpus.get("weight") else str(corpus["name"])


@dataclass(frozen=True)
class MethodInputs:
    """The model that a method is applied to, by its name, and the corpora that it reads."""

    model: str
    names: dict[str, list[str]]
    """forget and retain -> corpora as later stages call them."""
    corpora: dict[str, list[Corpus]]
    """forget and retain, empty where a method has no use for their texts; train, for finetuning."""
    bos: int | None
    artifacts: list[Stored]
    notes: list[str]

    def described(self) -> Json:
        return {role: [corpus.described() for corpus in of_role] for role, of_role in self.corpora.items()}


def folder_of(stored: Stored) -> str:
    """Where a model artifact's weights lie, as `--model` takes it."""
    return str(stored.path.with_suffix("").resolve())


def named_model(workspace: Workspace, source: str) -> str:
    """The model that `--model` means: `model-003` is that artifact's weights, verified."""
    return folder_of(workspace.find("model", source)) if source.startswith("model-") else source


def taken_from(recipe: Recipe, origin: Stored | None) -> Recipe:
    """The recipe with the model, and unless it names any the corpora, of an artifact that is gone on from."""
    if origin is None:
        return recipe
    settings, corpora = origin.header.settings, recipe.corpora
    if origin.header.kind == "features" or not corpora.forget:
        forget, retain = ([spelled(corpus) for corpus in settings[role]] for role in ("forget", "retain"))
        corpora = replace(corpora, forget=forget, retain=retain, limit=settings.get("limit"))
    source = folder_of(origin) if isinstance(origin.body, ModelWeights) else origin.header.model.source
    return replace(recipe, corpora=corpora, model=replace(recipe.model, source=source))


def read_method_inputs(
    recipe: Recipe, workspace: Workspace, method: str, origin: Stored | None, *, reads_text: bool = True
) -> MethodInputs:
    """Read the corpora, and check all that can be checked before weights are loaded.

    A method without a forget corpus may have no corpora at all; what is finetuned on stands in the method's settings.
    `origin` is the features or model artifact that the recipe was taken from; without `reads_text` corpora are only
    named.
    """
    is_finetuned = finetunes(method)
    names = {"forget": recipe.corpora.forget, "retain": recipe.corpora.retain}
    to_read = {"train": recipe.methods.finetune.corpora} if is_finetuned else names
    for role, of_role in to_read.items():
        if of_role or is_finetuned or METHODS[method].needs_forget:
            check_named(of_role, role=role)
    check_disjoint(names["forget"], names["retain"])
    check_world(recipe, [name for of_role in to_read.values() for name in of_role])
    source = named_model(workspace, recipe.model.source)
    tokenizer = load_tokenizer(source, recipe.model)
    corpora: dict[str, list[Corpus]] = {"forget": [], "retain": []}
    notes: list[str] = []
    for role, of_role in to_read.items() if reads_text else ():
        corpora[role], changes = read_corpora(of_role, role, recipe, origin)
        notes += changes
    check_no_shared_texts(corpora["forget"], corpora["retain"])
    check_chat(tokenizer, [corpus for of_role in corpora.values() for corpus in of_role])
    sae = origin.header.sae if origin is not None and not is_finetuned else None
    return MethodInputs(
        model=source,
        names={role: [parse_name(name).name for name in of_role] for role, of_role in names.items()},
        corpora=corpora,
        bos=bos_to_prepend(tokenizer, sae is not None and sae.prepend_bos),
        artifacts=[] if origin is None else [origin],
        notes=notes,
    )


def load_whole(inputs: MethodInputs, recipe: Recipe, *, dtype: str) -> LoadedModel:
    """The model, whole."""
    loaded = load_model(inputs.model, recipe.model, dtype=dtype)
    for stored in inputs.artifacts:
        if stored.header.kind == "features":
            check_identity(loaded, stored.header)
    return loaded


def check_world(recipe: Recipe, names: Sequence[str]) -> None:
    """The lab's corpora are about a world that only the lab's model knows."""
    is_lab = bool(names) and all(name.startswith("lab-") for name in names)
    if recipe.model.source == ModelSection().source and is_lab:
        raise DsgError(f"{recipe.model.source} knows nothing of the lab's world.", "Add --model lab.")


def reload_corpora(
    origin: Stored, names: Sequence[str], role: str, *, limit: int | None, seed: int, since: str = ""
) -> tuple[list[Corpus], list[str]]:
    """Corpora, those of an earlier stage at the commits that it read, and a note on each whose text is another now.

    The settings of `origin` say which corpora it read in this role (forget, retain or train), and how; `names` are
    those of a recipe, weights included. The notes say that text has changed since `since`, by default since `origin`.
    """
    described: dict[str, Json] = {corpus["name"]: corpus for corpus in origin.header.settings.get(role, [])}
    revisions = {name: corpus["revision"] for name, corpus in described.items() if corpus.get("revision")}
    corpora = load_corpora(names, role=role, limit=limit, seed=seed, revisions=revisions)
    digests = {name: corpus.get("sha256") for name, corpus in described.items()}
    changed = [corpus.name for corpus in corpora if digests.get(corpus.name) not in (None, corpus.sha256)]
    return corpora, [f"The {role} corpus {name} has changed since {since or origin.id}." for name in changed]


def read_corpora(
    names: Sequence[str], role: str, recipe: Recipe, origin: Stored | None
) -> tuple[list[Corpus], list[str]]:
    """Corpora, those of an artifact as it drew them; and a note on each that has changed since."""
    if origin is None:
        return load_corpora(names, role=role, limit=recipe.corpora.limit, seed=recipe.seed), []
    known = {corpus["name"] for corpus in origin.header.settings.get(role, [])}
    is_taken = {parse_name(name).name for name in names} == known
    seed = origin.header.seed if is_taken else recipe.seed
    corpora, notes = reload_corpora(origin, names, role, limit=recipe.corpora.limit, seed=seed)
    return corpora, notes if is_taken else []
