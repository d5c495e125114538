"""Answers of `dsg generate`: as they are written, on a terminal; whole, off one."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsg_cli.generation import GateTrace
    from dsg_cli.stages.generate import Answers


class Screen:
    """Where answers go: stdout as it was when this was made. One side alone stands without its name."""

    def __init__(self, side: str, *, is_silent: bool) -> None:
        self.is_alone = side != "both"
        self.is_silent = is_silent
        self.out = sys.stdout
        self.is_live = self.out.isatty() and not is_silent
        self.current = ""

    def write(self, side: str, piece: str) -> None:
        """A piece of a side's answer."""
        if not self.is_live:
            return
        if side != self.current:
            self._show("\n" if self.current else "")
            self._show("" if self.is_alone else f"{side + ':':<9}", "dim")
            self.current = side
        self._show(piece)

    def close(self, done: Answers) -> None:
        """Every side of a prompt is there."""
        if self.is_live:
            self._show("\n")
            if "guarded" in done.sides:
                guarded = done.sides["guarded"]
                for name, gate in zip(done.guardrails, guarded.gates, strict=True):
                    self._show(f"gate:    {_told(name, gate, guarded.tokens)}\n", "dim")
            self._show("\n")
        elif not self.is_silent:
            for side, one in done.sides.items():
                self.out.write((one.text if self.is_alone else f"{side}: {one.text}") + "\n")
        self.current = ""

    def _show(self, text: str, style: str | None = None) -> None:
        from dsg_cli.report.console import console

        console(self.out).print(text, end="", style=style, markup=False, highlight=False, soft_wrap=True)


def _told(name: str, gate: GateTrace, tokens: list[str]) -> str:
    if not gate.statistic:
        return f"{name} was not asked: the prompt was refused"
    peak = max(gate.statistic)
    if gate.latched_at is None:
        return f"{name} stayed shut ({gate.form} {peak:.2f}, threshold {gate.threshold:.2f})"
    at = f"token {gate.latched_at + 1} of {len(tokens)}, {tokens[gate.latched_at].strip()!r}"
    return f"{name} opened at {at} ({gate.form} {peak:.2f}, threshold {gate.threshold:.2f})"
