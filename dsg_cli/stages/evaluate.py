"""`dsg eval`: what does the model still know, and what did it cost elsewhere?

Asks every bench of the base model and of the same model under the guardrail, through lm-eval or in the paper's way;
writes eval-NNN with one row a question, and in the folder eval-NNN/ lm-eval's own results files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsg_cli.artifacts import EvalReport, Header, Json
from dsg_cli.benches.free import load_free
from dsg_cli.benches.names import PAPER, is_free
from dsg_cli.benches.paper import PaperQuestion, load_questions, read_question_ids
from dsg_cli.benches.tasks import commits, load_tasks, metrics_of
from dsg_cli.checkpoints import Checkpoint
from dsg_cli.errors import DsgError
from dsg_cli.expect import Expected, check_expected, check_metrics, parse_expected
from dsg_cli.lab import data as lab
from dsg_cli.model import whole_digest
from dsg_cli.recipe import Recipe
from dsg_cli.stages.chain import identify, settle
from dsg_cli.stages.earlier import Answers, earlier_answers, earlier_texts, taken_from_earlier
from dsg_cli.stages.provenance import Clock, new_header
from dsg_cli.stages.reference import find_reference, load_reference
from dsg_cli.stages.session import QUIET, Session
from dsg_cli.stages.subject import LoadedSubject, Subject, find_subject, load_subject, newest
from dsg_cli.text_answers import Results, Side, Texts, check_texts
from dsg_cli.text_evaluation import Reference, evaluate_texts
from dsg_cli.workspace import Stored, Workspace

if TYPE_CHECKING:
    from dsg_cli.sides import SideBySide


def run(recipe: Recipe, workspace: Workspace, *, sources: Sequence[str] = (), session: Session = QUIET) -> Stored:
    """Evaluate the newest guardrail, model or wrapper, or those named together, and write the report.

    Raises:
        DsgError: Anything the user can mend; after the report is written, a guardrail that gated no question on what it
            should forget. An expectation that is not met is no error here; it is in the report.
    """
    clock = Clock()
    for text in recipe.eval.expect:
        parse_expected(text, recipe.eval.benches)
    sources = session.named_together(workspace, sources, newest)
    with session.workers.in_turn():
        made = _prepared(recipe, workspace, sources)
    # Nothing vouches for the data of other benches, so they are asked again.
    is_known = all(bench in lab.bench_names() for bench in recipe.eval.benches)
    if is_known and (stored := session.existing(workspace, made.header)) is not None:
        return stored
    with session.checkpoint(workspace, made.header) as checkpoint:
        earlier = earlier_answers(workspace, made.header, session, checkpoint)
        texts = {} if recipe.eval.samples else earlier_texts(workspace, made.texts.digests(), made.header, checkpoint)
        found = _asked(made, recipe, earlier, texts, session, checkpoint)
        stored = session.write(workspace, lambda: _write(workspace, clock, made, recipe, found, earlier))
    _check_effect(stored, made.subject, recipe)
    return stored


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """All that the questions are asked with."""

    subject: Subject
    loaded: LoadedSubject
    tasks: list[Any]
    questions: dict[str, list[PaperQuestion]]
    """Of benches of the paper's protocol."""
    wanted: dict[str, list[str]]
    """The questions of such benches that count, where they are given."""
    texts: Texts
    """Of benches on free text."""
    reference: Reference | None
    expected: list[Expected]
    header: Header


def _prepared(recipe: Recipe, workspace: Workspace, sources: Sequence[str]) -> _Prepared:
    """Everything checked and read.

    Raises:
        DsgError: Anything the user can mend.
    """
    settings = recipe.eval
    if not settings.benches:
        raise DsgError("No bench is named.", "Give one with --bench: `dsg ls benches` lists them.")
    expected = [parse_expected(text, settings.benches) for text in settings.expect]
    subject = find_subject(workspace, sources)
    workspace.check_writable()
    in_paper = [bench for bench in settings.benches if bench in PAPER]
    wanted = read_question_ids(Path(settings.question_ids) if settings.question_ids else None, in_paper)
    others = [bench for bench in settings.benches if bench not in PAPER and not is_free(bench)]
    tasks = (
        load_tasks(others, split=settings.split, include_path=settings.include_path, can_generate=subject.can_generate)
        if others
        else []
    )
    free, free_commits = load_free(
        settings.benches, split=settings.split, limit=settings.limit, holdout=settings.holdout, seed=recipe.seed
    )
    check_metrics(expected, metrics_of(tasks) | {bench.name: set(bench.metrics) for bench in free})
    texts = Texts(free, subject.bos, settings.batch_size, settings.apply_chat_template)
    needing = {bench.name for bench in free if bench.relative}
    reference = find_reference(
        recipe, workspace, {name: digest for name, digest in texts.digests().items() if name in needing}
    )
    questions = {bench: load_questions(bench) for bench in in_paper}
    recipe = settle(recipe, subject.header)
    loaded = load_subject(workspace, subject, recipe)
    if settings.apply_chat_template and not loaded.base.tokenizer.chat_template:
        raise DsgError(
            f"The tokenizer of {loaded.base.source} has no chat template.", "Leave --apply-chat-template out."
        )
    check_texts(texts, loaded.model, _sides(loaded))
    reference = load_reference(reference, recipe, loaded.base) if reference is not None else None
    header = new_header(
        "eval",
        recipe,
        settings={
            **dataclasses.asdict(settings),
            "allow_mismatch": recipe.model.allow_mismatch,
            "model_digest": whole_digest(loaded.base.model),
            "commits": commits(tasks)
            | {bench: several[0].revision for bench, several in questions.items()}
            | free_commits,
            "asked": texts.digests(),
            "reference_digest": reference.digest if reference is not None else "",
            "reference_scores": dict(reference.scores) if reference is not None else {},
        },
        model=identify(loaded.base, subject.header.model.last_layer),
        sae=subject.header.sae,
        inputs=subject.named,
    )
    return _Prepared(subject, loaded, tasks, questions, wanted, texts, reference, expected, header)


def _sides(loaded: LoadedSubject) -> tuple[Side, Side]:
    """The two models that are asked."""
    return Side("base", loaded.base), Side("unlearned", loaded.model, loaded.guardrails, loaded.wrappers)


def _asked(
    made: _Prepared,
    recipe: Recipe,
    earlier: dict[str, Answers],
    known_texts: Results,
    session: Session,
    checkpoint: Checkpoint,
) -> list[SideBySide]:
    """Every bench of both sides."""
    settings = recipe.eval
    options: dict[str, Any] = {
        "bos": made.subject.bos,
        "batch_size": settings.batch_size,
        "samples": settings.samples,
        "allow_mismatch": recipe.model.allow_mismatch,
        "known": {key: answer for answers in earlier.values() for key, answer in answers.items()},
        "workers": session.workers,
        "checkpoint": checkpoint,
        "report": session.report,
    }
    found: list[SideBySide] = []
    loaded = made.loaded
    options |= {"unlearned": loaded.model, "wrappers": loaded.wrappers}
    if made.tasks:
        from dsg_cli.evaluation import Asking, evaluate

        asking = Asking(settings.limit, settings.num_fewshot, settings.apply_chat_template)
        found.append(evaluate(loaded.base, loaded.guardrails, made.tasks, asking=asking, **options))
    if made.questions:
        from dsg_cli.paper_evaluation import evaluate_paper

        options |= {"limit": settings.limit, "question_ids": made.wanted}
        found.append(evaluate_paper(loaded.base, loaded.guardrails, made.questions, **options))
    if made.texts.benches:
        base, unlearned = _sides(loaded)
        texts = dataclasses.replace(made.texts, workers=session.workers, checkpoint=checkpoint, report=session.report)
        found.append(
            evaluate_texts(
                base,
                unlearned,
                texts,
                reference=made.reference,
                known=known_texts,
                samples=settings.samples,
                allow_mismatch=recipe.model.allow_mismatch,
            )
        )
    return found


def _check_effect(stored: Stored, subject: Subject, recipe: Recipe) -> None:
    """Refuse to pass over a guardrail that lets everything through.

    Raises:
        DsgError: The bench of a forget corpus was run, and no question was gated, or no gate changed anything.
    """
    body = stored.body_as(EvalReport)
    names = [name for guard in subject.bodies for name in guard.forget]
    # A filter or other weights may leave nothing for a guardrail to do.
    is_alone = not subject.weights and not subject.wrappers
    for name in names if is_alone and not recipe.guardrail.allow_ineffective else ():
        for bench in (name, f"{name}-paper"):
            gate = body.gate.get(bench)
            if gate is not None and not (gate["rate"] and gate["edit"]):
                raise DsgError(
                    f"The guardrail did nothing on {bench}, which it should make the model forget: "
                    + ("no question was gated." if not gate["rate"] else "its edits change nothing.")
                    + f" The report is {stored.id}.",
                    "Calibrate for questions of that length and form, or pass --allow-ineffective.",
                )


def _unchecked(subject: Subject) -> list[str]:
    """Guardrails of features that were picked without forget text: nothing says on which bench they should act."""
    return [
        f"Nothing says what {stored.id} should make the model forget, so that it does anything there is not checked. "
        "Add --expect 'BENCH.gate>=0.5' for the bench."
        for stored, body in zip(subject.guardrails, subject.bodies, strict=True)
        if not body.forget
    ]


def _write(
    workspace: Workspace,
    clock: Clock,
    made: _Prepared,
    recipe: Recipe,
    found: Sequence[SideBySide],
    earlier: dict[str, Answers],
) -> Stored:
    from dsg_cli.lm_eval_files import results_files
    from dsg_cli.scorer import answers_to_tensors

    results = {bench: sides for one in found for bench, sides in one.results.items()}
    first = [bench for bench in recipe.eval.benches if bench in results]
    results = {bench: results[bench] for bench in (*first, *(name for name in results if name not in first))}
    answers: Answers = {key: answer for one in found for key, answer in one.answers.items()}
    has_gate = made.subject.has_gate
    gate = {bench: rate for one in found for bench, rate in one.gate.items()} if has_gate else {}
    body = EvalReport(
        split=recipe.eval.split,
        results=results,
        gate=gate,
        expected=check_expected(made.expected, results, gate),
        question_ids={bench: ids for one in found for bench, ids in one.question_ids.items()},
        base_from=taken_from_earlier(answers, earlier),
        composition=made.subject.composition(),
        asked={bench: digest for one in found for bench, digest in one.asked.items()},
        reference=_reference(made.reference, found),
        refused={bench: metrics for one in found for bench, metrics in one.refused.items()},
    )
    files: dict[str, bytes] = {}
    for one in found:
        if one.found:
            files |= results_files(
                one.found, model=made.loaded.base.source, created=made.header.created, samples=recipe.eval.samples
            )
    notes = [*_unchecked(made.subject), *(note for one in found for note in _unheeded(one, recipe))]
    header = dataclasses.replace(made.header, notes=[*made.header.notes, *notes])
    return workspace.write(
        clock.close(header, n_tokens=sum(one.n_tokens for one in found)),
        body,
        tensors=answers_to_tensors(answers),
        rows=[row for one in found for row in one.rows],
        folder=files,
    )


def _reference(reference: Reference | None, found: Sequence[SideBySide]) -> Json:
    if reference is None:
        return {}
    scores = {bench: several for one in found for bench, several in one.scores.items()}
    return {"source": reference.source, "digest": reference.digest, "scores": scores}


def _unheeded(found: Any, recipe: Recipe) -> list[str]:
    """Settings that a task overrules: lm-eval leaves a task that fixes its examples at 0 as it is."""
    wanted = recipe.eval.num_fewshot
    other = sorted({n for n in found.found.get("base", {}).get("n-shot", {}).values() if n != wanted})
    return [f"Some tasks fix their number of examples: {other}, not {wanted}."] if wanted is not None and other else []
