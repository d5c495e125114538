"""Multiple-choice questions: where they come from, what a model answers, and how often that is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from dsg_cli.data.tokens import Request, encode_pair
from dsg_cli.errors import DsgError
from dsg_cli.evals import PAPER, is_free, known_benches
from dsg_cli.evals.benches import load_tasks
from dsg_cli.inference.scoring import GuardedModel, Score
from dsg_cli.intervals import wilson
from dsg_cli.job import PLAIN_JOB, Job
from dsg_cli.settings import EvalSection
from dsg_cli.workspace.body import Json

Change = Callable[[tuple[int, ...], int], tuple[int, ...]]
"""The context's token ids and the question's number -> the ids that the model is given instead."""


@dataclass(frozen=True)
class Question:
    """One multiple-choice question."""

    context: str
    choices: tuple[str, ...]
    """Continuations of the context, with their leading space."""
    answer: int


@dataclass(frozen=True)
class Outcome:
    """What a model made of one question."""

    is_right: bool
    is_gated: bool
    """One of its choices was gated or refused."""


def default_bench(forget: Sequence[str]) -> str:
    """The bench named like the forget corpus."""
    for name in forget:
        if name in known_benches():
            return name
    if not forget:
        reason = "Nothing says what was to be forgotten: no forget corpus was given."
        raise DsgError(reason, "Name a bench with --bench.")
    raise DsgError(f"No bench is named like the forget corpus ({', '.join(forget)}).", "Name one with --bench.")


def check_bench(bench: str) -> None:
    """Refuse a bench without multiple-choice questions whose prompts can be changed."""
    if bench in PAPER:
        raise DsgError(f"Attacks cannot ask {bench}.", f"Take {bench.partition('-paper')[0]}.")
    if is_free(bench):
        raise DsgError(f"Attacks cannot ask {bench}, whose answers are free text.", "Name multiple-choice questions.")


def load_questions(bench: str, settings: EvalSection, split: str | None = None) -> list[Question]:
    """The questions of a bench, at most `limit` of each of its tasks; of another split than the settings', if given."""
    check_bench(bench)
    tasks = load_tasks([bench], split=split or settings.split, include_path=settings.include_path)
    questions = [question for task in tasks for question in questions_of(task, limit=settings.limit)]
    if not questions:
        raise DsgError(f"The bench {bench} has no questions.")
    return questions


def questions_of(task: Any, *, limit: int | None = None) -> list[Question]:
    """The questions of a multiple-choice task or group, exactly as lm-eval would ask them."""
    if hasattr(task, "get_all_tasks"):
        return [question for inner in task.get_all_tasks() for question in questions_of(inner, limit=limit)]
    name = task.config.task
    if task.get_config("output_type") != "multiple_choice":
        raise DsgError(f"{name} is not a multiple-choice bench.", "Attacks ask questions with choices.")
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    by_doc: dict[int, list[Any]] = {}
    for instance in task.instances:
        by_doc.setdefault(instance.doc_id, []).append(instance)
    questions: list[Question] = []
    for instances in by_doc.values():
        instances.sort(key=lambda instance: instance.idx)
        if len({instance.args[0] for instance in instances}) > 1:
            raise DsgError(f"{name} asks each choice in a context of its own, which attacks cannot.")
        choices = tuple(instance.args[1] for instance in instances)
        questions.append(Question(instances[0].args[0], choices, _gold(task, instances[0].doc, choices, name)))
    return questions


def _gold(task: Any, doc: Any, choices: tuple[str, ...], name: str) -> int:
    target = task.doc_to_target(doc)
    if isinstance(target, str):
        stripped = [choice.strip() for choice in choices]
        target = stripped.index(target.strip()) if target.strip() in stripped else None
    if not isinstance(target, int) or not 0 <= target < len(choices):
        raise DsgError(f"A question of {name} has the answer {target!r}, which is none of its {len(choices)} choices.")
    return target


def requests_of(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], *, bos: int | None, change: Change | None = None
) -> list[Request]:
    """A request for each choice of each question, in their order; `change` is applied to each context."""
    requests: list[Request] = []
    for number, question in enumerate(questions):
        for choice in question.choices:
            request = encode_pair(tokenizer, question.context, choice, bos=bos)
            context = change(request.context, number) if change is not None else request.context
            requests.append(Request(context, request.continuation))
    return requests


def outcomes(questions: Sequence[Question], scores: Sequence[Score]) -> list[Outcome]:
    """The outcome of each question from the scores of its choices, in their order: the likeliest is the answer."""
    results: list[Outcome] = []
    remaining = iter(scores)
    for question in questions:
        own = [next(remaining) for _ in question.choices]
        values = [score.loglikelihood for score in own]
        is_right = values.index(max(values)) == question.answer
        results.append(Outcome(is_right, any(score.is_blocked for score in own)))
    return results


def grade(
    model: GuardedModel, questions: Sequence[Question], job: Job = PLAIN_JOB, *, change: Change | None = None
) -> list[Outcome]:
    """What the model makes of each question; wrappers act on what `change` has made of it."""
    requests = requests_of(model.tokenizer, questions, bos=model.bos, change=change)
    return outcomes(questions, model.loglikelihoods(requests, job))


def accuracy(
    model: GuardedModel, questions: Sequence[Question], job: Job = PLAIN_JOB, *, change: Change | None = None
) -> Json:
    """`{acc, low, high, n}`: accuracy with its 95 % Wilson interval, of n questions; under a guardrail or behind a
    filter also `gate_rate`, the share of questions with a choice that was gated or refused."""
    results = grade(model, questions, job, change=change)
    n, n_right = len(results), sum(result.is_right for result in results)
    low, high = wilson(n_right, n)
    measured: Json = {"acc": n_right / n, "low": low, "high": high, "n": n}
    return measured | ({"gate_rate": sum(result.is_gated for result in results) / n} if model.decides else {})


def chance_of(questions: Sequence[Question]) -> float:
    """Accuracy without any knowledge; of four choices where there is no question."""
    sizes = [len(question.choices) for question in questions] or [4]
    return sum(1 / n for n in sizes) / len(sizes)
