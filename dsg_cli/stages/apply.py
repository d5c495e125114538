"""`dsg apply`: everything that later steps need in one guardrail file.

Cuts the selected features out of the SAE, resolves the strength, measures on forget text that the gate fires and that
the edit changes something, and writes guardrail-NNN with its tensors. The model itself is not changed.
"""

from __future__ import annotations

import dataclasses
import math
import random
import re
from collections.abc import Sequence

from dsg_cli.artifacts import Guardrail, Json, Threshold
from dsg_cli.corpora import Corpus, load_corpora
from dsg_cli.effect import Effect, measure_effect
from dsg_cli.errors import DsgError
from dsg_cli.guardrail import module_from_artifact
from dsg_cli.model import LoadedModel, context_length
from dsg_cli.prompting import prompts
from dsg_cli.recipe import Recipe
from dsg_cli.settings import GuardrailSection
from dsg_cli.slicing import detector_weights, slice_sae
from dsg_cli.stages.chain import chain_sae, check_tokens, load_chain_model, settle
from dsg_cli.stages.provenance import Clock, new_header
from dsg_cli.stages.session import QUIET, Session
from dsg_cli.stages.tuning import smallest_sufficient, tuning_questions
from dsg_cli.tokens import encode
from dsg_cli.workspace import Stored, Workspace

AUTO = "auto"
ROWS = 64
"""Of forget text, on which the guardrail is tried."""
LARGEST_STRENGTH = 1e6
"""Beyond this a clamped residual loses its meaning, and float32 soon its range."""


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
    questions = tuning_questions(recipe, set_at.forget) if is_auto else []
    forget, notes = _forget_text(threshold)
    assert threshold.header.sae is not None
    sae = chain_sae(threshold.header.sae, threshold.id)
    recipe = settle(recipe, threshold.header)
    header = new_header(
        "guardrail",
        recipe,
        settings=dataclasses.asdict(recipe.guardrail),
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
        forget=set_at.forget,
        retain=set_at.retain,
        strength_trials=[],
        effect={},
    )
    if is_auto:
        batch_size = recipe.eval.batch_size
        strength, trials = smallest_sufficient(
            loaded, header, body, tensors, questions, strengths, batch_size=batch_size
        )
        body = dataclasses.replace(body, strength=strength, strength_trials=trials)
    module = module_from_artifact(body, header.model, tensors, where="The new guardrail").to(loaded.model.device)
    longest = threshold.header.settings["lengths"][1]
    rows = _rows(loaded, forget, bos=set_at.bos, longest=longest, seed=recipe.seed)
    effect = measure_effect(loaded, module, rows)
    session.report("guardrail", 1, 1)
    if not recipe.guardrail.allow_ineffective:
        check_effect(effect)
    body = dataclasses.replace(body, effect=dataclasses.asdict(effect))
    n_tokens = sum(map(len, rows))
    return workspace.write(clock.close(header, n_tokens=n_tokens), body, tensors=tensors)


def check_effect(effect: Effect) -> None:
    """Refuse a guardrail that does nothing.

    Raises:
        DsgError: Its gate never fires on forget text, or its edit changes nothing there.
    """
    if effect.gate_rate and effect.changed_rate and effect.edit:
        return
    what = "its edit changes nothing" if effect.gate_rate else "its gate never fires"
    raise DsgError(
        f"The guardrail would guard nothing: on {effect.n_rows} rows of the forget corpus {what}.",
        "Select other features, calibrate at a higher --alpha or another --gate, or pass --allow-ineffective.",
    )


def _forget_text(threshold: Stored) -> tuple[list[Corpus], list[str]]:
    """The forget corpora of select as they are now, and a note on each that has changed since.

    Raises:
        DsgError: One cannot be read any more.
    """
    settings = threshold.header.settings
    # Earlier thresholds have only the names.
    described: dict[str, Json] = {name: {} for name in threshold.body_as(Threshold).forget}
    described |= {one["name"]: one for one in settings.get("forget", [])}
    forget = load_corpora(
        list(described),
        role="forget",
        limit=settings.get("forget_limit", settings["limit"]),
        seed=settings.get("forget_seed", threshold.header.seed),
        revisions={name: one["revision"] for name, one in described.items() if "revision" in one},
    )
    changed = [one.name for one in forget if one.sha256 != described[one.name].get("sha256", one.sha256)]
    return forget, [f"The forget corpus {name} has changed since select." for name in changed]


def _rows(
    loaded: LoadedModel, forget: Sequence[Corpus], *, bos: int | None, longest: int, seed: int
) -> list[list[int]]:
    """The beginnings of up to `ROWS` forget documents, those first that selection has not seen."""
    rng = random.Random(seed)
    texts: list[str] = []
    for part in ("calibrate", "fresh", "select"):
        more = [text for corpus in forget for text in prompts(loaded.tokenizer, corpus, part)]
        rng.shuffle(more)
        texts += more
        if len(texts) >= ROWS:
            break
    room = min(longest, context_length(loaded.model.config) - 1) + (bos is not None)
    return [row[:room] for row in encode(loaded.tokenizer, texts[:ROWS], bos=bos)]


def check_strength(settings: GuardrailSection) -> None:
    """Refuse a bad strength before anything runs.

    Raises:
        DsgError: It is one, or `auto` has none to try.
    """
    if settings.strength == AUTO and not settings.strengths:
        raise DsgError("guardrail.strengths is empty, so --strength auto has none to try.")
    for text in settings.strengths if settings.strength == AUTO else [settings.strength]:
        parse_strength(text, 1.0)


def parse_strength(text: str, median_residual_norm: float) -> float:
    """c from `500`, or from `2r`: twice the median residual norm at the hook.

    Raises:
        DsgError: Neither, or not a positive finite number.
    """
    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(r?)\s*", text)
    try:
        value = float(match[1]) * (median_residual_norm if match[2] else 1.0) if match else math.nan
    except ValueError:
        value = math.nan
    if not 0 < value < LARGEST_STRENGTH:
        raise DsgError(
            f"The strength {text!r} is not a positive number of sensible size.",
            "Give --strength 500, a multiple of the median residual norm such as --strength 16r, or --strength auto.",
        )
    return value
