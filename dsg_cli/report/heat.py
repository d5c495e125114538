"""Tokens coloured by a number, with the one that matters marked in plain text too."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from dsg_cli.report.plain import visible

STEPS = ("", "black on grey82", "black on khaki1", "black on orange1", "bold white on red3")
"""From nothing on; each with enough contrast on dark and on light."""
OPEN, CLOSE = "«", "»"


def heat(tokens: Sequence[str], values: Sequence[float], *, largest: float, marked: int | None = None) -> Text:
    """A line of text.

    Args:
        tokens: Its tokens.
        values: A number each; magnitudes are shown, in four steps.
        largest: The number that is as strong as can be.
        marked: The token to stand between « and ».
    """
    line = Text()
    for i, (token, value) in enumerate(zip(tokens, values, strict=True)):
        style = STEPS[step_of(value, largest)]
        shown = visible(token)
        if i == marked:
            lead = shown[: len(shown) - len(shown.lstrip())]
            line.append(lead)
            line.append(OPEN + shown[len(lead) :] + CLOSE, style=style)
        else:
            line.append(shown, style=style)
    return line


def step_of(value: float, largest: float) -> int:
    """0 for nothing, else 1 to 4."""
    share = abs(value) / largest if largest > 0 else 0.0
    return 0 if share <= 0 else min(4, 1 + int(share * 4))
