"""`dsg apply --method static-clamp`, `conditional-clamp` or `refusal-clamp`: a guardrail without a gate.

Takes features by how often they are active on forget and on retain text (or from a steering file), cuts them out of
the SAE, tries on forget text that clamping them changes something, and writes guardrail-NNN with its tensors. Nothing
is calibrated: every hot token is clamped.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import Tensor

from dsg_cli.artifacts import FeatureSet, Guardrail, Json
from dsg_cli.methods import conditional_clamp, refusal_clamp, static_clamp
from dsg_cli.methods.clamping import Clamping
from dsg_cli.methods.names import section_of
from dsg_cli.methods.steering import Steering, check_same_sae, read_steering, steered_clamping
from dsg_cli.model import LoadedModel
from dsg_cli.recipe import Recipe
from dsg_cli.sae import SaeSource
from dsg_cli.slicing import detector_weights, slice_sae
from dsg_cli.stages.chain import chain_sae, load_chain_model, settle
from dsg_cli.stages.provenance import Clock, new_header
from dsg_cli.stages.session import QUIET, Session
from dsg_cli.stages.trial import Trial, forget_text, tried
from dsg_cli.tokens import bos_to_prepend, special_ids
from dsg_cli.workspace import Stored, Workspace

METHODS = ("static-clamp", "conditional-clamp", "refusal-clamp")
LONGEST = 128
"""Tokens of forget text in a row on which the guardrail is tried."""
HINT = "Take other features, more of them or a lower `above` (--set methods.{}), or pass --allow-ineffective."


def run(
    recipe: Recipe, workspace: Workspace, method: str, *, source: str | None = None, session: Session = QUIET
) -> Stored:
    """Build the guardrail from the newest features, or from those named, and write it.

    Args:
        recipe: Its settings are those of `methods` that are called like the method.
        workspace: Where the features are.
        method: One of `METHODS`.
        source: Features by id or path.
        session: How it is run.

    Raises:
        DsgError: Anything the user can mend; a guardrail that does nothing on what it should act on, unless the
            settings allow it.
    """
    assert method in METHODS
    source = session.named(workspace, "features", source)
    return session.write(workspace, lambda: _made(recipe, workspace, method, source, session))


def _made(recipe: Recipe, workspace: Workspace, method: str, source: str | None, session: Session) -> Stored:
    clock = Clock()
    features = workspace.find("features", source)
    workspace.check_writable()
    file = getattr(recipe.methods, section_of(method)).steering_file
    steering = read_steering(Path(file)) if file is not None else None
    assert features.header.sae is not None
    notes = check_same_sae(steering, features.header.sae.source) if steering is not None else []
    clamping = _clamping(recipe, method, workspace.tensors(features), features.body_as(FeatureSet), steering)
    forget, changed = forget_text(features, [one["name"] for one in features.header.settings["forget"]])
    sae = chain_sae(features.header.sae, features.id)
    recipe = settle(recipe, features.header)
    header = new_header(
        "guardrail",
        recipe,
        settings=_settings(recipe, method, steering),
        model=features.header.model,
        sae=features.header.sae,
        inputs=[features],
        notes=[*notes, *clamping.notes, *changed],
    )
    if session.reuse and (stored := workspace.matching(header)) is not None:
        return stored
    loaded = load_chain_model(features.header, recipe, cut=True)
    body, tensors = _guardrail(method, clamping, features, sae, loaded)
    hint = HINT.format(section_of(method))
    trial = Trial(forget, LONGEST, must_act=not recipe.guardrail.allow_ineffective, hint=hint)
    body, n_tokens = tried(loaded, header, body, tensors, trial)
    session.report("guardrail", 1, 1)
    return workspace.write(clock.close(header, n_tokens=n_tokens), body, tensors=tensors)


def _clamping(
    recipe: Recipe, method: str, statistics: dict[str, Tensor], body: FeatureSet, steering: Steering | None
) -> Clamping:
    """What the method, or the steering file in its place, makes of the features."""
    methods, norm = recipe.methods, body.median_residual_norm
    if steering is not None:
        n_features, clamps_features = len(statistics["retain_rate"]), methods.refusal_clamp.clamps_features
        return steered_clamping(steering, method, n_features=n_features, clamps_features=clamps_features)
    if method == "static-clamp":
        return static_clamp.clamping(statistics, methods.static_clamp, norm)
    if method == "conditional-clamp":
        return conditional_clamp.clamping(statistics, methods.conditional_clamp, norm)
    return refusal_clamp.clamping(statistics, methods.refusal_clamp, norm)


def _settings(recipe: Recipe, method: str, steering: Steering | None) -> Json:
    """For the header: a steering file by its name and digest, wherever it lies."""
    section: Json = dataclasses.asdict(getattr(recipe.methods, section_of(method)))
    if steering is not None:
        section |= {"steering_file": Path(section["steering_file"]).name, "steering_sha256": steering.sha256}
    return {"method": method, **section, "allow_ineffective": recipe.guardrail.allow_ineffective}


def _guardrail(
    method: str, clamping: Clamping, features: Stored, sae: SaeSource, loaded: LoadedModel
) -> tuple[Guardrail, dict[str, Tensor]]:
    """The guardrail, not tried yet, and its tensors."""
    slice_spec, tensors = slice_sae(sae, clamping.indices, clamping.detectors)
    tensors["detect"] = detector_weights(clamping.indices, clamping.detectors)
    selected = features.header.settings
    body = Guardrail(
        indices=clamping.indices,
        detectors=clamping.detectors,
        bias=0.0,
        clip=0.0,
        gate="token",
        window=0,
        threshold=0.5,
        strength=max(map(abs, clamping.coefficients)),
        strength_setting=clamping.setting,
        median_residual_norm=features.body_as(FeatureSet).median_residual_norm,
        hook=sae.site.name,
        hook_out=sae.write.name,
        activation=sae.identity.architecture,
        slice=dataclasses.asdict(slice_spec),
        special_ids=list(special_ids(loaded.tokenizer)),
        bos=bos_to_prepend(loaded.tokenizer, sae.identity.prepend_bos),
        forget=[corpus["name"] for corpus in selected["forget"]],
        retain=[corpus["name"] for corpus in selected["retain"]],
        strength_trials=[],
        effect={},
        method=method,
        clamp=clamping.clamp,
        coefficients=clamping.coefficients,
        above=clamping.above,
    )
    return body, tensors
