"""`dsg inspect --serve`: one prompt after another, with what the gates saw and both answers, for the live page.

Writes no artifact: prompts and answers are text.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsg_cli.artifacts import Json
from dsg_cli.errors import DsgError
from dsg_cli.generation import Answer
from dsg_cli.lab import data as lab
from dsg_cli.recipe import Recipe
from dsg_cli.settings import GenerateSection
from dsg_cli.stages.generate import Asked
from dsg_cli.stages.trace import Tracer
from dsg_cli.workspace import Workspace
from dsg_cli.wrapper import prompt_with

MOST_NEW = 512
"""Tokens that the page may ask for."""


@dataclass(frozen=True)
class Live:
    """Both sides, loaded once, and what the page asks of them."""

    asked: Asked
    tracers: list[Tracer]
    """Of the guardrails, in their order."""

    def about(self) -> Json:
        """What the page shows before anything is asked."""
        subject, settings = self.asked.subject, self.asked.recipe.generate
        return {
            "model": Path(subject.model).name if Path(subject.model).is_absolute() else subject.model,
            "forget": subject.forget(),
            "guardrails": [
                {"id": stored.id, "gate": body.gate, "threshold": body.threshold}
                for stored, body in zip(subject.guardrails, subject.bodies, strict=True)
            ],
            "has_chat": self.asked.loaded.base.tokenizer.chat_template is not None,
            "chat": settings.chat,
            "on_trigger": settings.on_trigger,
            "max_new_tokens": min(settings.max_new_tokens, MOST_NEW),
            "examples": _examples(subject.forget()),
        }

    def ask(self, wanted: Json) -> Json:
        """Answer a prompt.

        Args:
            wanted: {prompt}, and perhaps {chat, on_trigger, max_new_tokens}.

        Returns:
            {tokens, n_prompt, guardrails: [{id, gate, threshold, score, floor, statistic, latched_at, clamped,
            features}], base, guarded}. floor: the score of a token on which no feature is active. A null among numbers
            could not be computed, and counts as the strongest signal there is.

        Raises:
            DsgError: A setting that there is not, or anything that `dsg generate` refuses.
        """
        settings = _settings(self.asked.recipe.generate, wanted)
        loaded, prompt = self.asked.loaded, wanted["prompt"]
        ids = self.asked.ids(prompt, settings)
        sides = self.asked.answers(prompt, ids, settings).sides
        asked = prompt_with(loaded.wrappers, ids, loaded.base.tokenizer, self.asked.subject.bos)
        read = sides["guarded"].ids or asked  # What a filter refuses, no gate reads.
        found: Json = {
            "tokens": [str(loaded.base.tokenizer.decode([token])) for token in read],
            "n_prompt": len(asked),
            "guardrails": [self._seen(number, prompt, read, sides["guarded"]) for number in range(len(self.tracers))],
        }
        for side, one in sides.items():
            found[side] = {"text": one.text, "n_tokens": one.n_tokens, "refused": one.refused}
        finite: Json = _without_infinities(found)
        return finite

    def _seen(self, number: int, prompt: str, ids: Sequence[int], answer: Answer) -> Json:
        """By one guardrail: activations and scores as it would see the text alone, and what its gate made of it."""
        tracer, gate = self.tracers[number], answer.gates[number]
        traced = tracer.traced(prompt, ids).trace.as_json()
        steps = traced["gate"]
        return {
            "id": tracer.inspected.made.id,
            "gate": gate.form,
            "threshold": gate.threshold,
            "score": steps["score"],
            "floor": steps["floor"],
            "statistic": gate.statistic,
            "latched_at": gate.latched_at,
            "clamped": steps["clamped"] if gate.statistic else [False] * len(ids),
            "features": traced["features"],
        }


def load(recipe: Recipe, workspace: Workspace, sources: Sequence[str] = ()) -> Live:
    """Load the newest guardrail, model or wrapper, or those named together, and the base model.

    Raises:
        DsgError: Anything that `dsg generate` refuses.
    """
    both = dataclasses.replace(recipe.generate, side="both")
    asked = Asked.load(dataclasses.replace(recipe, generate=both), workspace, sources)
    tracers = [
        Tracer.load(recipe, workspace, str(stored.path), loaded=asked.loaded.model)
        for stored in asked.subject.guardrails
    ]
    return Live(asked, tracers)


def _settings(settings: GenerateSection, wanted: Json) -> GenerateSection:
    given = {name: wanted[name] for name in ("chat", "on_trigger", "max_new_tokens") if name in wanted}
    n_new = given.get("max_new_tokens", 1)
    if type(n_new) is not int or not 1 <= n_new <= MOST_NEW:
        raise DsgError(f"New tokens are a number from 1 to {MOST_NEW}.")
    if given.get("on_trigger", "clamp") not in ("clamp", "refuse") or type(given.get("chat", False)) is not bool:
        raise DsgError("The page sent a setting that there is not.", "Load it again.")
    return dataclasses.replace(settings, **given)


def _examples(forget: Sequence[str]) -> list[Json]:
    """On the lab: a dev question about what is to be forgotten, one near it and one far from it."""
    forgotten = next((name for name in forget if name in lab.BENCHES), None)
    if forgotten is None:
        return []
    found = []
    for label, bench in (("to forget", forgotten), ("near", "lab-near"), ("far", "lab-far")):
        lines = lab.questions_path(bench).read_text(encoding="utf-8").splitlines()
        question = next(row for row in map(json.loads, lines) if row["split"] == "dev")
        found.append({"label": label, "prompt": question["context"]})
    return found


def _without_infinities(value: Any) -> Any:
    """JSON has none: null in their place."""
    if isinstance(value, dict):
        return {key: _without_infinities(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_infinities(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
