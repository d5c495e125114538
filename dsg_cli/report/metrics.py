"""Which metrics of a bench a table shows, and how its numbers are written."""

from __future__ import annotations

from dsg_cli.artifacts import Json

FOLLOWING = ("_low", "_high", "_stderr", "_count")
"""Endings of what follows from a metric."""


def shown_metrics(sides: Json) -> list[str]:
    """Metrics of a bench in their order: accuracy alone where there is one."""
    after = sides["unlearned"]
    if "acc" in after:
        return ["acc"]
    names = [
        name
        for name, value in after.items()
        if isinstance(value, int | float) and name != "n" and not name.endswith(FOLLOWING) and name[:6] != "gated_"
    ]
    return names or ["acc"]


def interval(side: Json, metric: str) -> str:
    """The 95 % interval of a metric, or a dash."""
    low, high = side.get(f"{metric}_low"), side.get(f"{metric}_high")
    if low is None or high is None:
        return "-"
    first, last = (f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" for value in (low, high))
    return f"{first}-{last}" if low >= 0 else f"{first} to {last}"


def number(value: float | None) -> str:
    """A number in a table: two or three decimals, more for what is tiny; a dash for none."""
    if value is None:
        return "-"
    if 0 < abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def refusals(refused: dict[str, Json]) -> list[str]:
    """A sentence for each bench on what could not be computed, and why."""
    return [
        f"{bench}: no {', '.join(metrics)}, {next(iter(metrics.values()))} (--reference)"
        for bench, metrics in refused.items()
    ]
