"""Bench names to lm-eval tasks: the lab's own, lm-eval's, and a user's from YAML files.

lm-eval's quirks live here and in evaluation.py.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsg_cli.data.corpora import load_corpus
from dsg_cli.data.hub import commit_read, data_errors, load_rows
from dsg_cli.errors import DsgError, nearest, reason_of
from dsg_cli.evals import CORPUS_BENCHES, MUSE, PAPER, QUICK, TOFU, bench_name, is_free, known_benches, task_name
from dsg_cli.evals.free_text import TextBench
from dsg_cli.evals.muse import Muse
from dsg_cli.evals.passages import MOST, Fluency, Memory
from dsg_cli.evals.tofu import Tofu
from dsg_cli.lab import data as lab
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

    Args:
        benches: Names of the lab's benches or of lm-eval's tasks and groups.
        split: `dev` or `test`; for the lab's benches.
        include_path: Folder with tasks of the user's own.
        can_generate: Whether tasks may generate text; the gate `mean` cannot guard that.
    """
    twice = sorted({name for name in benches if list(benches).count(name) > 1})
    if twice:
        raise DsgError(f"The bench {twice[0]} is named twice.")
    if include_path is not None and not is_folder(Path(include_path)):
        raise DsgError(f"There is no folder {include_path} (--include-path).")
    own = task_index((include_path,) if include_path else (), False).all_tasks
    taken = sorted(set(own) & set(known_benches()))
    if taken:
        raise DsgError(f"{include_path} has a task named {taken[0]}, which is a bench of ours.", "Rename it.")
    asked = [task_name(name) for name in benches if name not in lab.bench_names() and task_name(name) not in own]
    folders = sorted({str(LM_EVAL_TASKS / QUICK[name]) for name in asked if name in QUICK})
    is_quick = all(name in QUICK for name in asked)
    manager = task_index((*([include_path] if include_path else []), *(folders if is_quick else [])), not is_quick)
    for name in benches:
        if name not in lab.bench_names() and task_name(name) not in manager.all_tasks:
            close = nearest(name, [*known_benches(), *manager.all_tasks])
            known = "`dsg ls benches` lists ours; lm-eval's tasks work by their names."
            raise DsgError(f"There is no bench named {name}.", close if close.startswith("Did") else known)
    return [built for name in benches for built in _build(manager, name, split, can_generate)]


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
    measured = {bench: {"acc"} for bench in PAPER}
    for task in tasks:
        if hasattr(task, "aggregate_metric_list"):  # A group.
            measured[bench_name(task.name)] = {one.metric for one in task.aggregate_metric_list or ()}
        else:
            measured[bench_name(task.config.task)] = set(task.aggregation())
    return measured


def commits(tasks: Sequence[Any]) -> dict[str, str]:
    """Task -> the commit of the hub that its questions were read from, for those that come from it."""
    single = [one for task in tasks for one in (task.get_all_tasks() if hasattr(task, "get_all_tasks") else [task])]
    read = {one.config.task: commit_read(one.eval_docs) for one in single}
    return {task: commit for task, commit in read.items() if commit}


def _lab_task(bench: str, split: str) -> dict[str, Any]:
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


LAB_VERBATIM, LAB_ANSWER = 2, 8
"""Tokens that are written in the lab: a value with its full stop, and an answer, which ends with one."""


def load_free(
    benches: Sequence[str],
    *,
    split: str,
    limit: int | None = None,
    holdout: Sequence[str] = (),
    seed: int = 0,
) -> tuple[list[TextBench], dict[str, str]]:
    """Those benches among some that are on free text, their data read, and the commits of the hub that they came from.

    Args:
        benches: Names.
        split: `dev` or `test`; for the lab's benches.
        limit: Items of each part, at most.
        holdout: Corpora that the model never saw, for `memory:`.
        seed: Of the texts that are taken of a long corpus.
    """
    names = [name for name in benches if is_free(name)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DsgError(f"The bench {twice[0]} is named twice.")
    for name in names:
        check_corpus_bench(name)
    if holdout and not any(name.startswith("memory:") for name in names):
        raise DsgError("eval.holdout is for benches memory:CORPUS.", "Name one, or leave it out.")
    commits: dict[str, str] = {}
    found: list[TextBench] = []
    for name in names:
        bench = _bench(name, split, limit, holdout, seed, commits)
        if not bench.items():
            raise DsgError(f"The bench {name} has no questions.")
        found.append(bench)
    return found, commits


def _bench(
    name: str, split: str, limit: int | None, holdout: Sequence[str], seed: int, commits: dict[str, str]
) -> TextBench:
    if name in MUSE:
        if name == "lab-muse":
            from dsg_cli.lab.benchmarks import rows as lab_rows

            return Muse(
                name,
                lambda config, part: lab_rows("muse", config, part, part=split),  # type: ignore[arg-type]
                asked="{question}",
                shown="{question} {answer} ",
                stop=(".",),
                n_verbatim=LAB_VERBATIM,
                n_answer=LAB_ANSWER,
                limit=limit,
            )
        return Muse(name, _rows_of(MUSE[name], commits, name), limit=limit)
    if name in TOFU:
        repo, forget = TOFU[name]
        if name == "lab-tofu":
            from dsg_cli.lab.benchmarks import rows as lab_rows

            return Tofu(
                name,
                forget,
                lambda config: lab_rows("tofu", config, "train", part=split),  # type: ignore[arg-type]
                asked="{question}",
                stop=(".",),
                n_new=LAB_ANSWER,
                limit=limit,
            )
        rows = _rows_of(repo, commits, name)
        return Tofu(name, forget, lambda config: rows(config, "train"), limit=limit)
    kind, _, corpus = name.partition(":")
    texts = _texts(corpus, limit, seed)
    if kind == "fluency":
        return Fluency(name, texts)
    return Memory(name, texts, [text for one in holdout for text in _texts(one, limit, seed)])


def _rows_of(repo: str, commits: dict[str, str], name: str) -> Any:
    kept: dict[tuple[str, str], Any] = {}

    def rows(config: str, split: str) -> Any:
        if (config, split) not in kept:
            read = load_rows(repo, config, split)
            commits[name] = commit_read(read)
            kept[config, split] = read.to_list()
        return kept[config, split]

    return rows


def _texts(name: str, limit: int | None, seed: int) -> list[str]:
    """Texts of a corpus, at most so many, drawn at random."""
    texts = [text for text in load_corpus(name).texts if len(text.split()) > 1]
    n = min(len(texts), limit or MOST)
    return [texts[i] for i in sorted(random.Random(seed).sample(range(len(texts)), n))]


def check_corpus_bench(name: str) -> None:
    """Refuse a name that says no corpus."""
    kind, _, corpus = name.partition(":")
    if kind in CORPUS_BENCHES and not corpus:
        raise DsgError(f"The bench {name} names no corpus.", f"Write {kind}:CORPUS, such as {kind}:lab-hexes.")
