"""`dsg generate`: what do the base model and the guarded one write, and when did the gate open?

Writes no artifact: prompts and answers are text, which artifacts do not hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dsg_cli.artifacts import Json
from dsg_cli.errors import DsgError
from dsg_cli.generation import Answer, answer, prompt_ids
from dsg_cli.guardrail import check_causal
from dsg_cli.recipe import Recipe
from dsg_cli.settings import GenerateSection
from dsg_cli.stages.chain import settle
from dsg_cli.stages.subject import LoadedSubject, Subject, find_subject, load_subject
from dsg_cli.workspace import Workspace

Write = Callable[[str, str], None]
"""Called with a side (base, guarded) and a piece of its answer."""


@dataclass(frozen=True)
class Answers:
    """What each side wrote to one prompt."""

    prompt: str
    guardrails: list[str]
    sides: dict[str, Answer]

    def as_json(self) -> Json:
        """For scripts: the gates' traces are named by their guardrails."""
        document: Json = {"prompt": self.prompt}
        for side, one in self.sides.items():
            document[side] = {"text": one.text, "n_tokens": one.n_tokens}
            if side == "guarded":
                gates = [
                    {"guardrail": name, **dataclasses.asdict(gate)}
                    for name, gate in zip(self.guardrails, one.gates, strict=True)
                ]
                document[side] |= {"refused": one.refused, "tokens": one.tokens, "gates": gates}
        return document


def run(
    recipe: Recipe,
    workspace: Workspace,
    prompts: Sequence[str],
    *,
    sources: Sequence[str] = (),
    write: Write = lambda _side, _piece: None,
) -> Iterator[Answers]:
    """Answer prompts one by one under the newest guardrail, model or wrapper, or under those named together.

    Raises:
        DsgError: Anything the user can mend; every prompt is checked before the first is answered.
    """
    if not prompts:
        raise DsgError("There is no prompt.", 'Give one, as in dsg generate "Once upon a time", or --file.')
    asked = Asked.load(recipe, workspace, sources)
    rows = [asked.ids(prompt, recipe.generate) for prompt in prompts]
    for prompt, ids in zip(prompts, rows, strict=True):
        yield asked.answers(prompt, ids, recipe.generate, write)


@dataclass(frozen=True)
class Asked:
    """Who answers: the base model, and the guarded one."""

    recipe: Recipe
    subject: Subject
    loaded: LoadedSubject

    @classmethod
    def load(cls, recipe: Recipe, workspace: Workspace, sources: Sequence[str] = ()) -> Asked:
        """Both sides, loaded once.

        Raises:
            DsgError: Nothing that unlearns, a gate that needs whole sequences, or another model.
        """
        subject = find_subject(workspace, sources)
        if recipe.generate.side != "base":
            check_causal(body.gate for body in subject.bodies)
        recipe = settle(recipe, subject.header)
        return cls(recipe, subject, load_subject(workspace, subject, recipe))

    def ids(self, prompt: str, settings: GenerateSection) -> list[int]:
        """Token ids of a prompt.

        Raises:
            DsgError: As for `prompt_ids`.
        """
        return prompt_ids(
            self.loaded.base, prompt, bos=self.subject.bos, chat=settings.chat, n_new=settings.max_new_tokens
        )

    def answers(
        self,
        prompt: str,
        ids: Sequence[int],
        settings: GenerateSection,
        write: Write = lambda _side, _piece: None,
    ) -> Answers:
        """What each side that is wanted writes to a prompt.

        Raises:
            DsgError: As for `answer`.
        """
        loaded = self.loaded
        sides: dict[str, Answer] = {}
        for side in ("base", "guarded") if settings.side == "both" else (settings.side,):
            is_guarded = side == "guarded"
            sides[side] = answer(
                loaded.model if is_guarded else loaded.base,
                ids,
                guardrails=loaded.guardrails if is_guarded else (),
                wrappers=loaded.wrappers if is_guarded else (),
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                seed=self.recipe.seed,
                refusal=settings.refusal if settings.on_trigger == "refuse" else None,
                allow_mismatch=self.recipe.model.allow_mismatch,
                write=lambda piece, side=side: write(side, piece),  # type: ignore[misc]
            )
        return Answers(prompt, [stored.id for stored in self.subject.guardrails], sides)
