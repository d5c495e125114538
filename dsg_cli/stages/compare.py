"""`dsg compare`: every method on the same model, text and questions, and what each costs.

For each method the same number of settings is tried on dev questions; the best is applied once, evaluated on test
questions through lm-eval, and attacked by relearning; then the same further requests are given to each method, one
after another. Writes compare-NNN with every trial, and the artifacts of what was chosen. Or, with artifacts that are
named, collects those without a search.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsg_cli.artifacts import AttackReport, Comparison, EvalReport, Header, Json
from dsg_cli.attacks.asking import chance_of
from dsg_cli.benches.tasks import Question
from dsg_cli.errors import DsgError
from dsg_cli.lab import data as lab
from dsg_cli.methods.comparison import CRITERION, Values, best_of, compared, trials_of
from dsg_cli.methods.names import METHODS, check_method, teaches
from dsg_cli.model import load_model
from dsg_cli.recipe import Recipe, with_values
from dsg_cli.stages import attack, evaluate, method
from dsg_cli.stages.chain import identify, settle
from dsg_cli.stages.costs import cost_of, reset_peak
from dsg_cli.stages.material import named_model
from dsg_cli.stages.provenance import Clock, new_header
from dsg_cli.stages.sequence import sequence_of
from dsg_cli.stages.session import QUIET, Session
from dsg_cli.stages.subject import find_subject
from dsg_cli.stages.trials import Search, accuracies
from dsg_cli.tokens import bos_to_prepend
from dsg_cli.workspace import Stored, Workspace


def run(recipe: Recipe, workspace: Workspace, *, sources: Sequence[str] = (), session: Session = QUIET) -> Stored:
    """Compare methods, or the artifacts that are named, and write what was found.

    Args:
        recipe: Model, corpora, SAE, benches, grids, and the settings of every method.
        workspace: Where artifacts are and go.
        sources: Artifacts to be collected instead of a search: `guardrail-001`, or `model-001+guardrail-002` for what
            acts together.
        session: How it is run; one that goes on takes trials and artifacts that are there.

    Raises:
        DsgError: Anything the user can mend. A method that fails keeps its row, which says why.
    """
    clock = Clock()
    if session.workers.n > 1:
        raise DsgError("dsg compare runs in one process.", "Run it without torchrun.")
    made = _prepared(recipe, workspace, sources)
    if (stored := session.existing(workspace, made.header)) is not None:
        return stored
    # What was made before, by this run before it was interrupted or by another, is not made again.
    inner = dataclasses.replace(session, reuse=True, resume=False)
    with session.checkpoint(workspace, made.header) as checkpoint:
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
    """Everything checked and read; the base model asked.

    Raises:
        DsgError: Anything the user can mend: unknown methods, grids that no recipe takes, missing benches or artifacts.
    """
    section = recipe.compare
    for name in section.methods:
        check_method(name)
    for name in compared(section):
        for values in trials_of(name, section, recipe.seed):
            with_values(recipe, values)
    collected = [find_subject(workspace, source.split("+")) for source in sources]
    taught = [one["id"] for subject in collected for one in subject.composition() if teaches(one["method"])]
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
    loaded = load_model(
        source,
        device=recipe.model.device,
        dtype=recipe.model.dtype,
        trust_remote_code=recipe.model.trust_remote_code,
    )
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
        inputs=[stored for subject in collected for stored in subject.named],
    )
    return _Prepared(recipe, benches, questions, base, chance_of(questions.get(forget, [])), header)


def _dev_questions(recipe: Recipe, benches: Sequence[str]) -> dict[str, list[Question]]:
    """What settings are searched on, never what is reported; nothing where there is nothing to choose.

    Raises:
        DsgError: There is a choice, and a bench has no questions for it.
    """
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
    session: Session,
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
            session.say(f"{name}{f' on SAE {sae}' if sae else ''}: applying what was chosen")
            reset_peak(made.header.device)
            stored = method.run(with_values(made.recipe, on_sae), workspace, name, session=session)
            rows.append(_measured(made, workspace, _row(name, sae, values), [stored.id], session))
        except DsgError as error:
            rows.append(_row(name, sae, values) | {"error": error.message})
    return rows


def _collected(made: _Prepared, workspace: Workspace, source: str, session: Session) -> Json:
    """The row of artifacts that are there."""
    ids = source.split("+")
    subject = find_subject(workspace, ids)
    name = " + ".join(one["method"] for one in subject.composition())
    sae = subject.header.sae
    return _measured(made, workspace, _row(name, sae.source if sae is not None else "", {}), ids, session)


def _row(name: str, sae: str, values: Values) -> Json:
    nothing: Json = {"artifacts": [], "eval": "", "attack": "", "results": {}, "gate": {}, "relearned": {}, "cost": {}}
    return {"method": name, "sae": sae, "values": values, **nothing, "n_features": 0, "error": ""}


def _measured(made: _Prepared, workspace: Workspace, row: Json, ids: Sequence[str], session: Session) -> Json:
    """Evaluated on test questions, and attacked by relearning."""
    section, every = made.recipe.compare, [made.benches["forget"], *made.benches["near"], *made.benches["other"]]
    settings: Values = {"eval.benches": every, "eval.split": "test", "guardrail.allow_ineffective": True}
    stored = evaluate.run(with_values(made.recipe, settings), workspace, sources=ids, session=session)
    report = stored.body_as(EvalReport)
    subject = find_subject(workspace, ids)
    row |= {
        "artifacts": [one["id"] for one in subject.composition()],
        "eval": stored.id,
        "results": {bench: report.results[bench]["unlearned"] for bench in every},
        "gate": {bench: rate["rate"] for bench, rate in report.gate.items()},
        "cost": cost_of(workspace, subject),
        "n_features": len({index for one in subject.named for index in _features(one)}),
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
            recipe, workspace, ["relearn"], sources=ids, session=session, remembered=made.remembered
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
