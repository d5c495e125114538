"""Trials of a comparison: a method with some settings, applied in a scratch workspace and asked dev questions."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsg_cli.artifacts import Json
from dsg_cli.attacks.asking import ask
from dsg_cli.benches.tasks import Question
from dsg_cli.checkpoints import Checkpoint
from dsg_cli.errors import DsgError
from dsg_cli.guardrail import GuardrailModule
from dsg_cli.methods.comparison import Values, best_of, judged, trials_of
from dsg_cli.model import LoadedModel, context_length
from dsg_cli.recipe import Recipe, values_at, with_values
from dsg_cli.stages import method
from dsg_cli.stages.session import Session
from dsg_cli.stages.subject import find_subject, load_subject
from dsg_cli.workspace import Workspace
from dsg_cli.wrapper import WrapperModule


def accuracies(
    loaded: LoadedModel,
    questions: Mapping[str, Sequence[Question]],
    recipe: Recipe,
    *,
    bos: int | None,
    guardrails: Sequence[GuardrailModule] = (),
    wrappers: Sequence[WrapperModule] = (),
) -> dict[str, float]:
    """Accuracy on the questions of each bench."""
    return {
        bench: ask(
            loaded.model,
            loaded.tokenizer,
            several,
            guardrails=guardrails,
            wrappers=wrappers,
            bos=bos,
            batch_size=recipe.eval.batch_size,
            max_length=context_length(loaded.model.config),
        )["acc"]
        for bench, several in questions.items()
    }


@dataclass(frozen=True)
class Search:
    """The same search for every method."""

    recipe: Recipe
    workspace: Workspace
    benches: Json
    questions: Mapping[str, Sequence[Question]]
    """Dev questions by bench."""
    base: Mapping[str, float]
    chance: float
    session: Session
    checkpoint: Checkpoint

    def points(self, name: str) -> list[Values]:
        """The settings that are to be tried, as a recipe has them."""
        points = trials_of(name, self.recipe.compare, self.recipe.seed)
        return [values_at(with_values(self.recipe, values), values) for values in points]

    def only(self, name: str) -> Values:
        """The settings of a method that has no others to be tried."""
        (values,) = self.points(name)
        return values

    def trials(self, name: str) -> list[Json]:
        """Every trial of a method, the best one marked; those that an interrupted run had done are not done again.

        Without dev questions there is none: nothing can be, and nothing need be, chosen.
        """
        wanted = self.points(name) if self.questions else []
        done: list[Json] = (self.checkpoint.entry(f"trials/{name}") or {"trials": []})["trials"]
        # Features that trials share are computed once: they lie in one scratch workspace until the method is done.
        with tempfile.TemporaryDirectory(prefix=".compare-", suffix=".tmp", dir=self.workspace.folder) as scratch:
            for number, values in enumerate(wanted[len(done) :], start=len(done) + 1):
                self.session.say(f"{name}: trial {number} of {len(wanted)}")
                done = [*done, self._trial(name, values, Workspace(Path(scratch)))]
                self.checkpoint.keep(f"trials/{name}", {"trials": done})
                self.checkpoint.write()
        best = best_of(done)
        return [{**trial, "is_chosen": number == best} for number, trial in enumerate(done)]

    def _trial(self, name: str, values: Values, scratch: Workspace) -> Json:
        begun = time.monotonic()
        found: Json = {"method": name, "values": values, "dev": {}, "is_chosen": False, "error": ""}
        nothing = dict.fromkeys(("forget", "forgetting", "utility", "score"))
        recipe = with_values(self.recipe, values)
        try:
            stored = method.run(recipe, scratch, name, session=dataclasses.replace(self.session, resume=False))
            subject = find_subject(scratch, [stored.id])
            loaded = load_subject(scratch, subject, recipe)
            dev = accuracies(
                loaded.model,
                self.questions,
                recipe,
                bos=subject.bos,
                guardrails=loaded.guardrails,
                wrappers=loaded.wrappers,
            )
            # A model may be large; features that further trials share are small.
            shutil.rmtree(scratch.folder / stored.id, ignore_errors=True)
            forget = self.benches["forget"]
            found |= {"dev": dev, "forget": dev[forget], **judged(forget, dev, self.base, self.chance)}
        except DsgError as error:
            found |= {**nothing, "error": error.message}
        return {**found, "seconds": round(time.monotonic() - begun, 3)}
