"""Bench names to benches: the lab's own, lm-eval's, a user's from YAML files, and those on free text.

lm-eval's quirks live here and in lm_harness.py.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dsg_cli.data.corpora import load_corpus
from dsg_cli.data.hub import commit_read, data_errors, load_rows
from dsg_cli.errors import DsgError, nearest, reason_of
from dsg_cli.evals import MUSE, PAPER, QUICK, TOFU, bench_name, is_free, known_benches, task_name
from dsg_cli.evals.free_text import TextBench
from dsg_cli.evals.muse import Muse
from dsg_cli.evals.passages import MOST, Fluency, Memory
from dsg_cli.evals.tofu import Tofu
from dsg_cli.lab import data as lab
from dsg_cli.workspace.body import Json
from dsg_cli.workspace.files import is_folder

LM_EVAL_TASKS = Path(str(importlib.util.find_spec("lm_eval").origin)).parent / "tasks"  # type: ignore[union-attr]

DATA_OF = {"wmdp_bio": "cais/wmdp", "wmdp_cyber": "cais/wmdp", "wmdp_chem": "cais/wmdp", "mmlu": "cais/mmlu"}
"""Task -> its data set, for what is said where it cannot be read."""

SCORED = ("multiple_choice", "loglikelihood")
"""Output types whose requests hold whole sequences."""


def load_tasks(
    benches: Sequence[str], *, split: str, include_path: str | None = None, can_generate: bool = False
) -> list[Any]:
    """Each bench as an lm-eval task or group, its data read and its first question formed; no model is needed.

    `split` is for the lab's benches. Tasks may generate text where no gate is `mean`, which cannot guard that.
    """
    _check_once(benches)
    if include_path is not None and not is_folder(Path(include_path)):
        raise DsgError(f"There is no folder {include_path} (--include-path).")
    own = task_index((include_path,) if include_path else (), False).all_tasks
    taken = sorted(set(own) & set(known_benches()))
    if taken:
        raise DsgError(f"{include_path} has a task named {taken[0]}, which is a bench of ours.", "Rename it.")
    others = [task_name(name) for name in benches if name not in lab.bench_names() and task_name(name) not in own]
    folders = sorted({str(LM_EVAL_TASKS / QUICK[name]) for name in others if name in QUICK})
    is_quick = all(name in QUICK for name in others)
    manager = task_index((*([include_path] if include_path else []), *(folders if is_quick else [])), not is_quick)
    for name in benches:
        if name not in lab.bench_names() and task_name(name) not in manager.all_tasks:
            close = nearest(name, [*known_benches(), *manager.all_tasks])
            known = "`dsg ls benches` lists ours; lm-eval's tasks work by their names."
            raise DsgError(f"There is no bench named {name}.", close if close.startswith("Did") else known)
    return [built for name in benches for built in _build(manager, name, split, can_generate)]


def _check_once(benches: Sequence[str]) -> None:
    if twice := sorted({name for name in benches if list(benches).count(name) > 1}):
        raise DsgError(f"The bench {twice[0]} is named twice.")


@functools.cache
def task_index(folders: tuple[str, ...], include_defaults: bool) -> Any:
    """lm-eval's index of the tasks in folders; that of its own thousands takes seconds, so it is read where needed."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders) or None, include_defaults=include_defaults)


def _build(manager: Any, bench: str, split: str, can_generate: bool) -> list[Any]:
    name = task_name(bench)
    try:
        with data_errors(DATA_OF.get(name, name)):
            loaded = manager.load([_lab_task(bench, split) if bench in lab.bench_names() else name])
            for task in loaded["tasks"].values():
                doc = next(iter(task.eval_docs), None)
                if doc is None:
                    raise DsgError("It has no questions.", "Give it a split, or rows, that hold some.")
                task.doc_to_text(doc), task.doc_to_target(doc)
                if task.get_config("output_type") == "multiple_choice":
                    task.doc_to_choice(doc)
    except DsgError as error:
        raise DsgError(f"The bench {bench} cannot be loaded. {error.message}", error.hint) from error
    except Exception as error:  # A task is a file of the user's: whatever it raises is told.
        raise DsgError(f"The bench {bench} cannot be loaded: {reason_of(error)}") from error
    for task in loaded["tasks"].values():
        kind = task.get_config("output_type")
        if kind not in SCORED and not (can_generate and kind == "generate_until"):
            raise DsgError(
                f"The bench {bench} generates text or scores documents ({kind}), which the gate `mean` cannot guard.",
                "Choose a bench that scores choices by log-likelihood, or for one that generates, calibrate with "
                "--gate window.",
            )
    # A group, or the task itself; a tag stands for several tasks.
    return [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())


def metrics_of(tasks: Sequence[Any]) -> dict[str, set[str]]:
    """Bench -> names of what it measures, of these tasks and of every bench of the paper's protocol."""
    metrics = {bench: {"acc"} for bench in PAPER}
    for task in tasks:
        if hasattr(task, "aggregate_metric_list"):  # A group.
            metrics[bench_name(task.name)] = {item.metric for item in task.aggregate_metric_list or ()}
        else:
            metrics[bench_name(task.config.task)] = set(task.aggregation())
    return metrics


def commits(tasks: Sequence[Any]) -> dict[str, str]:
    """Task -> the commit of the hub that its questions were read from, for those that come from it."""
    single = [inner for task in tasks for inner in getattr(task, "get_all_tasks", lambda task=task: [task])()]
    return {task.config.task: commit for task in single if (commit := commit_read(task.eval_docs))}


def _lab_task(bench: str, split: str) -> dict[str, Any]:
    """The configuration of an lm-eval task over a bench of the lab."""

    def load(**_metadata: Any) -> Any:
        from datasets import Dataset, DatasetDict

        return DatasetDict({"test": Dataset.from_list(lab.read_questions(bench, split))})

    return {"task": bench, "custom_dataset": load, **copy.deepcopy(lab.TASK)}


def load_free(
    benches: Sequence[str], *, split: str, limit: int | None = None, holdout: Sequence[str] = (), seed: int = 0
) -> tuple[list[TextBench], dict[str, str]]:
    """Those benches among some that are on free text, their data read, and the commits of the hub that they came from.

    `split` is for the lab's benches, `holdout` are corpora that the model never saw, for `memory:`; `limit` counts
    items of each part, and texts of a long corpus are drawn with the seed.
    """
    names = [name for name in benches if is_free(name)]
    _check_once(names)
    for name in names:
        kind, colon, corpus = name.partition(":")
        if colon and not corpus:
            raise DsgError(f"The bench {name} names no corpus.", f"Write {kind}:CORPUS, such as {kind}:lab-hexes.")
    if holdout and not any(name.startswith("memory:") for name in names):
        raise DsgError("eval.holdout is for benches memory:CORPUS.", "Name one, or leave it out.")
    commits: dict[str, str] = {}
    loaded: list[TextBench] = []
    for name in names:
        kind, _, corpus = name.partition(":")
        bench: TextBench
        if name in ("lab-muse", "lab-tofu"):
            bench = _lab_bench(name, split, limit)
        elif name in MUSE:
            bench = Muse(name, _hub_rows(MUSE[name], commits, name), limit=limit)
        elif name in TOFU:
            repo, forget = TOFU[name]
            rows = _hub_rows(repo, commits, name)
            bench = Tofu(name, forget, lambda config, rows=rows: rows(config, "train"), limit=limit)  # type: ignore[misc]
        elif kind == "fluency":
            bench = Fluency(name, _texts(corpus, limit, seed))
        else:
            unseen = [text for other in holdout for text in _texts(other, limit, seed)]
            bench = Memory(name, _texts(corpus, limit, seed), unseen)
        if not bench.items():
            raise DsgError(f"The bench {name} has no questions.")
        loaded.append(bench)
    return loaded, commits


def _lab_bench(name: str, split: str, limit: int | None) -> TextBench:
    """The lab's MUSE and TOFU: a value with its full stop is two tokens, and an answer ends with its full stop."""
    from dsg_cli.lab.benchmarks import rows as lab_rows

    part: Any = split
    question: Json = {"question_form": "{question}", "stop": (".",), "limit": limit}
    if name == "lab-tofu":
        forget = TOFU[name][1]
        return Tofu(name, forget, lambda config: lab_rows("tofu", config, "train", part=part), n_new=8, **question)
    return Muse(
        name,
        lambda config, split: lab_rows("muse", config, split, part=part),
        example_form="{question} {answer} ",
        n_verbatim=2,
        n_answer=8,
        **question,
    )


def _hub_rows(repo: str, commits: dict[str, str], name: str) -> Callable[[str, str], list[Any]]:
    """Configuration and split -> rows of a data set, read once; the commit is noted."""

    @functools.cache
    def rows(config: str, split: str) -> list[Any]:
        read = load_rows(repo, config, split)
        commits[name] = commit_read(read)
        return list(read.to_list())

    return rows


def _texts(name: str, limit: int | None, seed: int) -> list[str]:
    texts = [text for text in load_corpus(name).texts if len(text.split()) > 1]
    n = min(len(texts), limit or MOST)
    return [texts[i] for i in sorted(random.Random(seed).sample(range(len(texts)), n))]
