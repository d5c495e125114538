"""How strong a clamp is: a number, or a multiple of the median residual norm at the hook. No torch here."""

from __future__ import annotations

import math
import re

from dsg_cli.errors import DsgError

LARGEST_STRENGTH = 1e6
"""Beyond this a clamped residual loses its meaning, and float32 soon its range."""
HINT = "Give --strength 500, a multiple of the median residual norm such as --strength 16r, or --strength auto."


def strength_of(text: str, median_residual_norm: float) -> float | None:
    """c from `500`, or from `2r`: twice the median residual norm at the hook; None where it is no sensible size."""
    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(r?)\s*", text)
    try:
        value = float(match[1]) * (median_residual_norm if match[2] else 1.0) if match else math.nan
    except ValueError:
        return None
    return value if 0 < value < LARGEST_STRENGTH else None


def parse_strength(
    text: str,
    median_residual_norm: float,
    *,
    hint: str = HINT,
) -> float:
    """The same, where it must be one.

    Raises:
        DsgError: Neither, or not a positive finite number; `hint` says what to do.
    """
    value = strength_of(text, median_residual_norm)
    if value is None:
        raise DsgError(f"The strength {text!r} is not a positive number of sensible size.", hint)
    return value
