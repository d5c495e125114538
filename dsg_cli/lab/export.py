"""Write the lab to a folder, all or nothing."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from dsg_cli.errors import DsgError
from dsg_cli.lab import data as lab
from dsg_cli.progress import Report

SELECTOR = '''"""The test questions of a bench (for the dev questions, change the word below)."""


def test_questions(dataset):
    return dataset.filter(lambda question: question["split"] == "test")
'''


def export_lab(folder: Path) -> None:
    """Copy the shipped lab to `folder` and write lm-eval tasks for its benches beside it.

    Raises:
        DsgError: The folder is not empty, or cannot be written to.
    """

    def fill(partial: Path) -> None:
        shutil.copytree(lab.SHIPPED, partial, ignore=shutil.ignore_patterns("__pycache__"))
        write_tasks(partial, folder.resolve())

    _all_or_nothing(folder, fill)


def train_and_export(folder: Path, *, seed: int, report: Report) -> dict[str, Any]:
    """Train the lab anew into `folder`; returns what `training.train_lab` measured.

    Raises:
        DsgError: The folder is not empty, or cannot be written to.
    """
    measured: dict[str, Any] = {}

    def fill(partial: Path) -> None:
        from dsg_cli.lab.training import train_lab

        measured.update(train_lab(partial, seed=seed, report=report))
        write_tasks(partial, folder.resolve())

    _all_or_nothing(folder, fill)
    return measured


def write_tasks(folder: Path, final: Path) -> None:
    """`tasks/<bench>.yaml` for lm-eval's --include_path; data files are named by where they will lie."""
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "selector.py").write_text(SELECTOR)
    for bench in lab.bench_names():
        task = {
            "task": bench,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(final / "questions" / f"{bench}.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "context",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0},
        }
        text = yaml.safe_dump(task, sort_keys=False) + "process_docs: !function selector.test_questions\n"
        (tasks / f"{bench}.yaml").write_text(text)


def _all_or_nothing(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a scratch folder beside `folder` and rename what it holds once that is whole."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DsgError(f"{folder} exists and is not empty.", "Name a new folder.")
    folder = folder.resolve()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            fill(scratch / "lab")
            if folder.exists():
                folder.rmdir()
            (scratch / "lab").rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise DsgError(f"{folder} cannot be written: {error.strerror or error}.") from error
