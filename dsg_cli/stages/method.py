"""`dsg apply --method NAME`: every way to unlearn, under one command.

A method changes weights (model-NNN), clamps SAE features while the model runs (guardrail-NNN), or stands between the
model and whoever asks (wrapper-NNN). Model, corpora and SAE come from the artifact that is gone on from, or from the
same flags as those of `dsg select`; what a method needs and nobody has computed yet, such as SAE features, is computed
first and written too.
"""

from __future__ import annotations

from dataclasses import replace

from dsg_cli.artifacts import MADE_BY
from dsg_cli.errors import DsgError
from dsg_cli.methods.names import METHODS, check_method
from dsg_cli.recipe import Recipe
from dsg_cli.settings import ModelSection, SaeSection
from dsg_cli.stages import apply, calibrate, clamp, select, unlearn, wrap
from dsg_cli.stages.material import taken_from
from dsg_cli.stages.session import QUIET, Session
from dsg_cli.workspace import Stored, Workspace

ORIGINS = ("features", "model")
"""Kinds of artifacts that name a model and corpora; `dsg` also goes on from a threshold."""


def run(
    recipe: Recipe, workspace: Workspace, method: str, *, source: str | None = None, session: Session = QUIET
) -> Stored:
    """Apply a method and write what it makes.

    Args:
        recipe: Model, corpora, SAE and the method's settings.
        workspace: Where artifacts are and go.
        method: One of `methods.names.METHODS`.
        source: Artifact to go on from; without it what the recipe names, or else the newest features (for `dsg` the
            newest threshold).
        session: How it is run.

    Raises:
        DsgError: Anything the user can mend; all that can be known before weights are loaded, before they are.
    """
    check_method(method)
    origin = _origin(recipe, workspace, method, source, session)
    if method == "dsg":
        return _guardrail(recipe, workspace, origin, session)
    if METHODS[method].needs_sae and (origin is None or origin.header.kind != "features"):
        recipe = _with_sae(taken_from(recipe, origin), method)
        # The probe is for the gate of `dsg`, and costs more than all else.
        without = replace(recipe, select=replace(recipe.select, probe_features=0))
        origin = select.run(without, workspace, session=session)
    if METHODS[method].form == "model":
        return unlearn.run(recipe, workspace, method, origin=origin, session=session)
    if METHODS[method].form == "guardrail":
        return clamp.run(recipe, workspace, method, source=str(origin.path) if origin else None, session=session)
    return wrap.run(recipe, workspace, method, origin=origin, session=session)


def _origin(recipe: Recipe, workspace: Workspace, method: str, source: str | None, session: Session) -> Stored | None:
    """The artifact to go on from, if it is not the recipe that says what to read.

    Raises:
        DsgError: It is of a kind that the method cannot go on from, or there is none and nothing is named.
    """
    kinds = (*ORIGINS, "threshold") if method == "dsg" else ORIGINS
    if source is None:
        if recipe.corpora.forget or not METHODS[method].needs_forget:
            return None
        kind = "threshold" if method == "dsg" else "features"
        if not workspace.ids(kind):
            raise DsgError(
                f"Nothing says what {method} should unlearn.",
                f"Name corpora (--forget, --retain), or go on from {kind} ({MADE_BY[kind]}).",
            )
        source = session.named(workspace, kind, None)
        return workspace.find(kind, source)
    stored = workspace.read(source)
    if stored.header.kind not in kinds:
        raise DsgError(
            f"{method} cannot go on from {stored.id}.",
            f"It takes {', '.join(kinds)}. Artifacts compose when they are evaluated: dsg eval --from A --from B.",
        )
    return stored


def _guardrail(recipe: Recipe, workspace: Workspace, origin: Stored | None, session: Session) -> Stored:
    """`dsg` from wherever it goes on: the stages that are missing, then the guardrail."""
    if origin is None or origin.header.kind == "model":
        origin = select.run(_with_sae(taken_from(recipe, origin), "dsg"), workspace, session=session)
    if origin.header.kind == "features":
        origin = calibrate.run(recipe, workspace, source=str(origin.path), session=session)
    return apply.run(recipe, workspace, source=str(origin.path), session=session)


def _with_sae(recipe: Recipe, method: str) -> Recipe:
    """The recipe, if it names an SAE for its model.

    Raises:
        DsgError: It names a model and leaves the SAE to the default, which belongs to another.
    """
    if recipe.sae.source == SaeSection().source and recipe.model.source != ModelSection().source:
        raise DsgError(
            f"{method} needs an SAE of {recipe.model.source}, and none is named.",
            "Give one with --sae (`dsg ls saes`), or go on from features: --from features-001.",
        )
    return recipe
