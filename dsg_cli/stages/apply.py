"""`dsg apply`: everything that later steps need in one guardrail file.

Cuts the selected features out of the SAE, resolves the strength, measures on forget text that the gate fires and that
the edit changes something, and writes guardrail-NNN with its tensors. The model itself is not changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dsg_cli.artifacts import Guardrail, Json, Threshold
from dsg_cli.corpora import Corpus
from dsg_cli.errors import DsgError
from dsg_cli.recipe import Recipe
from dsg_cli.settings import GuardrailSection
from dsg_cli.slicing import detector_weights, slice_sae
from dsg_cli.stages.chain import chain_sae, check_tokens, load_chain_model, settle
from dsg_cli.stages.provenance import Clock, new_header
from dsg_cli.stages.session import QUIET, Session
from dsg_cli.stages.trial import Trial, forget_text, text_instead, tried
from dsg_cli.stages.tuning import smallest_sufficient, tuning_questions
from dsg_cli.strength import parse_strength
from dsg_cli.workspace import Stored, Workspace

AUTO = "auto"


def run(recipe: Recipe, workspace: Workspace, *, source: str | None = None, session: Session = QUIET) -> Stored:
    """Build the guardrail from the newest threshold, or from the one named, and write it.

    Raises:
        DsgError: Anything the user can mend; a guardrail that does nothing on what it should act on, unless the
            settings allow it.
    """
    source = session.named(workspace, "threshold", source)
    return session.write(workspace, lambda: _made(recipe, workspace, source, session))


def _made(recipe: Recipe, workspace: Workspace, source: str | None, session: Session) -> Stored:
    clock = Clock()
    threshold = workspace.find("threshold", source)
    workspace.check_writable()
    set_at = threshold.body_as(Threshold)
    is_auto = recipe.guardrail.strength == AUTO
    settings = [*recipe.guardrail.strengths] if is_auto else [recipe.guardrail.strength]
    strengths = [(text, parse_strength(text, set_at.median_residual_norm)) for text in settings]
    forget, notes = forget_text(threshold, set_at.forget) if set_at.forget else text_instead(recipe, threshold)
    names = set_at.forget or [corpus.name for corpus in forget]
    questions = tuning_questions(recipe, names) if is_auto else []
    assert threshold.header.sae is not None
    sae = chain_sae(threshold.header.sae, threshold.id)
    recipe = settle(recipe, threshold.header)
    header = new_header(
        "guardrail",
        recipe,
        settings={**dataclasses.asdict(recipe.guardrail), **({} if set_at.forget else _tried_on(forget))},
        model=threshold.header.model,
        sae=threshold.header.sae,
        inputs=[threshold],
        notes=notes,
    )
    if session.reuse and (stored := workspace.matching(header)) is not None:
        return stored
    loaded = load_chain_model(threshold.header, recipe, cut=not is_auto)
    check_tokens(loaded, set_at.special_ids, threshold.id)
    slice_spec, tensors = slice_sae(sae, set_at.features, set_at.detectors)
    tensors["detect"] = detector_weights(set_at.features, set_at.detectors, set_at.weights)
    body = Guardrail(
        indices=set_at.features,
        detectors=set_at.detectors,
        bias=set_at.bias,
        clip=set_at.clip,
        gate=set_at.gate,
        window=set_at.window,
        threshold=set_at.threshold,
        strength=strengths[0][1],
        strength_setting=recipe.guardrail.strength,
        median_residual_norm=set_at.median_residual_norm,
        hook=sae.site.name,
        hook_out=sae.write.name,
        activation=sae.identity.architecture,
        slice=dataclasses.asdict(slice_spec),
        special_ids=set_at.special_ids,
        bos=set_at.bos,
        forget=names,
        retain=set_at.retain,
        strength_trials=[],
        effect={},
        method="dsg",
        clamp="all",
        coefficients=[],
        above=[],
    )
    if is_auto:
        batch_size = recipe.eval.batch_size
        strength, trials = smallest_sufficient(
            loaded, header, body, tensors, questions, strengths, batch_size=batch_size
        )
        body = dataclasses.replace(body, strength=strength, strength_trials=trials)
    longest = threshold.header.settings["lengths"][1]
    trial = Trial(forget, longest, must_act=not recipe.guardrail.allow_ineffective)
    body, n_tokens = tried(loaded, header, body, tensors, trial)
    session.report("guardrail", 1, 1)
    return workspace.write(clock.close(header, n_tokens=n_tokens), body, tensors=tensors)


def _tried_on(forget: Sequence[Corpus]) -> Json:
    """What the settings say of text that the threshold does not name."""
    return {"forget": [{"name": corpus.name, "sha256": corpus.sha256} for corpus in forget]}


def check_strength(settings: GuardrailSection) -> None:
    """Refuse a bad strength before anything runs.

    Raises:
        DsgError: It is one, or `auto` has none to try.
    """
    if settings.strength == AUTO and not settings.strengths:
        raise DsgError("guardrail.strengths is empty, so --strength auto has none to try.")
    for text in settings.strengths if settings.strength == AUTO else [settings.strength]:
        parse_strength(text, 1.0)
