"""Files of an attacker's own: questions in other words, and frames to put around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dsg_cli.benches.tasks import Question
from dsg_cli.documents import read_file, text_of
from dsg_cli.errors import DsgError

SLOT = "{question}"
"""Where a frame holds the question."""


def read_contexts(path: str, questions: Sequence[Question], setting: str) -> list[Question]:
    """The questions with contexts from a file, in their order: one a line, or objects with a `context` in `.jsonl`.

    Args:
        path: Of the file.
        questions: Whose choices and answers stay.
        setting: That names the file, for messages.

    Raises:
        DsgError: It cannot be read, has an empty line, or more or fewer lines than there are questions.
    """
    lines = _json_lines(path) if path.endswith(".jsonl") else _text_lines(path)
    if len(lines) != len(questions):
        raise DsgError(
            f"{path} ({setting}) has {len(lines)} lines, and {len(questions)} questions are asked.",
            "Write one line for each question of the bench, in its order; --limit asks the first ones only.",
        )
    _refuse_empty(path, lines)
    return [replace(question, context=line) for question, line in zip(questions, lines, strict=True)]


def read_frames(path: str, setting: str) -> dict[str, str]:
    """Texts to put around a question, one a line, by the numbers of their lines.

    Raises:
        DsgError: It cannot be read, is empty, or a line does not hold `{question}` once.
    """
    lines = _text_lines(path)
    if not lines:
        raise DsgError(f"{path} ({setting}) is empty.", f"Write one text a line, each with {SLOT}.")
    for number, line in enumerate(lines, start=1):
        if line.count(SLOT) != 1:
            raise DsgError(f"{path}, line {number} has {SLOT} {line.count(SLOT)} times.", "Write it once a line.")
    return {f"line {number}": line for number, line in enumerate(lines, start=1)}


def _json_lines(path: str) -> list[str]:
    documents = read_file(Path(path), "context")
    return documents.take(range(documents.n))


def _text_lines(path: str) -> list[str]:
    """The lines of a text file; what ends the last one begins no other."""
    text = text_of(Path(path))
    return text.removesuffix("\n").split("\n") if text.strip() else []


def _refuse_empty(path: str, lines: Sequence[str]) -> None:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise DsgError(f"{path}, line {number} is empty.", "Write a question there.")
