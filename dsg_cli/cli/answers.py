"""Prompts into `dsg generate`, answers out of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsg_cli.cli.output import print_line
from dsg_cli.errors import DsgError

if TYPE_CHECKING:
    from dsg_cli.generation import GateTrace
    from dsg_cli.stages.generate import Answers


def read_prompts(given: Sequence[str], file: Path | None) -> list[str]:
    """Prompts from the command line, from a file, or from stdin.

    Raises:
        DsgError: There are none, the file cannot be read, or a line of a .jsonl holds no prompt.
    """
    if given and file is not None:
        raise DsgError("Prompts are given both on the command line and in a file.", "Give one of them.")
    if given:
        return list(given)
    if file is None and sys.stdin.isatty():
        raise DsgError("There is no prompt.", 'Give one, as in dsg generate "Once upon a time", or --file.')
    try:
        text = sys.stdin.read() if file is None or str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DsgError(f"The prompts in {file or 'stdin'} cannot be read: {reason}.") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if file is None or file.suffix != ".jsonl":
        return lines
    return [_prompt_of(line, f"{file}, line {number}") for number, line in enumerate(lines, start=1)]


def _prompt_of(line: str, where: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise DsgError(f'{where} is not of the form {{"prompt": ...}}.') from error
    if not isinstance(prompt, str):
        raise DsgError(f"{where}: the prompt is no text.")
    return prompt


class Screen:
    """Answers as they are written, on a terminal; whole, off one. One side alone stands without its name."""

    def __init__(self, side: str, *, is_silent: bool) -> None:
        self.is_alone = side != "both"
        self.is_silent = is_silent
        self.is_live = sys.stdout.isatty() and not is_silent
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
                    self._show(f"gate:    {_told(name, gate, guarded.tokens)}\n\n", "dim")
        elif not self.is_silent:
            for side, one in done.sides.items():
                print_line(one.text if self.is_alone else f"{side}: {one.text}")
        self.current = ""

    def _show(self, text: str, style: str | None = None) -> None:
        from rich.console import Console

        Console().print(text, end="", style=style, markup=False, highlight=False, soft_wrap=True)


def _told(name: str, gate: GateTrace, tokens: list[str]) -> str:
    peak = max(gate.statistic)
    if gate.latched_at is None:
        return f"{name} stayed shut ({gate.form} {peak:.2f}, threshold {gate.threshold:.2f})"
    at = f"token {gate.latched_at + 1} of {len(tokens)}, {tokens[gate.latched_at].strip()!r}"
    return f"{name} opened at {at} ({gate.form} {peak:.2f}, threshold {gate.threshold:.2f})"
