"""Sweeps that reuse what is already computed: what they are called and what each may vary."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dsg_cli.errors import DsgError, nearest

if TYPE_CHECKING:
    from dsg_cli.settings import StudySection


def _is_strength(text: str) -> bool:
    from dsg_cli.settings import strength_of

    return strength_of(text, 1.0) is not None


@dataclass(frozen=True)
class Axis:
    """One setting that a grid may vary."""

    kind: type[Any]
    what: str
    """What its values must be."""
    is_fine: Callable[[Any], bool]
    key: str = ""
    """Of a recipe, where it stands for one."""


AXES = {
    "n_features": Axis(int, "a whole number, at least 1", lambda n: n >= 1, "select.n_features"),
    "strength": Axis(str, "a number or a multiple such as 16r", _is_strength, "guardrail.strength"),
    "ratio_percentile": Axis(
        float, "a number, at least 0 and below 100", lambda p: 0 <= p < 100, "select.ratio_percentile"
    ),
    "alpha": Axis(float, "a number between 0 and 1", lambda a: 0 < a < 1, "calibrate.alpha"),
    "by": Axis(str, "documents or entities", lambda by: by in ("documents", "entities")),
    "share": Axis(float, "a percentage, above 0 and at most 100", lambda share: 0 < share <= 100),
    "way": Axis(str, "each or union", lambda way: way in ("each", "union")),
    "requests": Axis(int, "a whole number, at least 1", lambda n: n >= 1),
    "sae": Axis(str, "the name of an SAE", bool, "sae.source"),
    "seed": Axis(int, "a whole number, at least 0", lambda seed: seed >= 0, "seed"),
    "length": Axis(int, "a whole number of tokens, at least 1", lambda n: n >= 1),
    "batch_size": Axis(int, "a whole number, at least 1", lambda n: n >= 1),
}

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
    found: tuple[str, ...] = field(default=())
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
        found=("n_documents", "n_entities"),
    ),
    "sequential": Study(
        "requests one after another: a guardrail each, against one for all",
        ("way", "requests", "n_features"),
        {"way": ["each", "union"]},
    ),
    "layers": Study(
        "every layer that has an SAE", ("sae", *OF_A_GUARDRAIL), {}, needs=("sae",), found=("hook", "n_in_sae")
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
        found=("hook", "n_in_sae"),
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


_WRONG = object()


def study_checks(section: StudySection) -> Iterator[tuple[bool, str]]:
    """What has the right type and still makes no sense."""
    from dsg_cli.settings import shown

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
    """Setting -> values, in the order of the study's columns."""
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


def points_of(grid: Grid) -> list[dict[str, Any]]:
    """Every combination of values."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _converted(axis: Axis, value: Any) -> Any:
    """The value in the axis's type, or `_WRONG`."""
    if isinstance(value, bool):
        return _WRONG
    if axis.kind is str and isinstance(value, str | int | float):
        value = str(value)
    from dsg_cli.settings import WHOLE_NUMBERS

    if axis.kind is float and isinstance(value, str | int):
        try:  # YAML 1.1 reads 1e-5, without a dot, as text.
            value = float(value)
        except (ValueError, OverflowError):
            return _WRONG
    is_number = type(value) is axis.kind and (not isinstance(value, float) or math.isfinite(value))
    if not is_number or (isinstance(value, int) and value not in WHOLE_NUMBERS):
        return _WRONG
    return value if axis.is_fine(value) else _WRONG
