"""`dsg apply`: a method, and everything that later steps need of it in one artifact.

The paper's guardrail (`dsg`) cuts the selected features out of the SAE, resolves the strength, measures on forget text
that the gate fires and that the edit changes something, and writes guardrail-NNN with its tensors; so do the methods
that clamp features (methods/clamps.py). The model itself is not changed. Methods that change weights are in unlearn.py,
those that wrap the model in wrap.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from dsg_cli.data.corpora import Corpus, Part, check_disjoint, load_corpora
from dsg_cli.data.tokens import bos_to_prepend, encode, prompts, special_ids
from dsg_cli.errors import DsgError
from dsg_cli.evals.benches import load_tasks
from dsg_cli.evals.questions import Question, accuracy, questions_of
from dsg_cli.guardrail.guarded import Effect, measure_effect, module_from_artifact
from dsg_cli.inference.scoring import GuardedModel
from dsg_cli.lab import data as lab
from dsg_cli.methods import METHODS, check_method, section_of
from dsg_cli.methods.clamps import (
    Clamping,
    check_same_sae,
    conditional_clamping,
    read_steering,
    refusal_clamping,
    static_clamping,
    steered_clamping,
)
from dsg_cli.models.language_model import LoadedModel, context_length
from dsg_cli.models.sae_slice import slice_sae
from dsg_cli.settings import GuardrailSection, ModelSection, Recipe, SaeSection, parse_strength
from dsg_cli.stages import calibrate, select, unlearn, wrap
from dsg_cli.stages.inputs import chain_sae, check_tokens, load_chain_model, reload_corpora, taken_from
from dsg_cli.stages.stage import QUIET, RunOptions, Stage, settle, stage
from dsg_cli.workspace.artifacts import KINDS, FeatureSet, Guardrail, Threshold
from dsg_cli.workspace.body import Json
from dsg_cli.workspace.provenance import Clock
from dsg_cli.workspace.store import Stored, Workspace

ORIGINS = ("features", "model")
"""Kinds of artifacts that name a model and corpora; `dsg` also goes on from a threshold."""


def run_method(
    recipe: Recipe, workspace: Workspace, method: str, *, source: str | None = None, options: RunOptions = QUIET
) -> Stored:
    """Apply a method and write what it makes.

    `source` is the artifact to go on from; without it what the recipe names, or else the newest features (for `dsg` the
    newest threshold).
    """
    kind = check_method(method)
    origin = _origin(recipe, workspace, method, source, options)
    if method == "dsg":
        if origin is None or origin.header.kind == "model":
            origin = select.run(_with_sae(taken_from(recipe, origin), "dsg"), workspace, options=options)
        if origin.header.kind == "features":
            origin = calibrate.run(recipe, workspace, source=str(origin.path), options=options)
        return run(recipe, workspace, source=str(origin.path), options=options)
    if kind.needs_sae and (origin is None or origin.header.kind != "features"):
        recipe = _with_sae(taken_from(recipe, origin), method)
        # The probe is for the gate of `dsg`, and costs more than all else.
        without_probe = dataclasses.replace(recipe, select=dataclasses.replace(recipe.select, probe_features=0))
        origin = select.run(without_probe, workspace, options=options)
    if kind.form == "model":
        return unlearn.run(recipe, workspace, method, origin=origin, options=options)
    if kind.form == "guardrail":
        return run_clamp(recipe, workspace, method, source=str(origin.path) if origin else None, options=options)
    return wrap.run(recipe, workspace, method, origin=origin, options=options)


def _origin(
    recipe: Recipe, workspace: Workspace, method: str, source: str | None, options: RunOptions
) -> Stored | None:
    """The artifact to go on from, unless the recipe says what to read."""
    if source is None:
        if recipe.corpora.forget or not METHODS[method].needs_forget:
            return None
        kind = "threshold" if method == "dsg" else "features"
        if not workspace.ids(kind):
            raise DsgError(
                f"Nothing says what {method} should unlearn.",
                f"Name corpora (--forget, --retain), or go on from {kind} ({KINDS[kind].made_by}).",
            )
        return workspace.find(kind, options.newest(workspace, kind, None))
    origin = workspace.read(source)
    kinds = (*ORIGINS, "threshold") if method == "dsg" else ORIGINS
    if origin.header.kind not in kinds:
        raise DsgError(
            f"{method} cannot go on from {origin.id}.",
            f"It takes {', '.join(kinds)}. Artifacts compose when they are evaluated: dsg eval --from A --from B.",
        )
    return origin


def _with_sae(recipe: Recipe, method: str) -> Recipe:
    if recipe.sae.source == SaeSection().source and recipe.model.source != ModelSection().source:
        raise DsgError(
            f"{method} needs an SAE of {recipe.model.source}, and none is named.",
            "Give one with --sae (`dsg ls saes`), or go on from features: --from features-001.",
        )
    return recipe


AUTO = "auto"

SATURATED = 0.02
"""Accuracy above the lowest of all strengths that still counts as forgotten as well."""

HINT = "Select other features, calibrate at a higher --alpha or another --gate, or pass --allow-ineffective."


def run(recipe: Recipe, workspace: Workspace, *, source: str | None = None, options: RunOptions = QUIET) -> Stored:
    """Build the paper's guardrail from the newest threshold, or from the one named, and write it."""
    if options.workers.n > 1:
        return options.by_first(workspace, lambda alone: run(recipe, workspace, source=source, options=alone))
    clock = Clock()
    threshold = workspace.find("threshold", source)
    workspace.check_writable()
    calibrated = threshold.body_as(Threshold)
    is_auto = recipe.guardrail.strength == AUTO
    texts = [*recipe.guardrail.strengths] if is_auto else [recipe.guardrail.strength]
    strengths = [(text, parse_strength(text, calibrated.median_residual_norm)) for text in texts]
    header_settings: Json = dataclasses.asdict(recipe.guardrail)
    if calibrated.forget:
        forget, notes = reload_forget(threshold, calibrated.forget)
    else:
        forget, notes = forget_instead(recipe, threshold)
        header_settings |= {"forget": [{"name": corpus.name, "sha256": corpus.sha256} for corpus in forget]}
    names = calibrated.forget or [corpus.name for corpus in forget]
    questions = tuning_questions(recipe, names) if is_auto else []
    sae = chain_sae(threshold)
    recipe = settle(recipe, threshold.header)
    with stage("guardrail", recipe, workspace, options, clock, header_settings, origin=threshold, notes=notes) as this:
        if this.existing:
            return this.existing
        loaded = load_chain_model(threshold.header, recipe, cut=not is_auto)
        check_tokens(loaded, calibrated.special_ids, threshold.id)
        slice_spec, tensors = slice_sae(sae, calibrated.features, calibrated.detectors, calibrated.weights)
        body = Guardrail(
            indices=calibrated.features,
            detectors=calibrated.detectors,
            bias=calibrated.bias,
            clip=calibrated.clip,
            gate=calibrated.gate,
            window=calibrated.window,
            threshold=calibrated.threshold,
            strength=strengths[0][1],
            strength_setting=recipe.guardrail.strength,
            median_residual_norm=calibrated.median_residual_norm,
            hook=sae.site.name,
            hook_out=sae.write.name,
            activation=sae.identity.architecture,
            slice=dataclasses.asdict(slice_spec),
            special_ids=calibrated.special_ids,
            bos=calibrated.bos,
            forget=names,
            retain=calibrated.retain,
        )
        if is_auto:
            trials = []
            for setting, value in sorted(strengths, key=lambda pair: pair[1]):
                trial = body.replace(strength=value)
                module = module_from_artifact(trial, this.header.model, tensors, where="The new guardrail")
                guardrails, batch_size = [module.to(loaded.model.device)], recipe.eval.batch_size
                model = GuardedModel(loaded.model, loaded.tokenizer, body.bos, guardrails, batch_size=batch_size)
                result = accuracy(model, questions)
                rates = {name: result[name] for name in ("acc", "gate_rate")}
                trials.append({"strength": value, "setting": setting, **rates})
            lowest = min(trial["acc"] for trial in trials)
            # The smallest whose accuracy is that of the best one.
            strength = next(trial["strength"] for trial in trials if trial["acc"] <= lowest + SATURATED)
            body = body.replace(strength=strength, strength_trials=trials)
        hint = "" if recipe.guardrail.allow_ineffective else HINT
        longest = threshold.header.settings["lengths"][1]
        return _try_and_write(this, loaded, body, tensors, forget, longest=longest, hint=hint)


CLAMPINGS: dict[str, Callable[..., Clamping]] = {
    "static-clamp": static_clamping,
    "conditional-clamp": conditional_clamping,
    "refusal-clamp": refusal_clamping,
}
"""Method -> what it makes of the statistics of features."""

LONGEST = 128
"""Tokens of forget text in a row on which a clamp is tried."""

CLAMP_HINT = "Take other features, more of them or a lower `above` (--set methods.{}), or pass --allow-ineffective."


def run_clamp(
    recipe: Recipe, workspace: Workspace, method: str, *, source: str | None = None, options: RunOptions = QUIET
) -> Stored:
    """Build a guardrail that clamps from the newest features, or from those named, and write it."""
    assert method in CLAMPINGS
    if options.workers.n > 1:
        return options.by_first(
            workspace, lambda alone: run_clamp(recipe, workspace, method, source=source, options=alone)
        )
    clock = Clock()
    features = workspace.find("features", source)
    workspace.check_writable()
    settings = getattr(recipe.methods, section_of(method))
    section: Json = dataclasses.asdict(settings)
    steering, notes = None, list[str]()
    if settings.steering_file is not None:
        steering = read_steering(Path(settings.steering_file))
        assert features.header.sae is not None
        notes += check_same_sae(steering, features.header.sae.source)
        # By its name and digest, wherever it lies.
        section |= {"steering_file": Path(settings.steering_file).name, "steering_sha256": steering.sha256}
    feature_set, selected = features.body_as(FeatureSet), features.header.settings
    statistics, norm = workspace.tensors(features), feature_set.median_residual_norm
    if steering is None:
        clamping: Clamping = CLAMPINGS[method](statistics, settings, norm)
    else:
        n_features, clamps_features = len(statistics["retain_rate"]), recipe.methods.refusal_clamp.clamps_features
        clamping = steered_clamping(steering, method, n_features=n_features, clamps_features=clamps_features)
    forget_names = [corpus["name"] for corpus in selected["forget"]]
    forget, changes = reload_forget(features, forget_names)
    notes += [*clamping.notes, *changes]
    sae = chain_sae(features)
    recipe = settle(recipe, features.header)
    header_settings: Json = {"method": method, **section, "allow_ineffective": recipe.guardrail.allow_ineffective}
    with stage("guardrail", recipe, workspace, options, clock, header_settings, origin=features, notes=notes) as this:
        if this.existing:
            return this.existing
        loaded = load_chain_model(features.header, recipe, cut=True)
        slice_spec, tensors = slice_sae(sae, clamping.indices, clamping.detectors)
        body = Guardrail(
            indices=clamping.indices,
            detectors=clamping.detectors,
            gate="token",
            threshold=0.5,
            strength=max(map(abs, clamping.coefficients)),
            strength_setting=clamping.setting,
            median_residual_norm=feature_set.median_residual_norm,
            hook=sae.site.name,
            hook_out=sae.write.name,
            activation=sae.identity.architecture,
            slice=dataclasses.asdict(slice_spec),
            special_ids=list(special_ids(loaded.tokenizer)),
            bos=bos_to_prepend(loaded.tokenizer, sae.identity.prepend_bos),
            forget=forget_names,
            retain=[corpus["name"] for corpus in selected["retain"]],
            method=method,
            clamp=clamping.clamp,
            coefficients=clamping.coefficients,
            above=clamping.above,
        )
        hint = "" if recipe.guardrail.allow_ineffective else CLAMP_HINT.format(section_of(method))
        return _try_and_write(this, loaded, body, tensors, forget, longest=LONGEST, hint=hint)


UNSEEN = (
    "No text on what is to be forgotten is known, so the guardrail was not tried: nobody has seen it fire. Try it with "
    "--forget CORPUS, or on dev questions (--set guardrail.tuning_bench=NAME)."
)


def reload_forget(origin: Stored, names: Sequence[str]) -> tuple[list[Corpus], list[str]]:
    """The forget corpora of select as they are now, and a note on each that has changed since, or that there are none.

    The settings of `origin`, features or a threshold, say how they were read; of earlier versions only the names.
    """
    if not names:
        return [], [UNSEEN]
    settings = origin.header.settings
    limit, seed = settings.get("forget_limit", settings["limit"]), settings.get("forget_seed", origin.header.seed)
    return reload_corpora(origin, names, "forget", limit=limit, seed=seed, since="select")


def forget_instead(recipe: Recipe, threshold: Stored) -> tuple[list[Corpus], list[str]]:
    """What a guardrail is tried on if its features were picked without forget text, and notes.

    The forget corpora that apply is given; else dev questions, of the bench that a strength would be tuned on or of
    those that calibrate asked about; else nothing.
    """
    names, settings = recipe.corpora.forget, threshold.header.settings
    if names:
        check_disjoint(names, threshold.body_as(Threshold).retain)
        return load_corpora(names, role="forget", limit=recipe.corpora.limit, seed=recipe.seed), []
    texts: dict[str, list[str]] = {}
    if recipe.guardrail.tuning_bench is not None:
        texts = {recipe.guardrail.tuning_bench: [question.context for question in tuning_questions(recipe, [])]}
    elif settings.get("questions"):
        texts = calibrate.dev_questions(dataclasses.replace(recipe.calibrate, questions=settings["questions"]), [])
    if not texts:
        return [], [UNSEEN]
    digests = {bench: hashlib.sha256("\0".join(contexts).encode()).hexdigest() for bench, contexts in texts.items()}
    corpora = [Corpus(bench, contexts, digests[bench]) for bench, contexts in texts.items()]
    return corpora, [f"Tried on dev questions of {', '.join(texts)}, for want of a forget corpus."]


ROWS = 64
"""Of forget text, on which a guardrail is tried."""


def _try_and_write(
    this: Stage,
    loaded: LoadedModel,
    body: Guardrail,
    tensors: dict[str, Tensor],
    forget: Sequence[Corpus],
    *,
    longest: int,
    hint: str,
) -> Stored:
    """The guardrail, with what it did on forget text, where any is known.

    It is tried on the beginnings of up to `ROWS` documents, those first that selection has not seen, each of `longest`
    tokens at most. Without a hint what to do about it, it may do nothing.
    """
    rows: list[list[int]] = []
    if forget:
        rng, texts = random.Random(this.header.seed), list[str]()
        parts: tuple[Part, ...] = ("calibrate", "fresh", "select")
        for part in parts:
            more = [text for corpus in forget for text in prompts(loaded.tokenizer, corpus, part)]
            rng.shuffle(more)
            texts += more
            if len(texts) >= ROWS:
                break
        room = min(longest, context_length(loaded.model.config) - 1) + (body.bos is not None)
        rows = [row[:room] for row in encode(loaded.tokenizer, texts[:ROWS], bos=body.bos)]
        module = module_from_artifact(body, this.header.model, tensors, where="The new guardrail")
        effect = measure_effect(loaded, module.to(loaded.model.device), rows)
        if hint:
            check_effect(effect, hint)
        body = body.replace(effect=dataclasses.asdict(effect))
    this.job.progress("guardrail", 1, 1)
    return this.write(body, n_tokens=sum(map(len, rows)), tensors=tensors)


def check_effect(effect: Effect, hint: str = "") -> None:
    """Refuse a guardrail that does nothing."""
    if effect.gate_rate and effect.changed_rate and effect.edit:
        return
    what = "its edit changes nothing" if effect.gate_rate else "its gate never fires"
    raise DsgError(f"The guardrail would guard nothing: on {effect.n_rows} rows of the forget corpus {what}.", hint)


def check_strength(settings: GuardrailSection) -> None:
    """Refuse a bad strength before anything runs."""
    if settings.strength == AUTO and not settings.strengths:
        raise DsgError("guardrail.strengths is empty, so --strength auto has none to try.")
    for text in settings.strengths if settings.strength == AUTO else [settings.strength]:
        parse_strength(text, 1.0)


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
