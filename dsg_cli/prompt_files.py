"""Prompts of a user: from the command line, a file or stdin."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from dsg_cli.errors import DsgError
from dsg_cli.integrity import parse_json


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
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DsgError(f"The prompts in {file or 'stdin'} cannot be read: {reason}.") from error
    lines = [line for line in text.split("\n") if line.strip()]
    if file is None or file.suffix != ".jsonl":
        return lines
    return [_prompt_of(line, f"{file}, line {number}") for number, line in enumerate(lines, start=1)]


def _prompt_of(line: str, where: str) -> str:
    try:
        prompt = parse_json(line)["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise DsgError(f'{where} is not of the form {{"prompt": ...}}.') from error
    if not isinstance(prompt, str) or any("\ud800" <= character <= "\udfff" for character in prompt):
        raise DsgError(f"{where}: the prompt is no text.")
    return prompt
