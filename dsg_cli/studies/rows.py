"""A study's table in long form: one row a point and measure, the same as JSON and as CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence

from dsg_cli.artifacts import Json
from dsg_cli.attacks.asking import Outcome
from dsg_cli.calibration import wilson

MEASURES = ("bench", "metric", "value", "low", "high", "n", "gate_rate", "gate_low", "gate_high", "error")
"""Columns after those of the settings. `low` and `high` are a 95 % interval: Wilson's of shares, of medians one by
order statistics, which assumes nothing of how values are distributed."""


def row_of(point: Json, metric: str, *, bench: str = "", value: float | None = None, **measured: object) -> Json:
    """One row; measures that are not given are null."""
    return {**point, **dict.fromkeys(MEASURES), "bench": bench, "metric": metric, "value": value, "error": ""} | (
        measured
    )


def failed_row(point: Json, error: str, *, metric: str = "") -> Json:
    """The row of a point, or of one of its measures, that could not be had."""
    return row_of(point, metric, error=error)


def rate_row(point: Json, metric: str, n_of: int, n: int, *, bench: str = "") -> Json:
    """A share of n."""
    low, high = wilson(n_of, n)
    return row_of(point, metric, bench=bench, value=n_of / n if n else None, low=low, high=high, n=n)


def accuracy_row(point: Json, bench: str, found: Sequence[Outcome], *, metric: str = "acc") -> Json:
    """Accuracy on questions, with the share of them that was gated."""
    made = rate_row(point, metric, sum(one.is_right for one in found), len(found), bench=bench)
    n_gated = sum(one.is_gated for one in found)
    low, high = wilson(n_gated, len(found))
    return made | {"gate_rate": n_gated / len(found) if found else None, "gate_low": low, "gate_high": high}


def accuracy_rows(point: Json, found: Mapping[str, Sequence[Outcome]]) -> list[Json]:
    """The same of every bench."""
    return [accuracy_row(point, bench, several) for bench, several in found.items()]


def median_row(point: Json, metric: str, values: Sequence[float]) -> Json:
    """The median of values, and its interval."""
    low, high = median_interval(values)
    return row_of(point, metric, value=statistics.median(values), low=low, high=high, n=len(values))


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % interval of the median: the narrowest pair of order statistics, alike from both ends, that has it.

    Of fewer than six values no pair has; it is then the smallest and the largest.
    """
    from scipy.stats import binom

    ordered, n = sorted(values), len(values)
    k = 0
    while 2 * (k + 2) <= n and 2 * binom.cdf(k + 1, n, 0.5) <= 0.05:
        k += 1
    # The median lies below the (k+1)-th smallest value with a chance of P(at most k of n lie below the median).
    return ordered[k], ordered[n - 1 - k]


def csv_text(columns: Sequence[str], rows: Sequence[Json]) -> str:
    """Rows as CSV: setting columns, then measures; numbers as they are, nothing where a row has none."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns, *MEASURES], lineterminator="\n", extrasaction="raise")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
