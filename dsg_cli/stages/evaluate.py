"""`dsg eval`: what does the model still know, and what did it cost elsewhere?

Asks every bench of the base model and of the same model under the guardrail, through lm-eval or in the paper's way;
writes eval-NNN with one row a question, and in the folder eval-NNN/ lm-eval's own results files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dsg_cli.artifacts import EvalReport, Header
from dsg_cli.benches.names import PAPER
from dsg_cli.benches.paper import load_questions, read_question_ids
from dsg_cli.benches.tasks import commits, load_tasks, metrics_of
from dsg_cli.errors import DsgError
from dsg_cli.expect import Expected, check_expected, check_metrics, parse_expected
from dsg_cli.lab import data as lab
from dsg_cli.model import LoadedModel, whole_digest
from dsg_cli.progress import Report, silent
from dsg_cli.recipe import Recipe
from dsg_cli.stages.chain import find_guards, identify, load_guards, settle
from dsg_cli.stages.provenance import Clock, new_header
from dsg_cli.workspace import Stored, Workspace

Answers = dict[bytes, tuple[float, bool]]


def run(
    recipe: Recipe, workspace: Workspace, *, sources: Sequence[str] = (), reuse: bool = False, report: Report = silent
) -> Stored:
    """Evaluate the newest guardrail, or those named together, and write the report.

    Raises:
        DsgError: Anything the user can mend. An expectation that is not met is no error here; it is in the report.
    """
    clock = Clock()
    settings = recipe.eval
    if not settings.benches:
        raise DsgError("No bench is named.", "Give one with --bench: `dsg ls benches` lists them.")
    expected = [parse_expected(text, settings.benches) for text in settings.expect]
    guards = find_guards(workspace, sources)
    workspace.check_writable()
    in_paper = [bench for bench in settings.benches if bench in PAPER]
    wanted = read_question_ids(Path(settings.question_ids) if settings.question_ids else None, in_paper)
    others = [bench for bench in settings.benches if bench not in PAPER]
    tasks = load_tasks(
        others, split=settings.split, include_path=settings.include_path, can_generate=guards.can_generate
    )
    check_metrics(expected, metrics_of(tasks))
    questions = {bench: load_questions(bench) for bench in in_paper}
    is_known = all(bench in lab.bench_names() for bench in settings.benches)
    recipe = settle(recipe, guards.header)
    loaded, modules = load_guards(workspace, guards, recipe)
    if settings.apply_chat_template and not loaded.tokenizer.chat_template:
        raise DsgError(f"The tokenizer of {loaded.source} has no chat template.", "Leave --apply-chat-template out.")
    header = new_header(
        "eval",
        recipe,
        settings={
            **dataclasses.asdict(settings),
            "allow_mismatch": recipe.model.allow_mismatch,
            "model_digest": whole_digest(loaded.model),
            "commits": commits(tasks) | {bench: several[0].revision for bench, several in questions.items()},
        },
        model=identify(loaded, guards.header.model.last_layer),
        sae=guards.header.sae,
        inputs=guards.stored,
    )
    # Nothing vouches for the data of other benches, so they are asked again.
    if reuse and is_known and (stored := workspace.matching(header)) is not None:
        return stored

    earlier = _earlier_answers(workspace, header)
    known: Answers = {key: answer for answers in earlier.values() for key, answer in answers.items()}
    options: dict[str, Any] = {
        "bos": guards.bos,
        "batch_size": settings.batch_size,
        "samples": settings.samples,
        "allow_mismatch": recipe.model.allow_mismatch,
        "known": known,
        "report": report,
    }
    found = []
    if tasks:
        from dsg_cli.evaluation import Asking, evaluate

        asking = Asking(settings.limit, settings.num_fewshot, settings.apply_chat_template)
        found.append(evaluate(loaded, modules, tasks, asking=asking, **options))
    if questions:
        from dsg_cli.paper_evaluation import evaluate_paper

        options |= {"limit": settings.limit, "question_ids": wanted}
        found.append(evaluate_paper(loaded, modules, questions, **options))
    return _write(workspace, clock, header, recipe, loaded, found, earlier, expected)


def _write(
    workspace: Workspace,
    clock: Clock,
    header: Header,
    recipe: Recipe,
    loaded: LoadedModel,
    found: Sequence[Any],
    earlier: dict[str, Answers],
    expected: Sequence[Expected],
) -> Stored:
    from dsg_cli.lm_eval_files import results_files
    from dsg_cli.scorer import answers_to_tensors

    results = {bench: sides for one in found for bench, sides in one.results.items()}
    first = [bench for bench in recipe.eval.benches if bench in results]
    results = {bench: results[bench] for bench in (*first, *(name for name in results if name not in first))}
    answers: Answers = {key: answer for one in found for key, answer in one.answers.items()}
    gate = {bench: rate for one in found for bench, rate in one.gate.items()}
    body = EvalReport(
        split=recipe.eval.split,
        results=results,
        gate=gate,
        expected=check_expected(expected, results, gate),
        question_ids={bench: ids for one in found for bench, ids in one.question_ids.items()},
        base_from=_taken(answers, earlier),
    )
    files: dict[str, bytes] = {}
    for one in found:
        if one.found:
            files |= results_files(one.found, model=loaded.source, created=header.created, samples=recipe.eval.samples)
    header = dataclasses.replace(header, notes=[note for one in found for note in _unheeded(one, recipe)])
    return workspace.write(
        clock.close(header, n_tokens=sum(one.n_tokens for one in found)),
        body,
        tensors=answers_to_tensors(answers),
        rows=[row for one in found for row in one.rows],
        folder=files,
    )


def _unheeded(found: Any, recipe: Recipe) -> list[str]:
    """Settings that a task overrules: lm-eval leaves a task that fixes its examples at 0 as it is."""
    wanted = recipe.eval.num_fewshot
    other = sorted({n for n in found.found.get("base", {}).get("n-shot", {}).values() if n != wanted})
    return [f"Some tasks fix their number of examples: {other}, not {wanted}."] if wanted is not None and other else []


def _earlier_answers(workspace: Workspace, header: Header) -> dict[str, Answers]:
    """Answers that the same base model gave, by evaluation: same weights, device, dtype and versions."""
    from dsg_cli.scorer import answers_from_tensors

    earlier = {}
    for artifact_id in workspace.ids("eval"):
        try:
            stored = workspace.read(artifact_id)
        except DsgError:  # A damaged artifact is no reason not to ask again.
            continue
        if _answers_count(stored.header, header) and stored.path.with_suffix(".safetensors").exists():
            earlier[artifact_id] = answers_from_tensors(workspace.tensors(stored))
    return earlier


def _answers_count(one: Header, other: Header) -> bool:
    def key(header: Header) -> tuple[object, ...]:
        return (
            header.model,
            header.settings.get("model_digest"),
            header.settings.get("batch_size"),
            header.git,
            header.device,
            header.dtype,
            header.packages,
            header.dsg_version,
        )

    return key(one) == key(other)


def _taken(answers: Iterable[bytes], earlier: dict[str, Answers]) -> dict[str, int]:
    """How many answers came from which evaluation; of several that have one, the last."""
    counts: dict[str, int] = {}
    for key in answers:
        holder = next((artifact_id for artifact_id in reversed(earlier) if key in earlier[artifact_id]), None)
        if holder is not None:
            counts[holder] = counts.get(holder, 0) + 1
    return counts
