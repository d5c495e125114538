"""`dsg study NAME`: what becomes of a guardrail as one setting or another is varied?

Begins with features (those of the recipe, which are selected unless the workspace has them), makes the guardrail of
every point of a grid in memory, asks dev questions, and writes study-NNN with one row a point and measure; beside it
the same rows as CSV. Nothing is computed twice, and nothing else is written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dsg_cli.attacks.target import chance_of
from dsg_cli.data.corpora import Corpus, check_named, load_corpora
from dsg_cli.data.readers import read_prompts
from dsg_cli.data.tokens import Piece, bos_to_prepend, draw_pieces
from dsg_cli.errors import DsgError
from dsg_cli.evals.benches import Question
from dsg_cli.job import Job
from dsg_cli.lab import data as lab
from dsg_cli.models.language_model import LoadedModel
from dsg_cli.models.sae import check_name
from dsg_cli.recipe import values_at, with_values
from dsg_cli.settings import Recipe, SelectSection
from dsg_cli.stages import attack, select
from dsg_cli.stages.apply import AUTO, check_strength
from dsg_cli.stages.calibrate import calibration_chunks, chunk_lengths
from dsg_cli.stages.inputs import chain_sae, load_chain_model, taken_from
from dsg_cli.stages.select import PassCache, SelectionInputs, is_picked, read_inputs
from dsg_cli.stages.stage import QUIET, RunOptions, new_header, settle
from dsg_cli.studies import STUDIES, Grid, check_study, grid_of, load_study, points_of
from dsg_cli.studies.studies import known_names, prepare_stability
from dsg_cli.studies.sweep import Asker, Ground, Guards, Rig, Wanted, accuracy_row, csv_text, failed_row
from dsg_cli.workspace.artifacts import FeatureSet, Header
from dsg_cli.workspace.checkpoints import Checkpoint, State
from dsg_cli.workspace.files import at_safe_points
from dsg_cli.workspace.provenance import Clock
from dsg_cli.workspace.results import Json, StudyReport
from dsg_cli.workspace.store import Stored, Workspace

BASE = "the recipe's ground"


class Rigging:
    """Makes what a study asks for, and keeps what it has made; nothing of it is written.

    Args:
        recipe: Settled, and in agreement with the features.
        workspace: Where the features are.
        features: What the study begins with.
        loaded: The whole model.
        questions: By bench.
        options: How it is run.
        checkpoint: Where passes over retain text are kept.
    """

    def __init__(
        self,
        recipe: Recipe,
        workspace: Workspace,
        features: Stored,
        loaded: LoadedModel,
        questions: Mapping[str, Sequence[Question]],
        options: RunOptions,
        checkpoint: Checkpoint,
    ) -> None:
        self.recipe, self.workspace, self.features, self.loaded = recipe, workspace, features, loaded
        self.questions, self.options, self.checkpoint = questions, options, checkpoint
        file = recipe.calibrate.lengths_from
        self.prompts = read_prompts((), Path(file)) if file else []
        self.made = read_inputs(recipe, workspace, loaded=loaded)
        self._remembered = PassCache()
        self._selected: dict[str, tuple[FeatureSet, dict[str, Tensor]]] = {}
        self._guards: dict[str, Guards] = {}
        self._askers: dict[int | None, Asker] = {}
        self._pieces: dict[tuple[str, int, bool], list[Piece]] = {}

    def rig(self, *, forget_bench: str, names: Sequence[str]) -> Rig:
        """All of it, as studies take it."""
        recipe = self.recipe
        return Rig(
            wanted=Wanted(
                recipe.select.n_features,
                recipe.select.ratio_percentile,
                recipe.calibrate.alpha,
                recipe.guardrail.strength,
            ),
            guards_at=self.guards_at,
            guards_on=self.guards_on,
            asker=lambda guards: self.asker(guards.ground.bos),
            pieces=self.pieces,
            forget=self.made.corpora["forget"],
            retain=recipe.corpora.retain,
            names=names,
            requests=[*(one.partition("=")[0] for one in recipe.corpora.forget[:1]), *recipe.study.sequence],
            forget_bench=forget_bench,
            repeats=recipe.study.repeats,
            seed=recipe.seed,
        )

    def guards_at(self, changes: Mapping[str, Any]) -> Guards:
        """Guardrails where the recipe has other values; the features are those of the artifact where it has not."""
        changes = {key: value for key, value in changes.items() if values_at(self.recipe, [key])[key] != value}
        name = json.dumps(changes, sort_keys=True) if changes else BASE
        if name not in self._guards:
            if changes:
                recipe = with_values(self.recipe, changes)
                made = read_inputs(recipe, self.workspace, loaded=self.loaded)
                self._guards[name] = self._ground(name, recipe, made)
            else:
                assert self.features.header.sae is not None
                chain_sae(self.features)
                body, tensors = self.features.body_as(FeatureSet), self.workspace.tensors(self.features)
                self._guards[name] = self._on(name, self.recipe, self.made, body, tensors)
        return self._guards[name]

    def guards_on(self, forget: Sequence[Corpus]) -> Guards:
        """Guardrails made with other forget text, and the recipe's retain text."""
        made = dataclasses.replace(self.made, corpora={**self.made.corpora, "forget": list(forget)})
        name = " ".join(f"{corpus.name} {corpus.sha256}" for corpus in forget)
        if name not in self._guards:
            self._guards[name] = self._ground(name, self.recipe, made)
        return self._guards[name]

    def asker(self, bos: int | None) -> Asker:
        """The questions, as they are asked where every sequence begins with that token."""
        if bos not in self._askers:
            self._askers[bos] = Asker(
                self.loaded,
                self.questions,
                bos=bos,
                batch_size=self.recipe.eval.batch_size,
                report=self.options.report,
            )
        return self._askers[bos]

    def pieces(self, part: str, length: int, is_packed: bool) -> list[Piece]:
        """Pieces of so many tokens, BOS not counted; what a user says in a chat has its own length, and is none."""
        key = (part, length, is_packed)
        if key not in self._pieces:
            settings = self.recipe.calibrate
            corpora = self.made.corpora["forget"] if part == "forget" else self._retain(self.recipe, self.made)
            self._pieces[key] = draw_pieces(
                self.loaded.tokenizer,
                [dataclasses.replace(corpus, weight=None) for corpus in corpora if not corpus.is_chat],
                "calibrate" if part == "calibrate" else "fresh",
                bos=self.bos,
                lengths=[length],
                is_packed=is_packed or settings.rows == "packed",
                at_most=settings.max_pieces,
                seed=self.recipe.seed,
            )
        return self._pieces[key]

    @property
    def bos(self) -> int | None:
        """Token that every sequence begins with on the recipe's own ground."""
        return bos_to_prepend(self.loaded.tokenizer, self.made.sae.identity.prepend_bos)

    def computed(self) -> Json:
        """What it took so far."""
        return {
            "text_passes": len(self._remembered.statistics),
            "gate_passes": sum(guards.n_passes for guards in self._guards.values()),
            "asked": sum(asker.n_asked for asker in self._askers.values()),
            "n_requests": sum(len(one.choices) for several in self.questions.values() for one in several),
        }

    def _ground(self, name: str, recipe: Recipe, made: SelectionInputs) -> Guards:
        """A ground of its own, by the same pass as `dsg select`; what is known of a corpus is not computed again."""
        settings = recipe.select
        if recipe.calibrate.gate != "probe":
            settings = dataclasses.replace(settings, probe_features=0)
        corpora = {role: [one.described() for one in several] for role, several in made.corpora.items()}
        key = json.dumps([dataclasses.asdict(made.sae.identity), corpora, dataclasses.asdict(settings)])
        if key not in self._selected:
            # The checkpoint is of the points that are done: a pass that was interrupted begins anew.
            job = Job(self.options.workers, progress=self.options.report)
            body, tensors, _ = select.select(made, settings, job, self._remembered, keeps_residuals=True)
            self._selected[key] = body, tensors
        return self._on(name, recipe, made, *self._selected[key])

    def _on(
        self, name: str, recipe: Recipe, made: SelectionInputs, body: FeatureSet, tensors: Mapping[str, Any]
    ) -> Guards:
        """Guardrails on a ground whose features are known; retain text is cut as `dsg calibrate` cuts it."""
        loaded, settings = self.loaded, recipe.calibrate
        bos = bos_to_prepend(loaded.tokenizer, made.sae.identity.prepend_bos)
        lengths = chunk_lengths(settings, loaded, self.prompts, bos=bos)
        retain = self._retain(recipe, made)
        pieces = calibration_chunks(recipe, loaded, retain, [], {}, bos=bos, lengths=lengths)
        ground = Ground(name, loaded, made.sae, body, tensors, bos, pieces)
        return Guards(ground, settings, checkpoint=self.checkpoint, report=self.options.report)

    def _retain(self, recipe: Recipe, made: SelectionInputs) -> list[Corpus]:
        """What thresholds are set on."""
        if not recipe.calibrate.retain:
            return made.corpora["retain"]
        return load_corpora(recipe.calibrate.retain, role="retain", limit=recipe.corpora.limit, seed=recipe.seed)


def questions_digest(questions: Sequence[Question]) -> str:
    """Of everything that is asked, in its order."""
    return hashlib.sha256(json.dumps([dataclasses.astuple(one) for one in questions]).encode()).hexdigest()


SECTIONS = ("model", "sae", "corpora", "select", "calibrate", "guardrail", "study")
"""Of a recipe, what determines a study."""


def run(
    recipe: Recipe, workspace: Workspace, name: str, *, source: str | None = None, options: RunOptions = QUIET
) -> Stored:
    """Measure every point of a study's grid, and write the table.

    Args:
        recipe: Model, SAE, corpora, gate, grid and benches.
        workspace: Where artifacts are and go.
        name: Of the study.
        source: Features to begin with, whose model, SAE, corpora and selection are then taken.
        options: How it is run; one that goes on takes the points that are there.
    """
    clock = Clock()
    check_study(name)
    if options.workers.n > 1:
        raise DsgError("dsg study runs in one process.", "Run it without torchrun.")
    made = _prepared(recipe, workspace, name, source, options)
    if (stored := options.existing(workspace, made.header)) is not None:
        return stored
    loaded = load_chain_model(made.features.header, made.recipe, cut=False)
    with options.checkpoint(workspace, made.header) as checkpoint:
        rigging = Rigging(made.recipe, workspace, made.features, loaded, made.questions, options, checkpoint)
        rig = rigging.rig(forget_bench=made.benches["forget"][0] if made.questions else "", names=made.names)
        rows_of = load_study(name)
        points = points_of(made.grid)
        done: list[list[Json]] = (checkpoint.entry("points") or {"rows": []})["rows"]
        if name == "stability":
            prepare_stability(points[len(done) :], rig)

        def state() -> State:
            return {"rows": done}

        with at_safe_points():
            for number, point in enumerate(points[len(done) :], start=len(done) + 1):
                done = [*done, _measured(rows_of, point, rig)]
                options.report(f"{name}, points", number, len(points))
                checkpoint.keep("points", state())
                checkpoint.reached("points", state)
        body = _body(made, name, done, rigging)
        return workspace.write(clock.close(made.header), body, table=csv_text(body.columns, body.rows))


def _measured(rows_of: Callable[..., list[Json]], point: Json, rig: Rig) -> list[Json]:
    """The rows of one point; of one that fails, a row that says why."""
    try:
        return rows_of(point, rig)
    except DsgError as error:
        return [failed_row(point, error.message)]


@dataclass(frozen=True)
class _Prepared:
    """All that a study begins with, but for the model."""

    recipe: Recipe
    grid: Grid
    features: Stored
    benches: Json
    questions: dict[str, list[Question]]
    names: list[str]
    """Entities that forget text is about."""
    header: Header


def _prepared(recipe: Recipe, workspace: Workspace, name: str, source: str | None, options: RunOptions) -> _Prepared:
    """Everything checked and read; the features selected, unless they are there."""
    grid = grid_of(name, recipe.study)
    if source is None:
        _check_selected(recipe.select, "The recipe")
    is_taken = source is not None or not recipe.corpora.forget
    features = workspace.find("features", source) if is_taken else None
    if features is not None:
        recipe = _agreeing(recipe, features)
        _check_selected(recipe.select, features.id)
    _check(recipe, grid)
    workspace.check_writable()
    benches = _benches(recipe, name)
    asked = dict.fromkeys([*benches["forget"], *benches["other"]])
    questions = {bench: attack.load_questions(recipe, bench, recipe.study.split) for bench in asked}
    names = _names(recipe, grid)
    if features is None:
        features = select.run(recipe, workspace, options=dataclasses.replace(options, reuse=True))
        recipe = _agreeing(recipe, features)
    recipe = settle(recipe, features.header)
    sections: Json = {section: dataclasses.asdict(getattr(recipe, section)) for section in SECTIONS}
    sections["study"] |= {"grids": {}}
    header = new_header(
        "study",
        recipe,
        settings={
            **sections,
            "name": name,
            "grid": grid,
            "batch_size": recipe.eval.batch_size,
            "questions": {bench: questions_digest(several) for bench, several in questions.items()},
            "entities": names if "by" in grid else [],
        },
        model=features.header.model,
        sae=features.header.sae,
        inputs=[features],
        notes=_notes(recipe, benches),
    )
    return _Prepared(recipe, grid, features, benches, questions, names, header)


def _check_selected(select: SelectSection, what: str) -> None:
    """Refuse features that were picked without text: a study selects anew, by forget text, at every point."""
    if is_picked(select):
        raise DsgError(
            f"{what} picks features by description or by hand; a study selects by forget text.",
            "Name --forget corpora, and leave select.describe and select.features out.",
        )


def _agreeing(recipe: Recipe, features: Stored) -> Recipe:
    """The recipe with the model, SAE, corpora and selection of the features."""
    assert features.header.sae is not None
    chosen = {one.name: features.header.settings.get(one.name) for one in dataclasses.fields(SelectSection)}
    return dataclasses.replace(
        taken_from(recipe, features),
        sae=dataclasses.replace(recipe.sae, source=features.header.sae.source),
        select=dataclasses.replace(recipe.select, **{key: one for key, one in chosen.items() if one is not None}),
        seed=features.header.seed,
    )


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
    first = recipe.corpora.forget[0].partition("=")[0]
    if "requests" in grid and len({first, *recipe.study.sequence}) <= len(recipe.study.sequence):
        raise DsgError("study.sequence names a request twice, the first one among them.", "Name each corpus once.")


def _benches(recipe: Recipe, name: str) -> Json:
    """What is asked: on what is to be forgotten, and all else."""
    section = recipe.study
    if not STUDIES[name].asks:
        return {"forget": [], "other": []}
    forget = [section.forget or attack.default_bench([one.partition("=")[0] for one in recipe.corpora.forget])]
    if name == "sequential":
        forget += [attack.default_bench([one]) for one in section.sequence]
    other = [bench for bench in section.benches or recipe.eval.benches if bench not in forget]
    for bench in (*forget, *other):
        attack.check_bench(bench)
    return {"forget": forget, "other": list(dict.fromkeys(other))}


def _names(recipe: Recipe, grid: Mapping[str, Sequence[Any]]) -> list[str]:
    """Entities that forget text is about."""
    file = recipe.study.entities_file
    names = read_prompts((), Path(file)) if file is not None else []
    names += known_names([one.partition("=")[0] for one in recipe.corpora.forget])
    if "entities" in grid.get("by", []) and not names:
        raise DsgError(
            "By entities: nothing says which entities the forget text names.",
            "Give their names, one a line: --set study.entities_file=FILE.",
        )
    return list(dict.fromkeys(names))


def _notes(recipe: Recipe, benches: Json) -> list[str]:
    """What a person should know before choosing by the table."""
    others = [bench for bench in (*benches["forget"], *benches["other"]) if bench not in lab.bench_names()]
    if not others or recipe.study.split == "test":
        return []
    return [
        f"{', '.join(others)}: no dev questions are set apart. What is chosen by them must not be reported on them."
    ]


def _body(made: _Prepared, name: str, done: Sequence[Sequence[Json]], rigging: Rigging) -> StudyReport:
    columns = [*made.grid, *STUDIES[name].found]
    base = rigging.asker(rigging.bos).base() if made.questions else {}
    found = {bench: accuracy_row({}, bench, several) for bench, several in base.items()}
    first = made.questions.get(made.benches["forget"][0], []) if made.questions else []
    n_failed = sum(len(rows) == 1 and bool(rows[0]["error"]) for rows in done)
    return StudyReport(
        study=name,
        split=made.recipe.study.split,
        grid=made.grid,
        benches=made.benches,
        chance=chance_of(first),
        base={
            bench: {"acc": row["value"], **{key: row[key] for key in ("low", "high", "n")}}
            for bench, row in found.items()
        },
        columns=columns,
        rows=[dict.fromkeys(columns) | row for rows in done for row in rows],
        computed={"n_points": len(done), "n_failed": n_failed, **rigging.computed()},
    )
