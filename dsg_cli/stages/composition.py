"""Artifacts that act together, and what they are once loaded.

Weights that a method changed, guardrails that act while the model runs, and wrappers around its prompts compose, in
that order. Beside them stands the base model, which no method has touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsg_cli.data.hub import SCHEME
from dsg_cli.errors import DsgError
from dsg_cli.guardrail.guarded import module_from_artifact
from dsg_cli.guardrail.loading import light_path, read_light
from dsg_cli.guardrail.runtime.gates import CAUSAL_FORMS
from dsg_cli.guardrail.runtime.guardrail import GuardrailModule
from dsg_cli.inference.scoring import GuardedModel
from dsg_cli.inference.wrappers import WrapperModule, wrapper_from_artifact
from dsg_cli.methods import finetunes
from dsg_cli.models.language_model import LoadedModel, load_model
from dsg_cli.settings import Recipe
from dsg_cli.stages.inputs import check_identity, check_tokens, folder_of
from dsg_cli.workspace.artifacts import Guardrail, Header, ModelWeights, Wrapper
from dsg_cli.workspace.body import Json
from dsg_cli.workspace.files import ID
from dsg_cli.workspace.store import Stored, Workspace

ACTING_KINDS = ("model", "guardrail", "wrapper")
"""Of artifacts that unlearn, in the order in which they act."""


@dataclass(frozen=True)
class Composition:
    """Artifacts that act together: changed weights, guardrails inside the model, wrappers around its prompts."""

    named: list[Stored]
    """As they were named."""
    weights: list[Stored]
    """Methods that changed the weights one after another, the first one first; empty for the base model's own.
    Finetuning of the base counts only where it is named: then it is what is measured."""
    guardrails: list[Stored]
    wrappers: list[Stored]
    bos: int | None
    """Token that every sequence began with when they were made."""

    @property
    def artifacts(self) -> list[Stored]:
        """All that acts, in its order."""
        return [*self.weights, *self.guardrails, *self.wrappers]

    @property
    def bodies(self) -> list[Guardrail]:
        return [stored.body_as(Guardrail) for stored in self.guardrails]

    @property
    def header(self) -> Header:
        """Of the artifact that says the most of the model: of guardrails the one that covers the most layers."""
        if self.guardrails:
            return max((stored.header for stored in self.guardrails), key=lambda header: header.model.last_layer)
        return (self.weights or self.wrappers)[-1].header

    @property
    def model(self) -> str:
        """The model that guardrails and wrappers are on, by its name."""
        return folder_of(self.weights[-1]) if self.weights else self.header.model.source

    @property
    def base(self) -> str:
        """The model that no method has unlearned anything from; a finetuned one, where methods went on from it."""
        return self.weights[0].header.model.source if self.weights else self.model

    @property
    def can_generate(self) -> bool:
        """Whether every gate decides while a sequence is still being written."""
        return all(body.gate in CAUSAL_FORMS for body in self.bodies)

    def forget(self) -> list[str]:
        return list(dict.fromkeys(name for stored in self.artifacts for name in _body(stored).forget))

    def retain(self) -> list[str]:
        """Names of all retain corpora, without what is forgotten."""
        names = dict.fromkeys(name for stored in self.artifacts for name in _body(stored).retain)
        return [name for name in names if name not in self.forget()]

    @property
    def acting(self) -> str:
        """What acts, as a line for who did not name it."""
        return "acting: " + " + ".join(f"{stored.id} ({_body(stored).method})" for stored in self.artifacts)

    def described(self) -> list[Json]:
        """What acts, in its order, for reports."""
        return [
            {"id": stored.id, "kind": stored.header.kind, "method": _body(stored).method} for stored in self.artifacts
        ]


def _body(stored: Stored) -> Guardrail | ModelWeights | Wrapper:
    assert isinstance(stored.body, Guardrail | ModelWeights | Wrapper)
    return stored.body


def newest(workspace: Workspace) -> str:
    """The id of the newest artifact that unlearns; a model that was finetuned must be named."""
    return workspace.newest(ACTING_KINDS, finetuned=False) or workspace.find("guardrail").id  # Which says what to do.


def find_composition(
    workspace: Workspace, sources: Sequence[str], say: Callable[[str], None] = lambda _: None
) -> Composition:
    """The newest guardrail, model or wrapper, which `say` then names, or those that are named together."""
    artifacts = [_find(workspace, source) for source in sources or [newest(workspace)]]
    if len({stored.json["sha256"] for stored in artifacts}) < len(artifacts):
        raise DsgError("One artifact was named twice.", "Name each once.")
    models, guardrails, wrappers = (
        [stored for stored in artifacts if stored.header.kind == kind] for kind in ACTING_KINDS
    )
    if len(models) > 1:
        raise DsgError(
            f"{models[0].id} and {models[1].id} are two models; only one can be run.",
            f"Apply the second method to the first one's model: dsg apply --from {models[0].id} --method ...",
        )
    shapes = [(s.header.model.architecture, s.header.model.n_layers, s.header.model.width) for s in artifacts]
    for stored, shape in zip(artifacts, shapes, strict=True):
        if shape != shapes[0]:
            raise DsgError(f"{artifacts[0].id} and {stored.id} were made for different models.")
    # Weights read any sequence; what decides by activations was made for those that begin as they did.
    gated = [stored for stored in (*guardrails, *wrappers) if _reads_activations(stored)]
    for stored in gated[1:]:
        if _body(gated[0]).bos != _body(stored).bos:
            raise DsgError(f"{gated[0].id} and {stored.id} were made for sequences that begin differently (BOS).")
    model = models[0] if models else model_of(artifacts[0])
    weights = [*_history(model)] if model is not None and (models or not _is_finetuned(model)) else []
    composition = Composition(artifacts, weights, guardrails, wrappers, _body((gated or artifacts)[0]).bos)
    if not sources:
        say(composition.acting)
    return composition


def _find(workspace: Workspace, source: str) -> Stored:
    """By id or path, from a light file, or from a repository on the hub."""
    if source.startswith(SCHEME) or source.endswith(".safetensors"):
        path = light_path(source)
        light = read_light(path)
        return Stored(light.header, light.body, light.json, path)
    stored = workspace.read(source)
    if stored.header.kind not in ACTING_KINDS:
        raise DsgError(f"{stored.id} unlearns nothing by itself.", "Name a guardrail, model or wrapper (dsg apply).")
    return stored


def _reads_activations(stored: Stored) -> bool:
    """Whether it is for one model alone: a prefix or a list of words is for any."""
    return stored.header.kind == "guardrail" or (isinstance(stored.body, Wrapper) and stored.body.rule == "classifier")


def _history(stored: Stored) -> Iterator[Stored]:
    """A model artifact, after those that it was made from, back to the finetuned one that is unlearned from."""
    if (before := model_of(stored)) is not None and not _is_finetuned(before):
        yield from _history(before)
    yield stored


def _is_finetuned(stored: Stored) -> bool:
    return finetunes(stored.body_as(ModelWeights).method)


def lineage(composition: Composition) -> list[Stored]:
    """Every training that led to the model that a composition is on, the first one first; finetuning too."""
    trainings: list[Stored] = []
    model = model_of(composition.named[0])
    while model is not None:
        trainings.insert(0, model)
        model = model_of(model)
    return trainings


def model_of(stored: Stored) -> Stored | None:
    """The model artifact on whose weights something was made, if it was made on one."""
    folder = Path(stored.header.model.source)
    path = folder.with_name(f"{folder.name}.json")
    match = ID.fullmatch(folder.name)
    if match is None or match[1] != "model" or not path.is_file():
        return None
    return Workspace(folder.parent).read(str(path))


def guardrail_modules(workspace: Workspace, composition: Composition) -> list[GuardrailModule]:
    """The guardrails as modules, from their own tensors."""
    return [
        module_from_artifact(body, stored.header.model, workspace.tensors(stored), where=stored.id)
        for stored, body in zip(composition.guardrails, composition.bodies, strict=True)
    ]


@dataclass(frozen=True)
class LoadedComposition:
    """A composition, ready to run, beside the model that no method has touched."""

    base: LoadedModel
    model: LoadedModel
    """The base itself, unless weights were changed."""
    guardrails: list[GuardrailModule]
    wrappers: list[WrapperModule]
    bos: int | None

    def base_model(self, batch_size: int = 32) -> GuardedModel:
        return GuardedModel(self.base.model, self.base.tokenizer, self.bos, batch_size=batch_size)

    def unlearned_model(self, batch_size: int = 32) -> GuardedModel:
        model = self.model
        return GuardedModel(model.model, model.tokenizer, self.bos, self.guardrails, self.wrappers, batch_size)


def load_composition(
    workspace: Workspace, composition: Composition, recipe: Recipe, *, cut: bool = False
) -> LoadedComposition:
    """Load all that acts, and the base model beside it; if `cut`, only the layers that guardrails cover."""
    guardrails, weights = guardrail_modules(workspace, composition), composition.weights
    wrappers = []
    for stored in composition.wrappers:
        has_tensors = stored.path.with_suffix(".safetensors").is_file()
        tensors = workspace.tensors(stored) if has_tensors else {}
        wrappers.append(wrapper_from_artifact(stored.body_as(Wrapper), tensors, where=stored.id))
    instead = recipe.model.instead
    if instead is not None and any(stored in composition.named for stored in weights):
        raise DsgError(f"{weights[-1].id} is a model; --model would put another in its place.", "Leave it out.")
    last_layer = composition.header.model.last_layer if cut else None
    model = load_model(instead or composition.model, recipe.model, last_layer=last_layer)
    base = model
    if weights and not instead:
        base = load_model(composition.base, recipe.model, last_layer=last_layer)
    for stored in [*composition.guardrails, *composition.wrappers]:
        check_tokens(model, _body(stored).special_ids, stored.id)
        if not _reads_activations(stored) or recipe.model.allow_mismatch:
            continue
        try:
            check_identity(model, stored.header)
        except DsgError as error:
            if not weights or folder_of(weights[-1]) == stored.header.model.source:
                raise
            last = weights[-1].id
            raise DsgError(
                f"{stored.id} was made for other weights than those of {last}, whose lower layers have changed.",
                f"Make one on them: dsg apply --from {last} --method {_body(stored).method}. Or --allow-mismatch.",
            ) from error
    return LoadedComposition(base, model, guardrails, wrappers, composition.bos)


def only_guardrails(composition: Composition, command: str) -> None:
    """Refuse what takes guardrails alone."""
    others = [stored.id for stored in composition.named if stored.header.kind != "guardrail"]
    if others:
        folder = f" The weights of {others[0]} lie in {composition.model}." if composition.weights else ""
        raise DsgError(f"{command} takes guardrails, not {others[0]}.{folder}")
