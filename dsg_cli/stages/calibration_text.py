"""What calibrate asks the gate about: pieces of text that set the threshold, and others on which it is measured."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from dsg_cli.corpora import Corpus, Part
from dsg_cli.errors import DsgError
from dsg_cli.lab import data as lab
from dsg_cli.model import LoadedModel
from dsg_cli.pieces import Piece, draw_pieces
from dsg_cli.recipe import Recipe
from dsg_cli.runtime.gates import FORMS
from dsg_cli.settings import CalibrateSection
from dsg_cli.tokens import encode

MEASURED_BY = 2
"""Long pieces have up to so many times the tokens of the longest that the threshold is set on."""


def lengths_of(settings: CalibrateSection, prompts: Sequence[Sequence[int]]) -> Sequence[int]:
    """Lengths of pieces, each as likely as the others: those of the user's prompts, or a range.

    Raises:
        DsgError: No prompt, or one that is shorter than the window of the gate.
    """
    if settings.lengths_from is None:
        return range(settings.lengths[0], settings.lengths[1] + 1)
    found = [len(ids) for ids in prompts if ids]
    if not found:
        raise DsgError(f"{settings.lengths_from} holds no prompt.", "Give one a line, or leave lengths_from out.")
    if FORMS[settings.gate][1] in ("window", "running-mean") and min(found) < settings.window:
        raise DsgError(
            f"The shortest prompt in {settings.lengths_from} has {min(found)} tokens, fewer than the window of "
            f"{settings.window}.",
            "Lower calibrate.window (--set).",
        )
    return found


def piece_lengths(
    settings: CalibrateSection, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, bos: int | None
) -> Sequence[int]:
    """The same from prompts as texts, of which BOS is not counted.

    Raises:
        DsgError: As `lengths_of`.
    """
    return lengths_of(settings, [ids[int(bos is not None) :] for ids in encode(tokenizer, prompts, bos=bos)])


def dev_questions(settings: CalibrateSection, forget: Sequence[str]) -> dict[str, list[str]]:
    """Bench -> its dev questions, as texts up to the answer."""
    benches = settings.questions or [name for name in forget if name in lab.bench_names()]
    if any(bench not in lab.bench_names() for bench in benches):
        raise DsgError("calibrate.questions takes benches of the lab: others have no dev questions.")
    return {
        bench: [
            row["context"]
            for row in map(json.loads, lab.questions_path(bench).read_text(encoding="utf-8").splitlines())
            if row["split"] == "dev"
        ]
        for bench in benches
    }


def all_pieces(
    recipe: Recipe,
    loaded: LoadedModel,
    retain: Sequence[Corpus],
    forget: Sequence[Corpus],
    questions: dict[str, list[str]],
    *,
    bos: int | None,
    lengths: Sequence[int],
    room: int,
) -> dict[str, list[Piece]]:
    """Part -> pieces: `calibrate` sets the threshold, all others are only measured."""
    settings, tokenizer = recipe.calibrate, loaded.tokenizer
    longest = min(max(lengths), room)
    usual = [min(length, room) for length in lengths]

    def drawn(corpora: Sequence[Corpus], part: Part, of: Sequence[int]) -> list[Piece]:
        return draw_pieces(
            tokenizer,
            corpora,
            part,
            bos=bos,
            lengths=of,
            is_packed=settings.rows == "packed",
            at_most=settings.max_pieces,
            seed=recipe.seed,
        )

    plain = [dataclasses.replace(corpus, weight=None) for corpus in retain if not corpus.is_chat]
    more = range(longest + 1, min(MEASURED_BY * longest, room) + 1)
    return {
        "calibrate": drawn(retain, "calibrate", usual),
        "fresh": drawn(retain, "fresh", usual),
        "long": drawn(plain, "fresh", more) if more and plain else [],
        "forget": drawn(forget, "fresh", usual),
        "questions": [
            Piece(f"{bench}/dev/{i}", bench, ids)
            for bench, texts in questions.items()
            for i, ids in enumerate(encode(tokenizer, texts, bos=bos))
        ],
    }
