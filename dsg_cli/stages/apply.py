"""`dsg apply`: everything that later steps need in one guardrail file.

Cuts the selected features out of the SAE, resolves the strength, measures on forget text that the gate fires and that
the edit changes something, and writes guardrail-NNN with its tensors. The model itself is not changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from dsg_cli.attacks.target import ask
from dsg_cli.data.corpora import Corpus, check_disjoint, load_corpora
from dsg_cli.data.tokens import bos_to_prepend, encode, prompts, special_ids
from dsg_cli.errors import DsgError
from dsg_cli.evals.benches import Question, load_tasks, questions_of
from dsg_cli.guardrail.guarded import Effect, measure_effect, module_from_artifact
from dsg_cli.lab import data as lab
from dsg_cli.methods import METHODS, check_method, section_of
from dsg_cli.methods.clamps import (
    Clamping,
    Steering,
    check_same_sae,
    conditional_clamping,
    read_steering,
    refusal_clamping,
    static_clamping,
    steered_clamping,
)
from dsg_cli.models.language_model import LoadedModel, context_length
from dsg_cli.models.sae import SaeSource
from dsg_cli.models.sae_slice import detector_weights, slice_sae
from dsg_cli.settings import GuardrailSection, ModelSection, Recipe, SaeSection, parse_strength
from dsg_cli.stages import calibrate, select, unlearn, wrap
from dsg_cli.stages.calibrate import dev_questions
from dsg_cli.stages.inputs import chain_sae, check_tokens, load_chain_model, taken_from
from dsg_cli.stages.stage import QUIET, RunOptions, new_header, settle
from dsg_cli.workspace.artifacts import MADE_BY, FeatureSet, Guardrail, Header, Threshold
from dsg_cli.workspace.provenance import Clock
from dsg_cli.workspace.results import Json
from dsg_cli.workspace.store import Stored, Workspace

SATURATED = 0.02
"""Accuracy above the lowest of all strengths that still counts as forgotten as well."""


def tuning_questions(recipe: Recipe, forget: Sequence[str]) -> list[Question]:
    """The questions that a strength is chosen on: the lab's dev questions, or those of a bench that is named."""
    bench = recipe.guardrail.tuning_bench or next((name for name in forget if name in lab.bench_names()), None)
    if bench is None:
        about = ", ".join(forget) or "what nobody names"
        raise DsgError(
            f"--strength auto has no questions to choose on: the lab has none on {about}.",
            "Name a bench that you will not report: --set guardrail.tuning_bench=NAME.",
        )
    if bench in recipe.eval.benches and bench not in lab.bench_names():
        raise DsgError(f"{bench} is reported, so no strength may be chosen on it.", "Name another tuning_bench.")
    tasks = load_tasks([bench], split="dev", include_path=recipe.eval.include_path)
    return [question for task in tasks for question in questions_of(task, limit=recipe.eval.limit)]


def smallest_sufficient(
    loaded: LoadedModel,
    header: Header,
    body: Guardrail,
    tensors: dict[str, Tensor],
    questions: Sequence[Question],
    strengths: Sequence[tuple[str, float]],
    *,
    batch_size: int,
) -> tuple[float, list[Json]]:
    """The smallest strength whose accuracy is that of the best one but for `SATURATED`, and all that were tried.

    Args:
        loaded: The whole model.
        header: Of the guardrail.
        body: The guardrail, whose strength does not matter.
        tensors: Its own.
        questions: On what is to be forgotten.
        strengths: As they are written, and as numbers.
        batch_size: Sequences in a batch.
    """
    trials: list[Json] = []
    for setting, strength in sorted(strengths, key=lambda one: one[1]):
        tried = dataclasses.replace(body, strength=strength)
        module = module_from_artifact(tried, header.model, tensors, where="The new guardrail")
        found = ask(
            loaded.model,
            loaded.tokenizer,
            questions,
            guardrails=[module.to(loaded.model.device)],
            bos=body.bos,
            batch_size=batch_size,
            max_length=context_length(loaded.model.config),
        )
        trials.append({"strength": strength, "setting": setting, "acc": found["acc"], "gate_rate": found["gate_rate"]})
    lowest = min(trial["acc"] for trial in trials)
    return next(trial["strength"] for trial in trials if trial["acc"] <= lowest + SATURATED), trials


ROWS = 64
"""Of forget text, on which the guardrail is tried."""

UNSEEN = (
    "No text on what is to be forgotten is known, so the guardrail was not tried: nobody has seen it fire. Try it with "
    "--forget CORPUS, or on dev questions (--set guardrail.tuning_bench=NAME)."
)


@dataclasses.dataclass(frozen=True)
class Trial:
    """On what a guardrail is tried, and whether it must do something there."""

    forget: Sequence[Corpus]
    longest: int
    """Tokens of a row, at most, BOS apart."""
    must_act: bool
    hint: str = "Select other features, calibrate at a higher --alpha or another --gate, or pass --allow-ineffective."
    """What to do about one that does nothing."""


def tried(
    loaded: LoadedModel, header: Header, body: Guardrail, tensors: dict[str, Tensor], trial: Trial
) -> tuple[Guardrail, int]:
    """The guardrail with what it did, and how many tokens it was tried on; as it is, if there is no text for that.

    Args:
        loaded: The model it was made for, whole or cut after the layer that it writes to.
        header: Its own; the seed says which rows are drawn.
        body: The guardrail.
        tensors: Its own.
        trial: On what.
    """
    if not trial.forget:
        return body, 0
    module = module_from_artifact(body, header.model, tensors, where="The new guardrail").to(loaded.model.device)
    rows = _rows(loaded, trial.forget, bos=body.bos, longest=trial.longest, seed=header.seed)
    effect = measure_effect(loaded, module, rows)
    if trial.must_act:
        check_effect(effect, trial.hint)
    return dataclasses.replace(body, effect=dataclasses.asdict(effect)), sum(map(len, rows))


def check_effect(effect: Effect, hint: str = "") -> None:
    """Refuse a guardrail that does nothing."""
    if effect.gate_rate and effect.changed_rate and effect.edit:
        return
    what = "its edit changes nothing" if effect.gate_rate else "its gate never fires"
    raise DsgError(f"The guardrail would guard nothing: on {effect.n_rows} rows of the forget corpus {what}.", hint)


def forget_text(made: Stored, names: Sequence[str]) -> tuple[list[Corpus], list[str]]:
    """The forget corpora of select as they are now, and a note on each that has changed since, or that there are none.

    Args:
        made: Features or a threshold, whose settings say how they were read.
        names: Of the corpora.
    """
    if not names:
        return [], [UNSEEN]
    settings = made.header.settings
    # Thresholds of earlier versions have only the names.
    described: dict[str, Json] = {name: {} for name in names}
    described |= {one["name"]: one for one in settings.get("forget", [])}
    forget = load_corpora(
        list(described),
        role="forget",
        limit=settings.get("forget_limit", settings["limit"]),
        seed=settings.get("forget_seed", made.header.seed),
        revisions={name: one["revision"] for name, one in described.items() if "revision" in one},
    )
    changed = [one.name for one in forget if one.sha256 != described[one.name].get("sha256", one.sha256)]
    return forget, [f"The forget corpus {name} has changed since select." for name in changed]


def text_instead(recipe: Recipe, threshold: Stored) -> tuple[list[Corpus], list[str]]:
    """What a guardrail is tried on if its features were picked without forget text, and notes.

    The forget corpora that apply is given; else dev questions, of the bench that a strength would be tuned on or of
    those that calibrate asked about; else nothing.

    Args:
        recipe: Names corpora and bench.
        threshold: Whose settings say which dev questions calibrate asked.
    """
    names, settings = recipe.corpora.forget, threshold.header.settings
    if names:
        check_disjoint(names, threshold.body_as(Threshold).retain)
        return load_corpora(names, role="forget", limit=recipe.corpora.limit, seed=recipe.seed), []
    asked: dict[str, list[str]] = {}
    if recipe.guardrail.tuning_bench is not None:
        questions = tuning_questions(recipe, [])
        asked = {recipe.guardrail.tuning_bench: [question.context for question in questions]}
    elif settings.get("questions"):
        asked = dev_questions(dataclasses.replace(recipe.calibrate, questions=settings["questions"]), [])
    if not asked:
        return [], [UNSEEN]
    found = [
        Corpus(bench, texts, hashlib.sha256("\0".join(texts).encode()).hexdigest()) for bench, texts in asked.items()
    ]
    return found, [f"Tried on dev questions of {', '.join(asked)}, for want of a forget corpus."]


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


AUTO = "auto"


def run(recipe: Recipe, workspace: Workspace, *, source: str | None = None, options: RunOptions = QUIET) -> Stored:
    """Build the guardrail from the newest threshold, or from the one named, and write it."""
    source = options.named(workspace, "threshold", source)
    return options.write(workspace, lambda: _made(recipe, workspace, source, options))


def _made(recipe: Recipe, workspace: Workspace, source: str | None, options: RunOptions) -> Stored:
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
    sae = chain_sae(threshold)
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
    if options.reuse and (stored := workspace.matching(header)) is not None:
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
    options.report("guardrail", 1, 1)
    return workspace.write(clock.close(header, n_tokens=n_tokens), body, tensors=tensors)


def _tried_on(forget: Sequence[Corpus]) -> Json:
    """What the settings say of text that the threshold does not name."""
    return {"forget": [{"name": corpus.name, "sha256": corpus.sha256} for corpus in forget]}


def check_strength(settings: GuardrailSection) -> None:
    """Refuse a bad strength before anything runs."""
    if settings.strength == AUTO and not settings.strengths:
        raise DsgError("guardrail.strengths is empty, so --strength auto has none to try.")
    for text in settings.strengths if settings.strength == AUTO else [settings.strength]:
        parse_strength(text, 1.0)


CLAMP_METHODS = ("static-clamp", "conditional-clamp", "refusal-clamp")

LONGEST = 128
"""Tokens of forget text in a row on which the guardrail is tried."""

HINT = "Take other features, more of them or a lower `above` (--set methods.{}), or pass --allow-ineffective."


def run_clamp(
    recipe: Recipe, workspace: Workspace, method: str, *, source: str | None = None, options: RunOptions = QUIET
) -> Stored:
    """Build the guardrail from the newest features, or from those named, and write it.

    Args:
        recipe: Its settings are those of `methods` that are called like the method.
        workspace: Where the features are.
        method: One of `METHODS`.
        source: Features by id or path.
        options: How it is run.
    """
    assert method in CLAMP_METHODS
    source = options.named(workspace, "features", source)
    return options.write(workspace, lambda: _made_clamp(recipe, workspace, method, source, options))


def _made_clamp(recipe: Recipe, workspace: Workspace, method: str, source: str | None, options: RunOptions) -> Stored:
    clock = Clock()
    features = workspace.find("features", source)
    workspace.check_writable()
    file = getattr(recipe.methods, section_of(method)).steering_file
    steering = read_steering(Path(file)) if file is not None else None
    assert features.header.sae is not None
    notes = check_same_sae(steering, features.header.sae.source) if steering is not None else []
    clamping = _clamping(recipe, method, workspace.tensors(features), features.body_as(FeatureSet), steering)
    forget, changed = forget_text(features, [one["name"] for one in features.header.settings["forget"]])
    sae = chain_sae(features)
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
    if options.reuse and (stored := workspace.matching(header)) is not None:
        return stored
    loaded = load_chain_model(features.header, recipe, cut=True)
    body, tensors = _guardrail(method, clamping, features, sae, loaded)
    hint = HINT.format(section_of(method))
    trial = Trial(forget, LONGEST, must_act=not recipe.guardrail.allow_ineffective, hint=hint)
    body, n_tokens = tried(loaded, header, body, tensors, trial)
    options.report("guardrail", 1, 1)
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
        return static_clamping(statistics, methods.static_clamp, norm)
    if method == "conditional-clamp":
        return conditional_clamping(statistics, methods.conditional_clamp, norm)
    return refusal_clamping(statistics, methods.refusal_clamp, norm)


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


ORIGINS = ("features", "model")
"""Kinds of artifacts that name a model and corpora; `dsg` also goes on from a threshold."""


def run_method(
    recipe: Recipe, workspace: Workspace, method: str, *, source: str | None = None, options: RunOptions = QUIET
) -> Stored:
    """Apply a method and write what it makes.

    Args:
        recipe: Model, corpora, SAE and the method's settings.
        workspace: Where artifacts are and go.
        method: One of `methods.names.METHODS`.
        source: Artifact to go on from; without it what the recipe names, or else the newest features (for `dsg` the
            newest threshold).
        options: How it is run.
    """
    check_method(method)
    origin = _origin(recipe, workspace, method, source, options)
    if method == "dsg":
        return _dsg_guardrail(recipe, workspace, origin, options)
    if METHODS[method].needs_sae and (origin is None or origin.header.kind != "features"):
        recipe = _with_sae(taken_from(recipe, origin), method)
        # The probe is for the gate of `dsg`, and costs more than all else.
        without = replace(recipe, select=replace(recipe.select, probe_features=0))
        origin = select.run(without, workspace, options=options)
    if METHODS[method].form == "model":
        return unlearn.run(recipe, workspace, method, origin=origin, options=options)
    if METHODS[method].form == "guardrail":
        return run_clamp(recipe, workspace, method, source=str(origin.path) if origin else None, options=options)
    return wrap.run(recipe, workspace, method, origin=origin, options=options)


def _origin(
    recipe: Recipe, workspace: Workspace, method: str, source: str | None, options: RunOptions
) -> Stored | None:
    """The artifact to go on from, if it is not the recipe that says what to read."""
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
        source = options.named(workspace, kind, None)
        return workspace.find(kind, source)
    stored = workspace.read(source)
    if stored.header.kind not in kinds:
        raise DsgError(
            f"{method} cannot go on from {stored.id}.",
            f"It takes {', '.join(kinds)}. Artifacts compose when they are evaluated: dsg eval --from A --from B.",
        )
    return stored


def _dsg_guardrail(recipe: Recipe, workspace: Workspace, origin: Stored | None, options: RunOptions) -> Stored:
    """`dsg` from wherever it goes on: the stages that are missing, then the guardrail."""
    if origin is None or origin.header.kind == "model":
        origin = select.run(_with_sae(taken_from(recipe, origin), "dsg"), workspace, options=options)
    if origin.header.kind == "features":
        origin = calibrate.run(recipe, workspace, source=str(origin.path), options=options)
    return run(recipe, workspace, source=str(origin.path), options=options)


def _with_sae(recipe: Recipe, method: str) -> Recipe:
    """The recipe, if it names an SAE for its model."""
    if recipe.sae.source == SaeSection().source and recipe.model.source != ModelSection().source:
        raise DsgError(
            f"{method} needs an SAE of {recipe.model.source}, and none is named.",
            "Give one with --sae (`dsg ls saes`), or go on from features: --from features-001.",
        )
    return recipe
