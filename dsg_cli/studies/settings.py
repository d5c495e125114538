"""What a recipe says of studies, and the points of a grid. No torch here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from dsg_cli.artifacts import Json
from dsg_cli.conversion import WHOLE_NUMBERS, shown
from dsg_cli.errors import DsgError, nearest
from dsg_cli.studies.names import AXES, STUDIES, Axis, Grid

_WRONG = object()


@dataclass(frozen=True)
class StudySection:
    """What is varied, and on which questions it is measured."""

    grids: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    """Study -> setting -> values; a setting that is not named has the study's own default, or the recipe's value."""
    forget: str | None = None
    """Bench on what is to be forgotten; by default the one named like the first forget corpus."""
    benches: list[str] = field(default_factory=list)
    """Benches that must stay answered; by default those of `eval`."""
    split: Literal["dev", "test"] = "dev"
    """Of the lab's benches: `dev` to choose by, `test` to report once the choice is made."""
    sequence: list[str] = field(default_factory=list)
    """Corpora that are to be forgotten after the first, one request after another; each has a bench of its name."""
    entities_file: str | None = None
    """Names that documents of the forget corpus are about, one a line; those of the lab's corpora are known."""
    repeats: int = 15
    """Pairs of a plain and a guarded forward pass that are timed at each point of `cost`."""


def checks(section: StudySection) -> Iterator[tuple[bool, str]]:
    """What has the right type and still makes no sense."""
    yield section.repeats >= 3, f"study.repeats is {section.repeats}; time at least 3 pairs."
    for name, grid in section.grids.items():
        where = f"study.grids.{name}"
        if name not in STUDIES:
            yield False, f"study.grids names no study {name[:200]}. {nearest(name[:200], STUDIES)}"
            continue
        yield bool(grid), f"{where} is empty; name a setting ({', '.join(STUDIES[name].axes)}), or leave the grid out."
        for setting, values in grid.items():
            if setting not in STUDIES[name].axes:
                yield False, f"{where} names no setting {setting[:200]}. {nearest(setting[:200], STUDIES[name].axes)}"
                continue
            axis = AXES[setting]
            found = [_converted(axis, value) for value in values]
            wrong = [value for value, one in zip(values, found, strict=True) if one is _WRONG]
            yield bool(values), f"{where}.{setting} has no value."
            yield not wrong, f"{where}.{setting} must be {axis.what}, not {shown(wrong[0] if wrong else '')}."
            yield len(set(map(repr, found))) == len(found), f"{where}.{setting} has a value twice: {shown(values)}."


def grid_of(study: str, section: StudySection) -> Grid:
    """Setting -> values, in the order of the study's columns.

    Raises:
        DsgError: The recipe lacks something that the study cannot do without.
    """
    known, given = STUDIES[study], section.grids.get(study, {})
    missing = [name for name in known.needs if name not in given]
    if missing:
        raise DsgError(
            f"The study {study} needs values for {missing[0]}, {AXES[missing[0]].what}.",
            f"Name them: --grid {missing[0]}=ONE,TWO, or study.grids.{study}.{missing[0]} in a recipe.",
        )
    grid = {name: given.get(name, known.default.get(name, [])) for name in known.axes}
    if study == "sequential":
        grid |= {"requests": _requests(grid["requests"], section)}
    return {name: [_converted(AXES[name], value) for value in values] for name, values in grid.items() if values}


def _requests(given: list[Any], section: StudySection) -> list[Any]:
    """How many requests have been met, at each point."""
    n_requests = 1 + len(section.sequence)
    if n_requests == 1:
        raise DsgError(
            "The study sequential needs further requests.",
            "Name corpora that are to be forgotten after the first: --set 'study.sequence=[CORPUS, ...]'.",
        )
    if given and max(given) > n_requests:
        raise DsgError(
            f"study.grids.sequential.requests has {max(given)}, but there are {n_requests} requests.",
            "Name more corpora in study.sequence.",
        )
    return given or list(range(1, n_requests + 1))


def points_of(grid: Grid) -> list[Json]:
    """Every combination of values."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _converted(axis: Axis, value: Any) -> Any:
    """The value in the axis's type, or `_WRONG`."""
    if isinstance(value, bool):
        return _WRONG
    if axis.kind is str and isinstance(value, str | int | float):
        value = str(value)
    if axis.kind is float and isinstance(value, str | int):
        try:  # YAML 1.1 reads 1e-5, without a dot, as text.
            value = float(value)
        except (ValueError, OverflowError):
            return _WRONG
    is_number = type(value) is axis.kind and (not isinstance(value, float) or math.isfinite(value))
    if not is_number or (isinstance(value, int) and value not in WHOLE_NUMBERS):
        return _WRONG
    return value if axis.is_fine(value) else _WRONG
