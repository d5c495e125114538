"""`dsg study NAME`: what becomes of a guardrail as one setting or another is varied?

Begins with features (those of the recipe, which are selected unless the workspace has them), makes the guardrail of
every point of a grid in memory, asks dev questions, and writes study-NNN with one row a point and measure; beside it
the same rows as CSV. Nothing is computed twice, and nothing else is written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dsg_cli.data.corpora import Corpus, check_named, load_corpora
from dsg_cli.data.readers import read_prompts
from dsg_cli.errors import DsgError
from dsg_cli.evals.questions import chance_of, check_bench, default_bench, load_questions
from dsg_cli.guardrail.calibration import gate_inputs
from dsg_cli.job import Job
from dsg_cli.lab import data as lab
from dsg_cli.models.language_model import LoadedModel
from dsg_cli.models.sae import check_name
from dsg_cli.recipe import with_values
from dsg_cli.settings import Recipe, SelectSection, values_at
from dsg_cli.stages import select
from dsg_cli.stages.apply import AUTO, check_strength
from dsg_cli.stages.calibrate import calibration_pieces, piece_lengths
from dsg_cli.stages.inputs import chain_sae, load_chain_model, taken_from
from dsg_cli.stages.select import PassCache, SelectionInputs, is_picked, read_inputs
from dsg_cli.stages.stage import QUIET, RunOptions, settle, stage
from dsg_cli.studies import STUDIES, check_study, grid_of, load_study, points_of
from dsg_cli.studies.studies import known_names
from dsg_cli.studies.sweep import Sweep, SweepBase, accuracy_row, csv_text, row_of
from dsg_cli.workspace.artifacts import FeatureSet
from dsg_cli.workspace.body import Json
from dsg_cli.workspace.files import at_safe_points
from dsg_cli.workspace.provenance import Clock
from dsg_cli.workspace.results import StudyReport
from dsg_cli.workspace.store import Stored, Workspace

SECTIONS = ("model", "sae", "corpora", "select", "calibrate", "guardrail", "study")
"""Of a recipe, what determines a study."""


def run(
    recipe: Recipe, workspace: Workspace, name: str, *, source: str | None = None, options: RunOptions = QUIET
) -> Stored:
    """Measure every point of a study's grid, and write the table.

    `source` names features to begin with, whose model, SAE, corpora and selection are then taken. A run that goes on
    takes the points that are there.
    """
    clock = Clock()
    check_study(name)
    if options.workers.n > 1:
        raise DsgError("dsg study runs in one process.", "Run it without torchrun.")
    grid = grid_of(name, recipe.study.grids, recipe.study.sequence)
    if source is None:
        _check_selected(recipe.select, "The recipe")
    features = None
    if source is not None or not recipe.corpora.forget:
        features = workspace.find("features", source)
        recipe = _agreeing(recipe, features)
        _check_selected(recipe.select, features.id)
    _check(recipe, grid)
    workspace.check_writable()
    benches = _benches(recipe, name)
    all_benches = dict.fromkeys([*benches["forget"], *benches["other"]])
    questions = {bench: load_questions(bench, recipe.eval, recipe.study.split) for bench in all_benches}
    others = ", ".join(bench for bench in questions if bench not in lab.bench_names())
    notes = []
    if others and recipe.study.split != "test":
        notes = [f"{others}: no dev questions are set apart. What is chosen by them must not be reported on them."]
    entities = _entities(recipe, grid)
    if features is None:
        features = select.run(recipe, workspace, options=dataclasses.replace(options, reuse=True))
        recipe = _agreeing(recipe, features)
    recipe = settle(recipe, features.header)
    sections: Json = {section: dataclasses.asdict(getattr(recipe, section)) for section in SECTIONS}
    sections["study"] |= {"grids": {}}
    digests = {
        bench: hashlib.sha256(json.dumps([dataclasses.astuple(question) for question in of_bench]).encode()).hexdigest()
        for bench, of_bench in questions.items()
    }
    header_settings: Json = {
        **sections,
        "name": name,
        "grid": grid,
        "batch_size": recipe.eval.batch_size,
        "questions": digests,
        "entities": entities if "by" in grid else [],
    }
    with stage("study", recipe, workspace, options, clock, header_settings, origin=features, notes=notes) as this:
        if this.existing:
            return this.existing
        loaded = load_chain_model(features.header, recipe, cut=False)
        bases = SweepBases(recipe, workspace, features, loaded, options)
        sweep = Sweep(
            loaded=loaded,
            base_at=bases.at,
            base_on=bases.on,
            recipe=recipe,
            questions=questions,
            forget_bench=benches["forget"][0] if questions else "",
            forget=bases.inputs.corpora["forget"],
            retain=bases.retain(recipe, bases.inputs),
            entities=entities,
            job=this.job,
        )
        rows_of, points = load_study(name), points_of(grid)
        rows: list[list[Json]] = (this.job.checkpoint.entry("points") or {"rows": []})["rows"]
        if name == "stability":
            sweep.prepare(points[len(rows) :])
        with at_safe_points():
            for number, point in enumerate(points[len(rows) :], start=len(rows) + 1):
                try:
                    rows = [*rows, rows_of(point, sweep)]
                except DsgError as error:
                    rows = [*rows, [row_of(point, "", error=error.message)]]
                this.job.progress(f"{name}, points", number, len(points))
                this.job.checkpoint.keep("points", {"rows": rows})
                this.job.checkpoint.reached("points", lambda rows=rows: {"rows": rows})  # type: ignore[misc]
        columns = [*grid, *STUDIES[name].columns]
        base: Json = {}
        for bench, outcomes in (sweep.accuracy((), bases.inputs.bos) if questions else {}).items():
            row = accuracy_row({}, bench, outcomes)
            base[bench] = {"acc": row["value"], **{key: row[key] for key in ("low", "high", "n")}}
        body = StudyReport(
            study=name,
            split=recipe.study.split,
            grid=grid,
            benches=benches,
            chance=chance_of(questions[sweep.forget_bench] if questions else []),
            base=base,
            columns=columns,
            rows=[dict.fromkeys(columns) | row for of_point in rows for row in of_point],
            computed={
                "n_points": len(rows),
                "n_failed": sum(len(of_point) == 1 and bool(of_point[0]["error"]) for of_point in rows),
                "text_passes": len(bases.passes.statistics),
                "gate_passes": sweep.n_gate_passes,
                "asked": sweep.n_asked,
                "n_requests": sum(len(question.choices) for of_bench in questions.values() for question in of_bench),
            },
        )
        return this.write(body, table=csv_text(columns, body.rows))


class SweepBases:
    """What guardrails of a sweep are built on, at any values of a recipe; each is selected once, and nothing written.

    The recipe is settled, and in agreement with the features.
    """

    def __init__(
        self, recipe: Recipe, workspace: Workspace, features: Stored, loaded: LoadedModel, options: RunOptions
    ) -> None:
        self.recipe, self.workspace, self.features, self.loaded = recipe, workspace, features, loaded
        # No checkpoint: that is of the points that are done. A pass that was interrupted begins anew.
        self.job = Job(options.workers, progress=options.report)
        file = recipe.calibrate.lengths_from
        self.prompts = read_prompts((), Path(file)) if file else []
        self.inputs = read_inputs(recipe, workspace, loaded=loaded)
        self.passes = PassCache()
        self._selections: dict[str, tuple[FeatureSet, dict[str, Tensor]]] = {}
        self._bases: dict[str, SweepBase] = {}

    def at(self, changes: Mapping[str, Any]) -> SweepBase:
        """Where the recipe has other values; the features are those of the artifact where it has not."""
        changes = {key: value for key, value in changes.items() if values_at(self.recipe, [key])[key] != value}
        key = json.dumps(changes, sort_keys=True)
        if key not in self._bases:
            if changes:
                recipe = with_values(self.recipe, changes)
                inputs = read_inputs(recipe, self.workspace, loaded=self.loaded)
                self._bases[key] = self._base(key, recipe, inputs, *self._select(recipe, inputs))
            else:
                chain_sae(self.features)
                tensors = self.workspace.tensors(self.features)
                body = self.features.body_as(FeatureSet)
                self._bases[key] = self._base("the recipe's base", self.recipe, self.inputs, body, tensors)
        return self._bases[key]

    def on(self, forget: Sequence[Corpus]) -> SweepBase:
        """With other forget text, and the recipe's retain text."""
        key = " ".join(f"{corpus.name} {corpus.sha256}" for corpus in forget)
        if key not in self._bases:
            inputs = dataclasses.replace(self.inputs, corpora={**self.inputs.corpora, "forget": list(forget)})
            self._bases[key] = self._base(key, self.recipe, inputs, *self._select(self.recipe, inputs))
        return self._bases[key]

    def retain(self, recipe: Recipe, inputs: SelectionInputs) -> list[Corpus]:
        """What thresholds are set on."""
        names = recipe.calibrate.retain
        if not names:
            return inputs.corpora["retain"]
        return load_corpora(names, role="retain", limit=recipe.corpora.limit, seed=recipe.seed)

    def _select(self, recipe: Recipe, inputs: SelectionInputs) -> tuple[FeatureSet, dict[str, Tensor]]:
        """By the same pass as `dsg select`; what is known of a corpus is not computed again."""
        settings = recipe.select
        if recipe.calibrate.gate != "probe":
            settings = dataclasses.replace(settings, probe_features=0)
        corpora = {role: [corpus.described() for corpus in of_role] for role, of_role in inputs.corpora.items()}
        key = json.dumps([inputs.sae.identity.model_dump(), corpora, dataclasses.asdict(settings)])
        if key not in self._selections:
            body, tensors, _ = select.select(inputs, settings, self.job, self.passes, keeps_residuals=True)
            self._selections[key] = body, tensors
        return self._selections[key]

    def _base(
        self, key: str, recipe: Recipe, inputs: SelectionInputs, body: FeatureSet, tensors: Mapping[str, Tensor]
    ) -> SweepBase:
        """Retain text is cut as `dsg calibrate` cuts it."""
        settings = recipe.calibrate
        lengths = piece_lengths(settings, self.loaded, self.prompts, bos=inputs.bos)
        retain = self.retain(recipe, inputs)
        pieces = calibration_pieces(recipe, self.loaded, retain, [], {}, bos=inputs.bos, lengths=lengths)
        watched = gate_inputs(settings, body, tensors, where="What select found")
        return SweepBase(key, inputs.sae, body, tensors, inputs.bos, pieces, settings, watched)


def _check_selected(select: SelectSection, what: str) -> None:
    """Refuse features that were picked without text: a study selects anew, by forget text, at every point."""
    if is_picked(select):
        raise DsgError(
            f"{what} picks features by description or by hand; a study selects by forget text.",
            "Name --forget corpora, and leave select.describe and select.features out.",
        )


def _agreeing(recipe: Recipe, features: Stored) -> Recipe:
    assert features.header.sae is not None
    settings = features.header.settings
    names = [key.name for key in dataclasses.fields(SelectSection) if key.name in settings]
    values = {f"select.{name}": settings[name] for name in names}
    values |= {"sae.source": features.header.sae.source, "seed": features.header.seed}
    return with_values(taken_from(recipe, features), values, features.id)


def _check(recipe: Recipe, grid: Mapping[str, Sequence[Any]]) -> None:
    """Refuse what no point could be made of, and names that lead nowhere."""
    if recipe.guardrail.strength == AUTO and "strength" not in grid:
        raise DsgError(
            "A study chooses no strength by itself.",
            "Give one, or several: --grid strength=4r,16r (guardrail.strength).",
        )
    check_strength(recipe.guardrail)
    for sae in grid.get("sae", []):
        check_name(sae)
    if recipe.study.sequence:
        check_named(recipe.study.sequence, role="forget")
    if "requests" in grid and len({_names(recipe)[0], *recipe.study.sequence}) <= len(recipe.study.sequence):
        raise DsgError("study.sequence names a request twice, the first one among them.", "Name each corpus once.")


def _benches(recipe: Recipe, name: str) -> Json:
    """What is asked: on what is to be forgotten, and all else."""
    section = recipe.study
    if not STUDIES[name].asks:
        return {"forget": [], "other": []}
    forget = [section.forget or default_bench(_names(recipe))]
    if name == "sequential":
        forget += [default_bench([request]) for request in section.sequence]
    others = [bench for bench in section.benches or recipe.eval.benches if bench not in forget]
    for bench in (*forget, *others):
        check_bench(bench)
    return {"forget": forget, "other": list(dict.fromkeys(others))}


def _entities(recipe: Recipe, grid: Mapping[str, Sequence[Any]]) -> list[str]:
    """Entities that forget text is about."""
    file = recipe.study.entities_file
    names = read_prompts((), Path(file)) if file is not None else []
    names += known_names(_names(recipe))
    if "entities" in grid.get("by", []) and not names:
        raise DsgError(
            "By entities: nothing says which entities the forget text names.",
            "Give their names, one a line: --set study.entities_file=FILE.",
        )
    return list(dict.fromkeys(names))


def _names(recipe: Recipe) -> list[str]:
    return [name.partition("=")[0] for name in recipe.corpora.forget]
