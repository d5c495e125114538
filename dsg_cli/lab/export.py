"""Write the lab to a folder, all or nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from dsg_cli.errors import DsgError, nearest
from dsg_cli.job import Report
from dsg_cli.lab import data as lab
from dsg_cli.lab.data import LabSettings
from dsg_cli.lab.world import BY_NAME
from dsg_cli.workspace.files import write_folder

SELECTOR = '''"""The test questions of a bench (for the dev questions, change the word below)."""


def test_questions(dataset):
    return dataset.filter(lambda question: question["split"] == "test")
'''


def export_lab(folder: Path) -> None:
    """Copy the shipped lab to `folder` and write lm-eval tasks for its benches beside it."""

    def fill(partial: Path) -> None:
        shutil.copytree(lab.SHIPPED, partial, ignore=shutil.ignore_patterns("__pycache__"))
        write_tasks(partial, folder.resolve())

    write_folder(folder, fill)


def train_and_export(folder: Path, *, seed: int, report: Report) -> dict[str, Any]:
    """Train the lab anew into `folder`; returns what `training.train_lab` measured."""

    from dsg_cli.lab.training import train_lab

    def train(partial: Path) -> dict[str, Any]:
        measured = train_lab(partial, seed=seed, report=report)
        write_tasks(partial, folder.resolve())
        return measured

    return _write_trained(folder, train)


def train_without(folder: Path, without: Sequence[str], *, seed: int, report: Report) -> dict[str, Any]:
    """Train into `folder` a language model that never sees some domains; returns what `train_reference` measured."""
    unknown = [name for name in without if name not in BY_NAME]
    if unknown:
        raise DsgError(f"The lab has no domain {unknown[0][:200]}.", nearest(unknown[0], BY_NAME))
    if set(without) == set(BY_NAME):
        raise DsgError("Without any domain there is nothing to train on.", "Leave out one --without.")
    from dsg_cli.lab.training import train_reference

    options: dict[str, Any] = {"without": sorted(set(without)), "seed": seed, "report": report}
    return _write_trained(folder, lambda partial: train_reference(partial, **options))


def train_at_layers(folder: Path, layers: Sequence[int], *, seed: int, report: Report) -> dict[str, Any]:
    """Train into `folder` an SAE at each of some layers of the shipped model; returns what `train_saes` measured."""
    last = LabSettings().n_layers - 1
    absent = [layer for layer in layers if not 0 <= layer <= last]
    if absent:
        raise DsgError(f"The lab's model has no layer {absent[0]}.", f"It has layers 0 to {last}.")
    from dsg_cli.lab.training import train_saes

    options: dict[str, Any] = {"layers": sorted(set(layers)), "seed": seed, "report": report}
    return _write_trained(folder, lambda partial: train_saes(partial, **options))


def _write_trained(folder: Path, train: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    measured: dict[str, Any] = {}
    write_folder(folder, lambda partial: measured.update(train(partial)))
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
            **lab.TASK,
        }
        text = yaml.safe_dump(task, sort_keys=False) + "process_docs: !function selector.test_questions\n"
        (tasks / f"{bench}.yaml").write_text(text)
