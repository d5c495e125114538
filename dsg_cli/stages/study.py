"""`dsg study NAME`: what becomes of a guardrail as one setting or another is varied?

Begins with features (those of the recipe, which are selected unless the workspace has them), makes the guardrail of
every point of a grid in memory, asks dev questions, and writes study-NNN with one row a point and measure; beside it
the same rows as CSV. Nothing is computed twice, and nothing else is written.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsg_cli.artifacts import Header, Json, StudyReport
from dsg_cli.attacks.asking import chance_of
from dsg_cli.benches.tasks import Question
from dsg_cli.checkpoints import State
from dsg_cli.corpora import check_named
from dsg_cli.errors import DsgError
from dsg_cli.interruption import at_safe_points
from dsg_cli.lab import data as lab
from dsg_cli.prompt_files import read_prompts
from dsg_cli.recipe import Recipe
from dsg_cli.sae import check_name
from dsg_cli.settings import SelectSection
from dsg_cli.stages import attack, select
from dsg_cli.stages.apply import AUTO, check_strength
from dsg_cli.stages.candidates import is_picked
from dsg_cli.stages.chain import load_chain_model, settle
from dsg_cli.stages.material import taken_from
from dsg_cli.stages.provenance import Clock, new_header
from dsg_cli.stages.rigging import Rigging, questions_digest
from dsg_cli.stages.session import QUIET, Session
from dsg_cli.studies.data_efficiency import known_names
from dsg_cli.studies.names import STUDIES, Grid, check_study, module_name
from dsg_cli.studies.rig import Rig
from dsg_cli.studies.rows import accuracy_row, csv_text, failed_row
from dsg_cli.studies.settings import grid_of, points_of
from dsg_cli.workspace import Stored, Workspace

SECTIONS = ("model", "sae", "corpora", "select", "calibrate", "guardrail", "study")
"""Of a recipe, what determines a study."""


def run(
    recipe: Recipe, workspace: Workspace, name: str, *, source: str | None = None, session: Session = QUIET
) -> Stored:
    """Measure every point of a study's grid, and write the table.

    Args:
        recipe: Model, SAE, corpora, gate, grid and benches.
        workspace: Where artifacts are and go.
        name: Of the study.
        source: Features to begin with, whose model, SAE, corpora and selection are then taken.
        session: How it is run; one that goes on takes the points that are there.

    Raises:
        DsgError: Anything the user can mend. A point that fails keeps its row, which says why.
    """
    clock = Clock()
    check_study(name)
    if session.workers.n > 1:
        raise DsgError("dsg study runs in one process.", "Run it without torchrun.")
    made = _prepared(recipe, workspace, name, source, session)
    if (stored := session.existing(workspace, made.header)) is not None:
        return stored
    loaded = load_chain_model(made.features.header, made.recipe, cut=False)
    with session.checkpoint(workspace, made.header) as checkpoint:
        rigging = Rigging(made.recipe, workspace, made.features, loaded, made.questions, session, checkpoint)
        rig = rigging.rig(forget_bench=made.benches["forget"][0] if made.questions else "", names=made.names)
        study: Any = importlib.import_module(module_name(name))
        points = points_of(made.grid)
        done: list[list[Json]] = (checkpoint.entry("points") or {"rows": []})["rows"]
        if hasattr(study, "prepare"):
            study.prepare(points[len(done) :], rig)

        def state() -> State:
            return {"rows": done}

        with at_safe_points():
            for number, point in enumerate(points[len(done) :], start=len(done) + 1):
                done = [*done, _measured(study, point, rig)]
                session.report(f"{name}, points", number, len(points))
                checkpoint.keep("points", state())
                checkpoint.reached("points", state)
        body = _body(made, name, done, rigging)
        return workspace.write(clock.close(made.header), body, table=csv_text(body.columns, body.rows))


def _measured(study: Any, point: Json, rig: Rig) -> list[Json]:
    """The rows of one point; of one that fails, a row that says why."""
    try:
        rows: list[Json] = study.rows_of(point, rig)
    except DsgError as error:
        return [failed_row(point, error.message)]
    return rows


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


def _prepared(recipe: Recipe, workspace: Workspace, name: str, source: str | None, session: Session) -> _Prepared:
    """Everything checked and read; the features selected, unless they are there.

    Raises:
        DsgError: Anything the user can mend, before any weights are loaded.
    """
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
        features = select.run(recipe, workspace, session=dataclasses.replace(session, reuse=True))
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
    """Refuse features that were picked without text: a study selects anew, by forget text, at every point.

    Raises:
        DsgError: They were.
    """
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
    """Refuse what no point could be made of, and names that lead nowhere.

    Raises:
        DsgError: It is so.
    """
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
    """What is asked: on what is to be forgotten, and all else.

    Raises:
        DsgError: No bench is named like a corpus that is to be forgotten, or one cannot be asked.
    """
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
    """Entities that forget text is about.

    Raises:
        DsgError: They are needed, and none is known.
    """
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
