"""`--strength auto`: the smallest strength that forgets as well as any, on dev questions, never on what is reported."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from dsg_cli.artifacts import Guardrail, Header, Json
from dsg_cli.attacks.asking import ask
from dsg_cli.benches.tasks import Question, load_tasks, questions_of
from dsg_cli.errors import DsgError
from dsg_cli.guardrail import module_from_artifact
from dsg_cli.lab import data as lab
from dsg_cli.model import LoadedModel, context_length
from dsg_cli.recipe import Recipe

SATURATED = 0.02
"""Accuracy above the lowest of all strengths that still counts as forgotten as well."""


def tuning_questions(recipe: Recipe, forget: Sequence[str]) -> list[Question]:
    """The questions that a strength is chosen on: the lab's dev questions, or those of a bench that is named.

    Raises:
        DsgError: None is named and the lab has none, or the bench is one of those that are reported.
    """
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


def smallest_sufficient(
    loaded: LoadedModel,
    header: Header,
    body: Guardrail,
    tensors: dict[str, Tensor],
    questions: Sequence[Question],
    strengths: Sequence[tuple[str, float]],
    *,
    batch_size: int,
) -> tuple[float, list[Json]]:
    """The smallest strength whose accuracy is that of the best one but for `SATURATED`, and all that were tried.

    Args:
        loaded: The whole model.
        header: Of the guardrail.
        body: The guardrail, whose strength does not matter.
        tensors: Its own.
        questions: On what is to be forgotten.
        strengths: As they are written, and as numbers.
        batch_size: Sequences in a batch.
    """
    trials: list[Json] = []
    for setting, strength in sorted(strengths, key=lambda one: one[1]):
        tried = dataclasses.replace(body, strength=strength)
        module = module_from_artifact(tried, header.model, tensors, where="The new guardrail")
        found = ask(
            loaded.model,
            loaded.tokenizer,
            questions,
            guardrails=[module.to(loaded.model.device)],
            bos=body.bos,
            batch_size=batch_size,
            max_length=context_length(loaded.model.config),
        )
        trials.append({"strength": strength, "setting": setting, "acc": found["acc"], "gate_rate": found["gate_rate"]})
    lowest = min(trial["acc"] for trial in trials)
    return next(trial["strength"] for trial in trials if trial["acc"] <= lowest + SATURATED), trials
