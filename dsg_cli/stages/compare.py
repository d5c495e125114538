"""`dsg compare`: every method on the same model, text and questions, and what each costs.

For each method the same number of settings is tried on dev questions; the best is applied once, evaluated on test
questions through lm-eval, and attacked by relearning; then the same further requests are given to each method, one
after another. Writes compare-NNN with every trial, and the artifacts of what was chosen. Or, with artifacts that are
named, collects those without a search.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsg_cli.data.tokens import bos_to_prepend
from dsg_cli.errors import DsgError
from dsg_cli.evals.metrics import unlearning_score
from dsg_cli.evals.questions import Question, accuracy, chance_of, check_bench, default_bench, load_questions
from dsg_cli.inference.scoring import GuardedModel
from dsg_cli.lab import data as lab
from dsg_cli.methods import METHODS, check_method, finetunes, section_of
from dsg_cli.models.language_model import load_model
from dsg_cli.recipe import with_values
from dsg_cli.settings import CompareSection, Recipe, values_at
from dsg_cli.stages import attack, evaluate
from dsg_cli.stages.apply import run_method
from dsg_cli.stages.composition import Composition, find_composition, load_composition
from dsg_cli.stages.inputs import identify, named_model
from dsg_cli.stages.stage import QUIET, RunOptions, settle, stage
from dsg_cli.workspace.artifacts import ModelWeights
from dsg_cli.workspace.body import Json
from dsg_cli.workspace.checkpoints import Checkpoint
from dsg_cli.workspace.provenance import Clock, reset_peak_memory
from dsg_cli.workspace.results import AttackReport, Comparison, EvalReport
from dsg_cli.workspace.store import Stored, Workspace

CRITERION = "harmonic mean of forgetting (fall of forget accuracy to chance) and utility (other accuracy over base)"

Values = dict[str, Any]
"""Dotted keys of a recipe, and what they are set to."""


def run(recipe: Recipe, workspace: Workspace, *, sources: Sequence[str] = (), options: RunOptions = QUIET) -> Stored:
    """Compare methods, or the artifacts that are named, and write what was found.

    `sources` are collected instead of a search: `guardrail-001`, or `model-001+guardrail-002` for what acts together.
    """
    clock, section = Clock(), recipe.compare
    if options.workers.n > 1:
        raise DsgError("dsg compare runs in one process.", "Run it without torchrun.")
    for name in section.methods:
        check_method(name)
    for name in compared_methods(section):
        for values in settings_to_try(name, section, recipe.seed):
            with_values(recipe, values)
    collected = [find_composition(workspace, source.split("+")) for source in sources]
    for member in (member for composition in collected for member in composition.described()):
        if finetunes(member["method"]):
            raise DsgError(f"{member['id']} was taught, and has unlearned nothing to be compared.", "Leave it out.")
    forget_names = recipe.corpora.forget or (collected[0].forget() if collected else [])
    if not forget_names and not sources:
        unclear = "Nothing says what the methods should unlearn."
        raise DsgError(unclear, "Name corpora: --forget, --retain, or a recipe.")
    forget = section.forget or default_bench(forget_names)
    benches = [forget, *section.near, *section.other]
    if len(set(benches)) < len(benches):
        raise DsgError("A bench stands twice in compare.forget, near and other.", "Name each once.")
    for request in section.sequence:
        default_bench([request])
    workspace.check_writable()
    questions = {} if sources else _dev_questions(recipe, benches)
    for bench in benches:
        check_bench(bench)
    recipe = settle(recipe)
    source = collected[0].base if collected else named_model(workspace, recipe.model.source)
    loaded = load_model(source, recipe.model)
    bos = bos_to_prepend(loaded.tokenizer, False)
    model = GuardedModel(loaded.model, loaded.tokenizer, bos, batch_size=recipe.eval.batch_size)
    base = accuracies(model, questions) if questions else {}
    chance = chance_of(questions.get(forget, []))
    header_settings: Json = dataclasses.asdict(recipe) | {"collected": list(sources)}
    del header_settings["generate"], header_settings["published"]  # Nothing of them is computed from.
    inputs = [stored for composition in collected for stored in composition.named]
    identity = identify(loaded, loaded.n_layers - 1)
    with stage("compare", recipe, workspace, options, clock, header_settings, inputs=inputs, model=identity) as this:
        if this.existing:
            return this.existing
        # What was made before, by this run before it was interrupted or by another, is not made again.
        inner = dataclasses.replace(options, reuse=True, resume=False)
        rivals = Rivals(recipe, workspace, forget, questions, base, chance, inner, this.job.checkpoint)
        trials = {name: rivals.search(name) for name in compared_methods(section)} if not sources else {}
        rows = [rivals.collect(source) for source in sources]
        chosen: dict[str, Values | None] = {}
        for name, of_method in trials.items():
            if of_method:  # If every trial failed, the row says why.
                chosen[name] = next((trial["values"] for trial in of_method if trial["is_chosen"]), None)
            else:  # Nothing to choose: the method has one setting.
                (chosen[name],) = rivals.points(name)
            rows += rivals.rows(name, chosen[name], of_method)
        sequences = [
            rivals.sequence(name, values) for name, values in chosen.items() if values is not None and section.sequence
        ]
        # Test results of the base model are the same in every evaluation.
        evaluated = next((row["eval"] for row in rows if row["eval"]), None)
        test: Json = {}
        if evaluated is not None:
            results = workspace.find("eval", evaluated).body_as(EvalReport).results
            test = {bench: sides["base"] for bench, sides in results.items()}
        body = Comparison(
            benches={"forget": forget, "near": section.near, "other": section.other},
            chance=chance,
            criterion=CRITERION,
            base={"dev": base, "test": test},
            rows=rows,
            trials=[trial for of_method in trials.values() for trial in of_method],
            sequences=sequences,
        )
        return this.write(body)


def compared_methods(section: CompareSection) -> list[str]:
    """The methods that are meant, each once, in their order."""
    return [name for name in METHODS if not finetunes(name) and (not section.methods or name in section.methods)]


def settings_to_try(method: str, section: CompareSection, seed: int) -> list[Values]:
    """The whole grid of a method, or as many points of it, drawn with the seed, as the budget has."""
    grid = section.grids.get(method, {})
    keys = [key if "." in key else f"methods.{section_of(method)}.{key}" for key in grid]
    points = [dict(zip(keys, values, strict=True)) for values in itertools.product(*grid.values())]
    if len(points) <= section.budget:
        return points
    drawn = random.Random(f"{seed}/{method}").sample(range(len(points)), section.budget)
    return [points[i] for i in sorted(drawn)]


def best_trial(trials: Sequence[Json]) -> int | None:
    """The number of the trial with the highest score, of several the first; None if every one failed."""
    whole = [number for number, trial in enumerate(trials) if trial["score"] is not None]
    return max(whole, key=lambda number: trials[number]["score"], default=None)


def _dev_questions(recipe: Recipe, benches: Sequence[str]) -> dict[str, list[Question]]:
    """What settings are searched on, never what is reported; nothing where there is nothing to choose."""
    section = recipe.compare
    names = {bench: section.dev.get(bench, bench) for bench in benches}
    reported = [bench for bench, name in names.items() if name in benches and name not in lab.bench_names()]
    questions = {bench: load_questions(name, recipe.eval, "dev") for bench, name in names.items()}
    if not reported:
        return questions
    searched = [name for name in compared_methods(section) if len(settings_to_try(name, section, recipe.seed)) > 1]
    if searched:
        raise DsgError(
            f"{reported[0]} is reported, so the settings of {searched[0]} cannot be searched on it.",
            f"Name other questions on the same with compare.dev={{{reported[0]}: BENCH}}, or give no compare.grids.",
        )
    return {}


def accuracies(model: GuardedModel, questions: Mapping[str, Sequence[Question]]) -> dict[str, float]:
    """Accuracy on the questions of each bench."""
    return {bench: accuracy(model, of_bench)["acc"] for bench, of_bench in questions.items()}


@dataclass(frozen=True)
class Rivals:
    """The same search, evaluation, attack and requests for every method."""

    recipe: Recipe
    workspace: Workspace
    forget: str
    """The bench on what is to be forgotten."""
    questions: Mapping[str, Sequence[Question]]
    """Dev questions by bench; none where there is nothing to choose."""
    base: Mapping[str, float]
    """Accuracy of the base model on them."""
    chance: float
    options: RunOptions
    checkpoint: Checkpoint
    base_curves: dict[str, dict[str, list[Json]]] = field(default_factory=dict)
    """What attacks found of unguarded models: the same for every row."""

    @property
    def test_values(self) -> Values:
        """How what was chosen is evaluated."""
        section = self.recipe.compare
        benches = [self.forget, *section.near, *section.other]
        return {"eval.benches": benches, "eval.split": "test", "guardrail.allow_ineffective": True}

    def points(self, name: str) -> list[Values]:
        """The settings that are to be tried, as a recipe has them."""
        points = settings_to_try(name, self.recipe.compare, self.recipe.seed)
        return [values_at(with_values(self.recipe, values), values) for values in points]

    def search(self, name: str) -> list[Json]:
        """Every trial of a method, the best one marked; those that an interrupted run had done are not done again.

        Without dev questions there is none: nothing can be, and nothing need be, chosen.
        """
        points = self.points(name) if self.questions else []
        trials: list[Json] = (self.checkpoint.entry(f"trials/{name}") or {"trials": []})["trials"]
        # Features that trials share are computed once: they lie in one scratch workspace until the method is done.
        with tempfile.TemporaryDirectory(prefix=".compare-", suffix=".tmp", dir=self.workspace.folder) as scratch:
            for number, values in enumerate(points[len(trials) :], start=len(trials) + 1):
                self.options.say(f"{name}: trial {number} of {len(points)}")
                trials = [*trials, self._trial(name, values, Workspace(Path(scratch)))]
                self.checkpoint.keep(f"trials/{name}", {"trials": trials})
                self.checkpoint.write()
        best = best_trial(trials)
        return [{**trial, "is_chosen": number == best} for number, trial in enumerate(trials)]

    def _trial(self, name: str, values: Values, scratch: Workspace) -> Json:
        begun = time.monotonic()
        trial: Json = {"method": name, "values": values, "dev": {}, "is_chosen": False, "error": ""}
        recipe = with_values(self.recipe, values)
        try:
            stored = run_method(recipe, scratch, name, options=dataclasses.replace(self.options, resume=False))
            composition = find_composition(scratch, [stored.id])
            loaded = load_composition(scratch, composition, recipe)
            dev = accuracies(loaded.unlearned_model(recipe.eval.batch_size), self.questions)
            # A model may be large; features that further trials share are small.
            shutil.rmtree(scratch.folder / stored.id, ignore_errors=True)
            trial |= {
                "dev": dev,
                "forget": dev[self.forget],
                **unlearning_score(self.forget, dev, self.base, self.chance),
            }
        except DsgError as error:
            trial |= {**dict.fromkeys(("forget", "forgetting", "utility", "score")), "error": error.message}
        return {**trial, "seconds": round(time.monotonic() - begun, 3)}

    def rows(self, name: str, values: Values | None, trials: Sequence[Json]) -> list[Json]:
        """What was chosen of a method, applied, evaluated and attacked; on every SAE, if it needs one."""
        rows = []
        for sae in [self.recipe.sae.source, *self.recipe.compare.saes] if METHODS[name].needs_sae else [""]:
            row = _empty_row(name, sae, values or {})
            try:
                if values is None:
                    raise DsgError(trials[-1]["error"] if trials else "no trial")
                self.options.say(f"{name}{f' on SAE {sae}' if sae else ''}: applying what was chosen")
                reset_peak_memory(self.recipe.model.device)
                on_sae = with_values(self.recipe, values | ({"sae.source": sae} if sae else {}))
                stored = run_method(on_sae, self.workspace, name, options=self.options)
                rows.append(row | self._measures([stored.id]))
            except DsgError as error:
                rows.append(row | {"error": error.message})
        return rows

    def collect(self, source: str) -> Json:
        composition = find_composition(self.workspace, source.split("+"))
        name = " + ".join(member["method"] for member in composition.described())
        sae = composition.header.sae
        row = _empty_row(name, sae.source if sae is not None else "", {})
        return row | self._measures(source.split("+"))

    def _measures(self, sources: Sequence[str]) -> Json:
        """What acts, evaluated on test questions and attacked by relearning."""
        section, workspace = self.recipe.compare, self.workspace
        measured = with_values(self.recipe, self.test_values)
        evaluated = evaluate.run(measured, workspace, sources=sources, options=self.options)
        report = evaluated.body_as(EvalReport)
        composition = find_composition(workspace, sources)
        features = {
            index
            for stored in composition.named
            for key in ("indices", "detectors", "features")
            for index in stored.json.get(key, [])
        }
        measures: Json = {
            "artifacts": [member["id"] for member in composition.described()],
            "eval": evaluated.id,
            "results": {bench: report.results[bench]["unlearned"] for bench in self.test_values["eval.benches"]},
            "gate": {bench: rate["rate"] for bench, rate in report.gate.items()},
            "cost": cost_of(workspace, composition),
            "n_features": len(features),
        }
        if section.relearn_steps:
            values: Values = {
                "attack.bench": self.forget,
                "attack.utility_bench": section.near[0] if section.near else None,
                "attack.relearn_steps": section.relearn_steps,
                "attack.relearn_learning_rates": [section.relearn_learning_rate],
                "attack.relearn_parameters": ["all"],
                "attack.relearn_guard": ["loop"],
                "attack.relearn_data": ["forget"],
                "eval.split": "test",
            }
            (attacked,) = attack.run(
                with_values(self.recipe, values),
                workspace,
                ["relearn"],
                sources=sources,
                options=self.options,
                base_curves=self.base_curves,
            )
            last = attacked.body_as(AttackReport).curve[-1]
            measures["attack"] = attacked.id
            measures["relearned"] = {
                "x": last["x"],
                "guarded": last["unlearned"]["forget_acc"],
                "unguarded": last["base"]["forget_acc"],
            }
        return measures

    def sequence(self, name: str, values: Values) -> Json:
        """Further requests, one after another: `{method, curve: [{request, artifacts, results: {bench: acc}}], error}`.

        All are measured on test questions of every request.
        """
        recipe = with_values(self.recipe, values)
        section = recipe.compare
        requests = [*recipe.corpora.forget[:1], *section.sequence]
        of_requests = [self.forget, *(default_bench([request]) for request in requests[1:])]
        benches = list(dict.fromkeys([*of_requests, *section.near, *section.other]))
        measured = with_values(recipe, self.test_values | {"eval.benches": benches})
        acting: list[str] = []
        curve: list[Json] = []
        for number, request in enumerate(requests):
            self.options.say(f"{name}: request {number + 1} of {len(requests)}, {request}")
            try:
                acting = self._meet(recipe, name, requests[: number + 1], acting)
                report = evaluate.run(measured, self.workspace, sources=acting, options=self.options)
            except DsgError as error:
                return {"method": name, "curve": curve, "error": error.message}
            sides = report.body_as(EvalReport).results
            curve.append(
                {
                    "request": request,
                    "artifacts": list(acting),
                    "eval": report.id,
                    "results": {bench: sides[bench]["unlearned"]["acc"] for bench in benches},
                }
            )
        return {"method": name, "curve": curve, "error": ""}

    def _meet(self, recipe: Recipe, name: str, requests: Sequence[str], acting: Sequence[str]) -> list[str]:
        """What acts once the last request has been met."""
        changes_weights = METHODS[name].form == "model"
        if len(requests) > 1:
            # What has been asked to be forgotten is not held fast any more.
            retain = [corpus for corpus in recipe.corpora.retain if corpus.partition("=")[0] not in requests]
            changes: Values = {"corpora.forget": [requests[-1]], "corpora.retain": retain}
            if changes_weights:
                changes["model.source"] = acting[-1]
            recipe = with_values(recipe, changes)
        stored = run_method(recipe, self.workspace, name, options=self.options)
        return [stored.id] if changes_weights else [*acting, stored.id]


def _empty_row(name: str, sae: str, values: Values) -> Json:
    nothing: Json = {"artifacts": [], "eval": "", "attack": "", "results": {}, "gate": {}, "relearned": {}, "cost": {}}
    return {"method": name, "sae": sae, "values": values, **nothing, "n_features": 0, "error": ""}


def cost_of(workspace: Workspace, composition: Composition) -> Json:
    """`{forward_tokens, backward_tokens, seconds, peak_memory_mb, bytes}` of everything that led to a composition.

    Tokens are those that passed through the model or a part of it; bytes are those of what later steps read.
    """
    chain = {stored.json["sha256"]: stored for last in composition.artifacts for stored in _chain(workspace, last)}
    headers = [stored.header for stored in chain.values()]
    weights = [stored.body for stored in chain.values() if isinstance(stored.body, ModelWeights)]
    return {
        "forward_tokens": sum(header.n_tokens for header in headers),
        "backward_tokens": sum(body.cost["backward_tokens"] for body in weights),
        "seconds": round(sum(header.seconds for header in headers), 1),
        "peak_memory_mb": max(header.peak_memory_mb for header in headers),
        "bytes": sum(_size(stored) for stored in composition.artifacts),
    }


def _chain(workspace: Workspace, stored: Stored) -> Iterator[Stored]:
    """An artifact and all that it was computed from, as far as it is in the workspace."""
    yield stored
    for origin in workspace.readable(named.id for named in stored.header.inputs):
        yield from _chain(workspace, origin)


def _size(stored: Stored) -> int:
    if not stored.path.is_file() or stored.path.suffix == ".safetensors":
        return stored.path.stat().st_size
    return stored.path.stat().st_size + sum((stored.path.parent / name).stat().st_size for name in stored.header.files)
