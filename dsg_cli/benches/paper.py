"""The paper's protocol (METHOD 1.9): chat prompt, every order of the options, and only questions that the base knows.

A question counts if the base model answers it rightly under all 24 orders of its options, so that the base scores
100 % by construction; what is reported is how many of those the unlearned model still answers in their own order.
lm-eval asks the same questions with another prompt and no filter: the two percentages cannot be compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dsg_cli.benches.names import PAPER
from dsg_cli.errors import DsgError, nearest
from dsg_cli.hub_data import commit_read, load_rows
from dsg_cli.integrity import parse_json
from dsg_cli.scoring import Request, Score
from dsg_cli.tokens import as_chat, with_bos

LETTERS = "ABCD"
ORDERS = tuple(itertools.permutations(range(4)))
"""All orders of four options; the first is their own."""


@dataclass(frozen=True)
class PaperQuestion:
    """A question with four options."""

    id: str
    """configuration/row, such as wmdp-bio/17"""
    subject: str
    question: str
    options: tuple[str, ...]
    answer: int
    revision: str = ""
    """Commit that it was read from."""

    def prompt(self, order: Sequence[int]) -> str:
        """The question with its options in an order: position i shows option order[i]."""
        shown = "".join(f"\n{letter}. {self.options[i]}" for letter, i in zip(LETTERS, order, strict=True))
        about = f"The following are multiple choice questions (with answers) about {self.subject}.\n"
        return f"{about}{self.question}{shown}"

    def right(self, order: Sequence[int]) -> int:
        """Position of the right answer in an order."""
        return list(order).index(self.answer)


def load_questions(bench: str) -> list[PaperQuestion]:
    """All questions of a bench, from the hub.

    Raises:
        DsgError: No access or no network, or a question without four options.
    """
    questions = []
    for repo, config, subject in PAPER[bench]:
        rows = load_rows(repo, config, "test")
        commit = commit_read(rows)
        for number, row in enumerate(rows):
            if len(row["choices"]) != len(LETTERS):
                raise DsgError(f"{repo} {config}, row {number} has {len(row['choices'])} options, not four.")
            options = tuple(row["choices"])
            found = PaperQuestion(f"{config}/{number}", subject, row["question"], options, int(row["answer"]), commit)
            questions.append(found)
    return questions


def chosen_questions(
    bench: str, questions: Sequence[PaperQuestion], wanted: Mapping[str, Sequence[str]]
) -> list[PaperQuestion] | None:
    """The questions that are named for a bench; None if none is, and the filter decides.

    Raises:
        DsgError: An id that no question has.
    """
    if bench not in wanted:
        return None
    if not wanted[bench] or len(set(wanted[bench])) < len(wanted[bench]):
        raise DsgError(f"The ids for {bench} are none, or one of them stands twice.", "Check the file of ids.")
    by_id = {question.id: question for question in questions}
    unknown = [name for name in wanted[bench] if name not in by_id]
    if unknown:
        raise DsgError(
            f"{bench} has no question {unknown[0]} ({len(unknown)} ids are unknown).", "Check the file of ids."
        )
    return [by_id[name] for name in wanted[bench]]


def read_question_ids(path: Path | None, benches: Sequence[str]) -> dict[str, list[str]]:
    """Ids of questions for each bench: from an evaluation, or from a file of `{"bench": [ids]}`.

    Raises:
        DsgError: Unreadable, of another form, or without any of the benches.
    """
    if path is None:
        return {}
    if not benches:
        raise DsgError("--question-ids is for benches of the paper's protocol.", f"Name one: {', '.join(PAPER)}.")
    try:
        held = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DsgError(f"The question ids in {path} cannot be read: {error}.") from error
    held = held.get("question_ids", held) if isinstance(held, dict) else None
    if not isinstance(held, dict) or not all(isinstance(ids, list) for ids in held.values()):
        raise DsgError(
            f"{path} holds no question ids.", 'Give the JSON of an evaluation, or {"wmdp-bio-paper": [ids]}.'
        )
    if not set(held) & set(benches):
        raise DsgError(f"{path} has no ids for {', '.join(benches)}.", nearest(benches[0], map(str, held)))
    return {bench: [str(name) for name in held[bench]] for bench in benches if bench in held}


class Letters:
    """The tokens that stand for each letter: `X` and ` X`, those that are one token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, bos: int | None) -> None:
        """For a tokenizer; `bos` begins every prompt.

        Raises:
            DsgError: No single token stands for a letter.
        """
        self.tokenizer, self.bos = tokenizer, bos
        self.ids: list[list[int]] = []
        for letter in LETTERS:
            spelled = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (letter, f" {letter}")]
            unknown = tokenizer.unk_token_id
            single = list(dict.fromkeys(ids[0] for ids in spelled if len(ids) == 1 and ids[0] != unknown))
            if not single:
                raise DsgError(f"The tokenizer has no single token for the letter {letter}.", "Use lm-eval's benches.")
            self.ids.append(single)

    def requests(self, question: PaperQuestion, order: Sequence[int]) -> list[Request]:
        """One a token; all share their input, so that they cost one forward pass."""
        text = question.prompt(order)
        if self.tokenizer.chat_template:
            text = as_chat(self.tokenizer, text) + "Answer: ("
        else:
            text += "\nAnswer:"
        ids = tuple(with_bos(self.tokenizer(text, add_special_tokens=False)["input_ids"], self.bos))
        return [Request(ids, (token,)) for several in self.ids for token in several]

    def loglikelihoods(self, scores: Sequence[Score]) -> list[float]:
        """Of each letter: its likelier token counts."""
        values = iter(score.loglikelihood for score in scores)
        return [max(next(values) for _ in several) for several in self.ids]
