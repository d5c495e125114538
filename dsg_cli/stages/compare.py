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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsg_cli.attacks.target import ask, chance_of
from dsg_cli.data.tokens import bos_to_prepend
from dsg_cli.errors import DsgError
from dsg_cli.evals.benches import Question
from dsg_cli.evals.metrics import judged
from dsg_cli.guardrail.runtime.guardrail import GuardrailModule
from dsg_cli.inference.wrappers import WrapperModule
from dsg_cli.lab import data as lab
from dsg_cli.methods import METHODS, check_method, section_of, teaches
from dsg_cli.models.language_model import LoadedModel, context_length, load_model
from dsg_cli.recipe import values_at, with_values
from dsg_cli.settings import CompareSection, Recipe
from dsg_cli.stages import attack, evaluate
from dsg_cli.stages.apply import run_method
from dsg_cli.stages.attack import default_bench
from dsg_cli.stages.inputs import Composition, find_composition, identify, load_composition, named_model
from dsg_cli.stages.stage import QUIET, RunOptions, new_header, settle
from dsg_cli.workspace.artifacts import Header, ModelWeights
from dsg_cli.workspace.checkpoints import Checkpoint
from dsg_cli.workspace.provenance import Clock
from dsg_cli.workspace.results import AttackReport, Comparison, EvalReport, Json
from dsg_cli.workspace.store import Stored, Workspace

CRITERION = "harmonic mean of forgetting (fall of forget accuracy to chance) and utility (other accuracy over base)"

Values = dict[str, Any]
"""Dotted keys of a recipe, and what they are set to."""


def compared(section: CompareSection) -> list[str]:
    """The methods that are meant, each once, in their order."""
    return [name for name in METHODS if not teaches(name) and (not section.methods or name in section.methods)]


def trials_of(method: str, section: CompareSection, seed: int) -> list[Values]:
    """The settings that are tried: the whole grid, or as many points of it, drawn with the seed, as the budget has."""
    grid = section.grids.get(method, {})
    keys = [key if "." in key else f"methods.{section_of(method)}.{key}" for key in grid]
    points = [dict(zip(keys, values, strict=True)) for values in itertools.product(*grid.values())]
    if len(points) <= section.budget:
        return points
    drawn = random.Random(f"{seed}/{method}").sample(range(len(points)), section.budget)
    return [points[i] for i in sorted(drawn)]


def best_of(trials: Sequence[Json]) -> int | None:
    """The number of the trial with the highest score, of several the first; None if every one failed."""
    whole = [number for number, trial in enumerate(trials) if trial["score"] is not None]
    return max(whole, key=lambda number: trials[number]["score"], default=None)


def cost_of(workspace: Workspace, composition: Composition) -> Json:
    """`{forward_tokens, backward_tokens, seconds, peak_memory_mb, bytes}` of everything that a composition was made by.

    Tokens are those that passed through the model or a part of it; bytes are those of what later steps read.
    """
    made = {stored.json["sha256"]: stored for one in composition.weights for stored in _chain(workspace, one)}
    made |= {
        stored.json["sha256"]: stored
        for one in (*composition.guardrails, *composition.wrappers)
        for stored in _chain(workspace, one)
    }
    backward = sum(
        stored.body.cost["backward_tokens"] for stored in made.values() if isinstance(stored.body, ModelWeights)
    )
    acting = [*composition.weights, *composition.guardrails, *composition.wrappers]
    return {
        "forward_tokens": sum(stored.header.n_tokens for stored in made.values()),
        "backward_tokens": backward,
        "seconds": round(sum(stored.header.seconds for stored in made.values()), 1),
        "peak_memory_mb": max(stored.header.peak_memory_mb for stored in made.values()),
        "bytes": sum(_size(stored) for stored in acting),
    }


def _chain(workspace: Workspace, stored: Stored) -> Iterator[Stored]:
    """An artifact and all that it was computed from, as far as it is in the workspace."""
    yield stored
    for one in stored.header.inputs:
        try:
            yield from _chain(workspace, workspace.read(one.id))
        except DsgError:
            continue


def _size(stored: Stored) -> int:
    if not stored.path.is_file() or stored.path.suffix == ".safetensors":
        return stored.path.stat().st_size
    return stored.path.stat().st_size + sum((stored.path.parent / name).stat().st_size for name in stored.header.files)


def reset_peak(device: str) -> None:
    """Have peak memory counted from now on, where the system can: Linux, or an accelerator."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def sequence_of(
    recipe: Recipe, workspace: Workspace, name: str, values: Values, benches: Json, options: RunOptions
) -> Json:
    """`{method, curve: [{request, artifacts, results: {bench: acc}}], error}`, on test questions of every request.

    Args:
        recipe: Of the comparison.
        workspace: Where artifacts are and go.
        name: A method.
        values: Its settings.
        benches: Of the comparison.
        options: How it is run.
    """
    chosen = with_values(recipe, values)
    requests = [*chosen.corpora.forget[:1], *recipe.compare.sequence]
    asked = [benches["forget"], *(default_bench([one]) for one in requests[1:]), *benches["near"], *benches["other"]]
    acting: list[str] = []
    curve: list[Json] = []
    error = ""
    for number, request in enumerate(requests):
        options.say(f"{name}: request {number + 1} of {len(requests)}, {request}")
        try:
            acting = _applied(chosen, workspace, name, requests, number, acting, options)
            settings: Values = {
                "eval.benches": list(dict.fromkeys(asked)),
                "eval.split": "test",
                "guardrail.allow_ineffective": True,
            }
            report = evaluate.run(with_values(recipe, settings), workspace, sources=acting, options=options)
        except DsgError as failure:
            error = failure.message
            break
        sides = report.body_as(EvalReport).results
        curve.append(
            {
                "request": request,
                "artifacts": list(acting),
                "eval": report.id,
                "results": {bench: sides[bench]["unlearned"]["acc"] for bench in dict.fromkeys(asked)},
            }
        )
    return {"method": name, "curve": curve, "error": error}


def _applied(
    recipe: Recipe,
    workspace: Workspace,
    name: str,
    requests: Sequence[str],
    number: int,
    acting: Sequence[str],
    options: RunOptions,
) -> list[str]:
    """What acts once a request has been met."""
    if number:
        # What has been asked to be forgotten is not held fast any more.
        retain = [one for one in recipe.corpora.retain if one.partition("=")[0] not in requests[: number + 1]]
        changes: Values = {"corpora.forget": [requests[number]], "corpora.retain": retain}
        if METHODS[name].form == "model":
            changes["model.source"] = acting[-1]
        recipe = with_values(recipe, changes)
    stored = run_method(recipe, workspace, name, options=options)
    return [stored.id] if METHODS[name].form == "model" else [*acting, stored.id]


def accuracies(
    loaded: LoadedModel,
    questions: Mapping[str, Sequence[Question]],
    recipe: Recipe,
    *,
    bos: int | None,
    guardrails: Sequence[GuardrailModule] = (),
    wrappers: Sequence[WrapperModule] = (),
) -> dict[str, float]:
    """Accuracy on the questions of each bench."""
    return {
        bench: ask(
            loaded.model,
            loaded.tokenizer,
            several,
            guardrails=guardrails,
            wrappers=wrappers,
            bos=bos,
            batch_size=recipe.eval.batch_size,
            max_length=context_length(loaded.model.config),
        )["acc"]
        for bench, several in questions.items()
    }


@dataclass(frozen=True)
class Search:
    """The same search for every method."""

    recipe: Recipe
    workspace: Workspace
    benches: Json
    questions: Mapping[str, Sequence[Question]]
    """Dev questions by bench."""
    base: Mapping[str, float]
    chance: float
    options: RunOptions
    checkpoint: Checkpoint

    def points(self, name: str) -> list[Values]:
        """The settings that are to be tried, as a recipe has them."""
        points = trials_of(name, self.recipe.compare, self.recipe.seed)
        return [values_at(with_values(self.recipe, values), values) for values in points]

    def only(self, name: str) -> Values:
        """The settings of a method that has no others to be tried."""
        (values,) = self.points(name)
        return values

    def trials(self, name: str) -> list[Json]:
        """Every trial of a method, the best one marked; those that an interrupted run had done are not done again.

        Without dev questions there is none: nothing can be, and nothing need be, chosen.
        """
        wanted = self.points(name) if self.questions else []
        done: list[Json] = (self.checkpoint.entry(f"trials/{name}") or {"trials": []})["trials"]
        # Features that trials share are computed once: they lie in one scratch workspace until the method is done.
        with tempfile.TemporaryDirectory(prefix=".compare-", suffix=".tmp", dir=self.workspace.folder) as scratch:
            for number, values in enumerate(wanted[len(done) :], start=len(done) + 1):
                self.options.say(f"{name}: trial {number} of {len(wanted)}")
                done = [*done, self._trial(name, values, Workspace(Path(scratch)))]
                self.checkpoint.keep(f"trials/{name}", {"trials": done})
                self.checkpoint.write()
        best = best_of(done)
        return [{**trial, "is_chosen": number == best} for number, trial in enumerate(done)]

    def _trial(self, name: str, values: Values, scratch: Workspace) -> Json:
        begun = time.monotonic()
        found: Json = {"method": name, "values": values, "dev": {}, "is_chosen": False, "error": ""}
        nothing = dict.fromkeys(("forget", "forgetting", "utility", "score"))
        recipe = with_values(self.recipe, values)
        try:
            stored = run_method(recipe, scratch, name, options=dataclasses.replace(self.options, resume=False))
            composition = find_composition(scratch, [stored.id])
            loaded = load_composition(scratch, composition, recipe)
            dev = accuracies(
                loaded.model,
                self.questions,
                recipe,
                bos=composition.bos,
                guardrails=loaded.guardrails,
                wrappers=loaded.wrappers,
            )
            # A model may be large; features that further trials share are small.
            shutil.rmtree(scratch.folder / stored.id, ignore_errors=True)
            forget = self.benches["forget"]
            found |= {"dev": dev, "forget": dev[forget], **judged(forget, dev, self.base, self.chance)}
        except DsgError as error:
            found |= {**nothing, "error": error.message}
        return {**found, "seconds": round(time.monotonic() - begun, 3)}


def run(recipe: Recipe, workspace: Workspace, *, sources: Sequence[str] = (), options: RunOptions = QUIET) -> Stored:
    """Compare methods, or the artifacts that are named, and write what was found.

    Args:
        recipe: Model, corpora, SAE, benches, grids, and the settings of every method.
        workspace: Where artifacts are and go.
        sources: Artifacts to be collected instead of a search: `guardrail-001`, or `model-001+guardrail-002` for what
            acts together.
        options: How it is run; one that goes on takes trials and artifacts that are there.
    """
    clock = Clock()
    if options.workers.n > 1:
        raise DsgError("dsg compare runs in one process.", "Run it without torchrun.")
    made = _prepared(recipe, workspace, sources)
    if (stored := options.existing(workspace, made.header)) is not None:
        return stored
    # What was made before, by this run before it was interrupted or by another, is not made again.
    inner = dataclasses.replace(options, reuse=True, resume=False)
    with options.checkpoint(workspace, made.header) as checkpoint:
        search = Search(made.recipe, workspace, made.benches, made.questions, made.base, made.chance, inner, checkpoint)
        trials = {name: search.trials(name) for name in (compared(recipe.compare) if not sources else ())}
        rows = [_collected(made, workspace, source, inner) for source in sources]
        chosen: dict[str, Values | None] = {}
        for name, several in trials.items():
            best = best_of(several) if several else None
            chosen[name] = several[best]["values"] if best is not None else None if several else search.only(name)
            rows += _rows(made, workspace, name, chosen[name], several, inner)
        sequences = [
            sequence_of(made.recipe, workspace, name, values, made.benches, inner)
            for name, values in chosen.items()
            if values is not None and recipe.compare.sequence
        ]
        body = Comparison(
            benches=made.benches,
            chance=made.chance,
            criterion=CRITERION,
            base={"dev": made.base, "test": _base_results(workspace, rows)},
            rows=rows,
            trials=[trial for several in trials.values() for trial in several],
            sequences=sequences,
        )
        return workspace.write(clock.close(made.header), body)


@dataclass(frozen=True)
class _Prepared:
    """All that every method is compared on."""

    recipe: Recipe
    benches: Json
    questions: dict[str, list[Question]]
    """Dev questions."""
    base: dict[str, float]
    """Accuracy of the base model on them."""
    chance: float
    header: Header
    remembered: dict[str, dict[str, list[Json]]] = dataclasses.field(default_factory=dict)
    """What attacks found of unguarded models: the same for every row."""


def _prepared(recipe: Recipe, workspace: Workspace, sources: Sequence[str]) -> _Prepared:
    """Everything checked and read; the base model asked."""
    section = recipe.compare
    for name in section.methods:
        check_method(name)
    for name in compared(section):
        for values in trials_of(name, section, recipe.seed):
            with_values(recipe, values)
    collected = [find_composition(workspace, source.split("+")) for source in sources]
    taught = [one["id"] for composition in collected for one in composition.described() if teaches(one["method"])]
    if taught:
        raise DsgError(f"{taught[0]} was taught, and has unlearned nothing to be compared.", "Leave it out.")
    forget_names = recipe.corpora.forget or (collected[0].forget() if collected else [])
    if not forget_names and not sources:
        raise DsgError(
            "Nothing says what the methods should unlearn.", "Name corpora: --forget, --retain, or a recipe."
        )
    forget = section.forget or attack.default_bench(forget_names)
    benches: Json = {"forget": forget, "near": section.near, "other": section.other}
    every = [forget, *section.near, *section.other]
    if len(set(every)) < len(every):
        raise DsgError("A bench stands twice in compare.forget, near and other.", "Name each once.")
    for request in section.sequence:
        attack.default_bench([request])
    workspace.check_writable()
    questions = {} if sources else _dev_questions(recipe, every)
    for bench in every:
        attack.check_bench(bench)
    recipe = settle(recipe)
    source = collected[0].base if collected else named_model(workspace, recipe.model.source)
    loaded = load_model(source, recipe.model)
    bos = bos_to_prepend(loaded.tokenizer, False)
    base = accuracies(loaded, questions, recipe, bos=bos) if questions else {}
    settings = {
        name: value for name, value in dataclasses.asdict(recipe).items() if name not in ("generate", "published")
    }
    header = new_header(
        "compare",
        recipe,
        settings={**settings, "collected": list(sources)},
        model=identify(loaded, loaded.n_layers - 1),
        sae=None,
        inputs=[stored for composition in collected for stored in composition.named],
    )
    return _Prepared(recipe, benches, questions, base, chance_of(questions.get(forget, [])), header)


def _dev_questions(recipe: Recipe, benches: Sequence[str]) -> dict[str, list[Question]]:
    """What settings are searched on, never what is reported; nothing where there is nothing to choose."""
    section = recipe.compare
    names = {bench: section.dev.get(bench, bench) for bench in benches}
    reported = [bench for bench, name in names.items() if name in benches and name not in lab.bench_names()]
    found = {bench: attack.load_questions(recipe, name, "dev") for bench, name in names.items()}
    if not reported:
        return found
    searched = [name for name in compared(section) if len(trials_of(name, section, recipe.seed)) > 1]
    if searched:
        raise DsgError(
            f"{reported[0]} is reported, so the settings of {searched[0]} cannot be searched on it.",
            f"Name other questions on the same with compare.dev={{{reported[0]}: BENCH}}, or give no compare.grids.",
        )
    return {}


def _rows(
    made: _Prepared,
    workspace: Workspace,
    name: str,
    values: Values | None,
    trials: Sequence[Json],
    options: RunOptions,
) -> list[Json]:
    """What was chosen of a method, applied, evaluated and attacked; on every SAE, if it needs one."""
    first = made.recipe.sae.source
    rows = []
    for sae in [first, *made.recipe.compare.saes] if METHODS[name].needs_sae else [""]:
        if values is None:
            rows.append(_row(name, sae, {}) | {"error": trials[-1]["error"] if trials else "no trial"})
            continue
        on_sae = values | ({"sae.source": sae} if sae else {})
        try:
            options.say(f"{name}{f' on SAE {sae}' if sae else ''}: applying what was chosen")
            reset_peak(made.header.device)
            stored = run_method(with_values(made.recipe, on_sae), workspace, name, options=options)
            rows.append(_measured(made, workspace, _row(name, sae, values), [stored.id], options))
        except DsgError as error:
            rows.append(_row(name, sae, values) | {"error": error.message})
    return rows


def _collected(made: _Prepared, workspace: Workspace, source: str, options: RunOptions) -> Json:
    """The row of artifacts that are there."""
    ids = source.split("+")
    composition = find_composition(workspace, ids)
    name = " + ".join(one["method"] for one in composition.described())
    sae = composition.header.sae
    return _measured(made, workspace, _row(name, sae.source if sae is not None else "", {}), ids, options)


def _row(name: str, sae: str, values: Values) -> Json:
    nothing: Json = {"artifacts": [], "eval": "", "attack": "", "results": {}, "gate": {}, "relearned": {}, "cost": {}}
    return {"method": name, "sae": sae, "values": values, **nothing, "n_features": 0, "error": ""}


def _measured(made: _Prepared, workspace: Workspace, row: Json, ids: Sequence[str], options: RunOptions) -> Json:
    """Evaluated on test questions, and attacked by relearning."""
    section, every = made.recipe.compare, [made.benches["forget"], *made.benches["near"], *made.benches["other"]]
    settings: Values = {"eval.benches": every, "eval.split": "test", "guardrail.allow_ineffective": True}
    stored = evaluate.run(with_values(made.recipe, settings), workspace, sources=ids, options=options)
    report = stored.body_as(EvalReport)
    composition = find_composition(workspace, ids)
    row |= {
        "artifacts": [one["id"] for one in composition.described()],
        "eval": stored.id,
        "results": {bench: report.results[bench]["unlearned"] for bench in every},
        "gate": {bench: rate["rate"] for bench, rate in report.gate.items()},
        "cost": cost_of(workspace, composition),
        "n_features": len({index for one in composition.named for index in _features(one)}),
    }
    if section.relearn_steps:
        utility = made.benches["near"][0] if made.benches["near"] else None
        attacking: Values = {
            "attack.bench": made.benches["forget"],
            "attack.utility_bench": utility,
            "attack.relearn_steps": section.relearn_steps,
            "attack.relearn_learning_rates": [section.relearn_learning_rate],
            "attack.relearn_parameters": ["all"],
            "attack.relearn_guard": ["loop"],
            "attack.relearn_data": ["forget"],
            "eval.split": "test",
        }
        recipe = with_values(made.recipe, attacking)
        (attacked,) = attack.run(
            recipe, workspace, ["relearn"], sources=ids, options=options, remembered=made.remembered
        )
        last = attacked.body_as(AttackReport).curve[-1]
        row |= {
            "attack": attacked.id,
            "relearned": {"x": last["x"], **{side: last[side]["forget_acc"] for side in ("guarded", "unguarded")}},
        }
    return row


def _features(stored: Stored) -> list[int]:
    """Features of an SAE that an artifact names."""
    data: Any = stored.json
    return [*data.get("indices", []), *data.get("detectors", []), *data.get("features", [])]


def _base_results(workspace: Workspace, rows: Sequence[Json]) -> Json:
    """Test results of the base model, from the first evaluation: they are the same in all."""
    evaluated = next((row["eval"] for row in rows if row["eval"]), None)
    if evaluated is None:
        return {}
    results = workspace.find("eval", evaluated).body_as(EvalReport).results
    return {bench: sides["base"] for bench, sides in results.items()}
