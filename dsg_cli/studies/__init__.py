"""Sweeps that reuse what is already computed: what they are called and what each may vary."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsg_cli.errors import DsgError, nearest


@dataclass(frozen=True)
class Axis:
    """One setting that a grid may vary."""

    kind: type[int | float | str]
    key: str = ""
    """Of a recipe, where it stands for one."""


AXES = {
    "n_features": Axis(int, "select.n_features"),
    "strength": Axis(str, "guardrail.strength"),
    "ratio_percentile": Axis(float, "select.ratio_percentile"),
    "alpha": Axis(float, "calibrate.alpha"),
    "by": Axis(str),
    "share": Axis(float),
    "way": Axis(str),
    "requests": Axis(int),
    "sae": Axis(str, "sae.source"),
    "seed": Axis(int, "seed"),
    "length": Axis(int),
    "batch_size": Axis(int),
}
"""What their values may be is in settings.GridValues."""

OF_A_GUARDRAIL = ("n_features", "strength", "ratio_percentile", "alpha")
"""What one pass over the text serves every value of."""

Grid = dict[str, list[Any]]


@dataclass(frozen=True)
class Study:
    """One study; its code is `rows_of_<name>` in studies.py."""

    what: str
    axes: tuple[str, ...]
    """Settings that a grid of it may name, in the order of the table's columns."""
    default: Grid
    """What is varied where a recipe says nothing."""
    needs: tuple[str, ...] = ()
    """Settings without a default: a recipe must name their values."""
    columns: tuple[str, ...] = ()
    """Further columns, which say what a point turned out to be."""
    asks: bool = True
    """Whether it asks questions."""


STUDIES = {
    "stability": Study(
        "how much the choice of features, strength and alpha matters",
        OF_A_GUARDRAIL,
        {
            "n_features": [5, 10, 20, 40],
            "strength": ["1r", "4r", "16r", "64r"],
            "ratio_percentile": [90.0, 95.0],
            "alpha": [0.01, 0.03, 0.1],
        },
    ),
    "data-efficiency": Study(
        "how much forget text is needed, by documents or by entities",
        ("by", "share", "seed"),
        {"by": ["documents"], "share": [1.0, 5.0, 10.0, 25.0, 50.0, 100.0]},
        columns=("n_documents", "n_entities"),
    ),
    "sequential": Study(
        "requests one after another: a guardrail each, against one for all",
        ("way", "requests", "n_features"),
        {"way": ["each", "union"]},
    ),
    "layers": Study(
        "every layer that has an SAE", ("sae", *OF_A_GUARDRAIL), {}, needs=("sae",), columns=("hook", "n_in_sae")
    ),
    "length": Study(
        "threshold and false positives against the length of the text",
        ("length", "alpha"),
        {"length": [8, 16, 32, 64, 128]},
        asks=False,
    ),
    "cost": Study(
        "time of a guarded forward pass against a plain one, by length and batch",
        ("length", "batch_size"),
        {"length": [16, 64, 256], "batch_size": [1, 8, 32]},
        asks=False,
    ),
    "seeds": Study(
        "other seeds of SAE and data",
        ("sae", "seed", *OF_A_GUARDRAIL),
        {"seed": [0, 1, 2]},
        columns=("hook", "n_in_sae"),
    ),
}


def check_study(name: str) -> None:
    """Refuse a name that is no study's."""
    if name not in STUDIES:
        raise DsgError(f"There is no study {name[:200]}.", nearest(name[:200], STUDIES))


def load_study(name: str) -> Callable[..., list[dict[str, Any]]]:
    """The function that measures the rows of one point: `rows_of_<name>`."""
    module = importlib.import_module("dsg_cli.studies.studies")
    rows_of: Callable[..., list[dict[str, Any]]] = getattr(module, f"rows_of_{name.replace('-', '_')}")
    return rows_of


def grid_of(name: str, grids: Mapping[str, Mapping[str, Any]], sequence: Sequence[str]) -> Grid:
    """Setting -> values of a study, in the order of its columns; what a recipe does not name has the study's default.

    Values in `grids` are as they were written: numbers where text is meant. `sequence` are further requests to forget.
    """
    study, named = STUDIES[name], grids.get(name, {})
    for axis in study.needs:
        if axis not in named:
            raise DsgError(
                f"The study {name} needs values for {axis}.",
                f"Name them: --grid {axis}=ONE,TWO, or study.grids.{name}.{axis} in a recipe.",
            )
    values = {axis: named.get(axis, study.default.get(axis, [])) for axis in study.axes}
    grid: Grid = {axis: [AXES[axis].kind(value) for value in values[axis]] for axis in study.axes}
    if name == "sequential":
        grid["requests"] = _requests(grid["requests"], 1 + len(sequence))
    return {axis: values for axis, values in grid.items() if values}


def _requests(counts: list[int], n_requests: int) -> list[int]:
    """How many requests have been met at each point; by default 1, 2, ... up to all."""
    if n_requests == 1:
        raise DsgError(
            "The study sequential needs further requests.",
            "Name corpora that are to be forgotten after the first: --set 'study.sequence=[CORPUS, ...]'.",
        )
    if counts and max(counts) > n_requests:
        raise DsgError(
            f"study.grids.sequential.requests has {max(counts)}, but there are {n_requests} requests.",
            "Name more corpora in study.sequence.",
        )
    return counts or list(range(1, n_requests + 1))


def points_of(grid: Grid) -> list[dict[str, Any]]:
    """Every combination of values."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
