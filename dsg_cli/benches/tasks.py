"""Bench names to lm-eval tasks: the lab's own, lm-eval's, and a user's from YAML files.

lm-eval's quirks live here and in evaluation.py.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsg_cli.errors import DsgError, nearest
from dsg_cli.lab import data as lab


@dataclass(frozen=True)
class Question:
    """One multiple-choice question."""

    context: str
    choices: tuple[str, ...]
    """Continuations of the context, with their leading space."""
    answer: int


def lab_task(bench: str, split: str) -> dict[str, Any]:
    """The configuration of an lm-eval task over a bench of the lab."""

    def load(**_metadata: Any) -> Any:
        from datasets import Dataset, DatasetDict

        rows = [json.loads(line) for line in lab.questions_path(bench).read_text().splitlines()]
        return DatasetDict({"test": Dataset.from_list([row for row in rows if row["split"] == split])})

    return {
        "task": bench,
        "custom_dataset": load,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def task_manager(names: Sequence[str], include_path: str | None) -> Any:
    """lm-eval's index of the tasks that the names need.

    Indexing all of lm-eval's thousands of tasks takes seconds, so it is done only for a name that is neither the lab's
    nor in the user's folder.
    """
    own = _index(include_path, False)
    others = [name for name in names if name not in lab.bench_names() and name not in own.all_tasks]
    return _index(include_path, True) if others else own


@functools.cache
def _index(include_path: str | None, include_defaults: bool) -> Any:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=include_defaults)


def check_benches(names: Sequence[str], include_path: str | None) -> None:
    """Refuse unknown benches before any weights are loaded.

    Raises:
        DsgError: None named, unknown, named twice, or a folder of tasks that is not there.
    """
    if not names:
        raise DsgError("No bench is named.", "Give one with --bench, for example --bench lab-hexes.")
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise DsgError(f"The bench {twice[0]} is named twice.")
    others = [name for name in names if name not in lab.bench_names()]
    if not others:
        return
    if include_path is not None and not Path(include_path).is_dir():
        raise DsgError(f"There is no folder {include_path} (--include-path).")
    known = task_manager(others, include_path).all_tasks
    for name in others:
        if name not in known:
            close = nearest(name, [*lab.bench_names(), *known])
            hint = (
                close if close.startswith("Did") else "`dsg ls benches` lists the lab's; lm-eval's tasks work by name."
            )
            raise DsgError(f"There is no bench named {name}.", hint)


def task_specs(names: Sequence[str], split: str) -> list[Any]:
    """What lm-eval is given for each bench: a configuration for the lab's, the name for others."""
    return [lab_task(name, split) if name in lab.bench_names() else name for name in names]


def load_questions(
    bench: str, *, split: str, include_path: str | None = None, limit: int | None = None
) -> list[Question]:
    """The questions of one multiple-choice bench, exactly as lm-eval would ask them.

    Raises:
        DsgError: The bench is a group of tasks, or does not score choices by log-likelihood.
    """
    loaded = task_manager([bench], include_path).load(task_specs([bench], split))["tasks"]
    questions: list[Question] = []
    for name, task in loaded.items():
        if task.get_config("output_type") != "multiple_choice":
            raise DsgError(f"{name} is not a multiple-choice bench.", "Attacks ask questions with choices.")
        task.build_all_requests(limit=limit, rank=0, world_size=1)
        by_doc: dict[int, list[Any]] = {}
        for instance in task.instances:
            by_doc.setdefault(instance.doc_id, []).append(instance)
        for instances in by_doc.values():
            instances.sort(key=lambda instance: instance.idx)
            choices = tuple(instance.args[1] for instance in instances)
            questions.append(Question(instances[0].args[0], choices, _gold(task, instances[0].doc, choices)))
    return questions


def _gold(task: Any, doc: Any, choices: tuple[str, ...]) -> int:
    target = task.doc_to_target(doc)
    if isinstance(target, str):
        return [choice.strip() for choice in choices].index(target.strip())
    return int(target)
