"""Conditions on an evaluation, such as `lab-hexes<=0.30`, for scripts that must fail when unlearning did.

    bench[.metric] comparison bound        the unlearned model's metric, by default acc
    bench.gate     comparison number       share of the bench's questions that were gated

A bound is a number, or the base model's value of the same metric: `base`, `0.99*base`, `base-0.02`, `0.99*base-0.01`.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from dsg_cli.errors import DsgError, nearest
from dsg_cli.workspace.body import Json

COMPARISONS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
GATE = "gate"

NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
CONDITION = re.compile(r"\s*([^\s<>=]+)\s*(<=|>=|<|>)\s*(\S(?:.*\S)?)\s*")
ABSOLUTE = re.compile(rf"[+-]?{NUMBER}")
OF_BASE = re.compile(rf"(?:({NUMBER})\s*\*\s*)?base(?:\s*([+-])\s*({NUMBER}))?")

EXAMPLES = "Write, for example, 'lab-hexes<=0.30', 'lab-near>=0.99*base-0.01' or 'lab-near.gate<=0.05'."


@dataclass(frozen=True)
class Expected:
    """One condition; its bound is `factor * base + offset`."""

    text: str
    bench: str
    metric: str
    comparison: str
    factor: float
    """0 where the bound is a number."""
    offset: float


def parse_expected(text: str, benches: Sequence[str]) -> Expected:
    """Read one condition."""
    match = CONDITION.fullmatch(text)
    bound = _read_bound(match[3]) if match else None
    if match is None or bound is None:
        raise DsgError(f"--expect {text!r} is not a condition.", EXAMPLES)
    bench, dot, metric = match[1].rpartition(".")
    if match[1] in benches or not dot:  # A task's own name may have a dot.
        bench, metric = match[1], "acc"
    if bench not in benches:
        raise DsgError(f"--expect names {bench}, which is not run.", nearest(bench, benches))
    if metric == GATE and bound[0]:
        raise DsgError(f"--expect {text!r}: the base model has no gate.", f"Give a number: '{bench}.gate<=0.05'.")
    return Expected(text, bench, metric, match[2], *bound)


def check_metrics(expected: Sequence[Expected], metrics: Mapping[str, Collection[str]]) -> None:
    """Refuse a condition on what will not be measured, before it is; `metrics` are those of every bench."""
    for claim in expected:
        if claim.bench not in metrics:
            raise DsgError(f"--expect {claim.text!r}: {claim.bench} stands for several benches.", "Name one of them.")
        known = metrics[claim.bench]
        # What follows from a metric is called after it: acc_low, acc_stderr, exact_match_<filter>.
        if claim.metric not in (GATE, "n") and not any(f"{claim.metric}_".startswith(f"{name}_") for name in known):
            raise DsgError(
                f"The bench {claim.bench} has no metric {claim.metric}.", nearest(claim.metric, [*known, GATE])
            )


def check_expected(expected: Sequence[Expected], results: Mapping[str, Json], gate: Mapping[str, Json]) -> list[Json]:
    """`[{expect, value, bound, met}]`, from bench -> side -> metric as in an EvalReport, and bench -> gate rate."""
    return [_check(claim, results.get(claim.bench, {}), gate.get(claim.bench, {})) for claim in expected]


def _check(claim: Expected, sides: Json, gate: Json) -> Json:
    metrics = {GATE: gate["rate"]} if claim.metric == GATE and gate else sides.get("unlearned", {})
    if claim.metric not in metrics:
        raise DsgError(f"The bench {claim.bench} has no metric {claim.metric}.", nearest(claim.metric, metrics))
    value = metrics[claim.metric]
    bound = claim.offset + (claim.factor * sides["base"][claim.metric] if claim.factor else 0.0)
    # 0.8 - 0.1 is a little more than 0.7 to a computer; a build must not fail by that.
    difference = 0.0 if math.isclose(value, bound, rel_tol=1e-9, abs_tol=1e-12) else value - bound
    return {"expect": claim.text, "value": value, "bound": bound, "met": COMPARISONS[claim.comparison](difference, 0.0)}


def _read_bound(text: str) -> tuple[float, float] | None:
    """Factor and offset; None if it is no finite bound."""
    if of_base := OF_BASE.fullmatch(text):
        factor, offset = float(of_base[1] or 1), float(f"{of_base[2] or ''}{of_base[3] or 0}")
    elif ABSOLUTE.fullmatch(text):
        factor, offset = 0.0, float(text)
    else:
        return None
    return (factor, offset) if math.isfinite(factor) and math.isfinite(offset) else None
