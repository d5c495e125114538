"""Conditions on an evaluation, such as `lab-hexes<=0.30`, for scripts that must fail when unlearning did."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass

from dsg_cli.artifacts import Json
from dsg_cli.errors import DsgError, nearest

COMPARISONS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}


@dataclass(frozen=True)
class Expected:
    """`bench[.metric] comparison bound`, on the unlearned model."""

    text: str
    bench: str
    metric: str
    comparison: str
    bound: float


def parse_expected(text: str, benches: Sequence[str]) -> Expected:
    """Read one condition.

    Raises:
        DsgError: Not a condition, or on a bench that is not run.
    """
    match = re.fullmatch(r"\s*([^\s<>=]+?)(?:\.([a-z][a-z0-9_]*))?\s*(<=|>=|<|>)\s*([0-9.eE+-]+)\s*", text)
    try:
        bound = float(match[4]) if match else None
    except ValueError:
        bound = None
    if match is None or bound is None:
        raise DsgError(f"--expect {text!r} is not a condition.", "Write, for example, --expect 'lab-hexes<=0.30'.")
    if match[1] not in benches:
        raise DsgError(f"--expect names the bench {match[1]}, which is not run.", nearest(match[1], benches))
    return Expected(text, match[1], match[2] or "acc", match[3], bound)


def check_expected(expected: Sequence[Expected], results: dict[str, Json]) -> list[Json]:
    """`[{expect, value, met}]`.

    Raises:
        DsgError: A metric that the bench does not have.
    """
    checked = []
    for one in expected:
        metrics = results[one.bench]["unlearned"]
        if one.metric not in metrics:
            raise DsgError(f"The bench {one.bench} has no metric {one.metric}.", nearest(one.metric, metrics))
        value = metrics[one.metric]
        checked.append({"expect": one.text, "value": value, "met": COMPARISONS[one.comparison](value, one.bound)})
    return checked
