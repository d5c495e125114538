"""Every study by its name, and every setting that a grid may vary. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dsg_cli.errors import DsgError, nearest
from dsg_cli.strength import strength_of


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
    "strength": Axis(
        str, "a number or a multiple such as 16r", lambda c: strength_of(c, 1.0) is not None, "guardrail.strength"
    ),
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
    """One study; its code is the module of that name in this package."""

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
    """Refuse a name that is no study's.

    Raises:
        DsgError: It is none.
    """
    if name not in STUDIES:
        raise DsgError(f"There is no study {name[:200]}.", nearest(name[:200], STUDIES))


def module_name(name: str) -> str:
    """The module that a study's code is in."""
    return f"dsg_cli.studies.{name.replace('-', '_')}"
