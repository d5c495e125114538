"""Commands on prompts, which write no artifact: prompts and answers are text, which artifacts do not hold.

`dsg generate`: what do the base model and the unlearned one write, and when did the gate open? `dsg inspect --prompt`:
what do features and gate see of a prompt? `dsg inspect --serve`: both, on a page.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dsg_cli.errors import DsgError
from dsg_cli.guardrail.guarded import check_causal
from dsg_cli.guardrail.runtime.sites import HookSite
from dsg_cli.guardrail.runtime.slice import SaeSlice
from dsg_cli.guardrail.selection import SelectedFeature
from dsg_cli.inference.generation import TracedAnswer, answer, prompt_ids
from dsg_cli.inference.scoring import GuardedModel
from dsg_cli.inference.wrappers import with_prefixes
from dsg_cli.inspection.trace import Traced, trace
from dsg_cli.lab import data as lab
from dsg_cli.models.language_model import LoadedModel
from dsg_cli.models.sae_slice import load_slice
from dsg_cli.settings import GenerateSection, Recipe
from dsg_cli.stages.composition import Composition, LoadedComposition, find_composition, load_composition
from dsg_cli.stages.inputs import chain_sae, load_chain_model
from dsg_cli.stages.inspect import FeatureChoice, find_choice
from dsg_cli.stages.stage import settle
from dsg_cli.workspace.body import Json
from dsg_cli.workspace.store import Workspace

Write = Callable[[str, str], None]
"""Called with a side (base, guarded) and a piece of its answer."""

Say = Callable[[str], None]
"""Called with a line for people."""


@dataclass(frozen=True)
class Answers:
    """What each side wrote to one prompt."""

    prompt: str
    guardrails: list[str]
    sides: dict[str, TracedAnswer]

    def as_json(self) -> Json:
        """For scripts: the gates' traces are named by their guardrails."""
        document: Json = {"prompt": self.prompt}
        for side, written in self.sides.items():
            document[side] = {"text": written.text, "n_tokens": written.n_tokens}
            if side == "guarded":
                pairs = zip(self.guardrails, written.gates, strict=True)
                gates = [{"guardrail": name, **dataclasses.asdict(gate)} for name, gate in pairs]
                document[side] |= {"refused": written.refused, "tokens": written.tokens, "gates": gates}
        return document


def run_prompts(
    recipe: Recipe,
    workspace: Workspace,
    prompts: Sequence[str],
    *,
    sources: Sequence[str] = (),
    write: Write = lambda _side, _piece: None,
    say: Say = lambda _: None,
) -> Iterator[Answers]:
    """Answer prompts one by one under the newest guardrail, model or wrapper, or under those named together."""
    if not prompts:
        raise DsgError("There is no prompt.", 'Give one, as in dsg generate "Once upon a time", or --file.')
    models = BothModels.load(recipe, workspace, sources, say)
    rows = [models.ids(prompt, recipe.generate) for prompt in prompts]
    for prompt, ids in zip(prompts, rows, strict=True):
        yield models.answer(prompt, ids, recipe.generate, write)


@dataclass(frozen=True)
class BothModels:
    """The base model and the unlearned one, loaded once."""

    recipe: Recipe
    composition: Composition
    loaded: LoadedComposition

    @classmethod
    def load(
        cls, recipe: Recipe, workspace: Workspace, sources: Sequence[str] = (), say: Say = lambda _: None
    ) -> BothModels:
        composition = find_composition(workspace, sources, say)
        if recipe.generate.side != "base":
            check_causal(body.gate for body in composition.bodies)
        recipe = settle(recipe, composition.header)
        return cls(recipe, composition, load_composition(workspace, composition, recipe))

    def ids(self, prompt: str, settings: GenerateSection) -> list[int]:
        return prompt_ids(self.loaded.base_model(), prompt, chat=settings.chat, n_new=settings.max_new_tokens)

    def answer(
        self, prompt: str, ids: Sequence[int], settings: GenerateSection, write: Write = lambda _side, _piece: None
    ) -> Answers:
        """What each side that is asked for writes to a prompt."""
        models = {"base": self.loaded.base_model(), "guarded": self.loaded.unlearned_model()}
        sides = {}
        for side in ("base", "guarded") if settings.side == "both" else (settings.side,):
            sides[side] = answer(models[side], ids, settings, seed=self.recipe.seed, write=partial(write, side))
        return Answers(prompt, [stored.id for stored in self.composition.guardrails], sides)


@dataclass(frozen=True)
class Tracer:
    """A guardrail or a selection beside its model, loaded once, to be shown any number of prompts."""

    choice: FeatureChoice
    features: list[SelectedFeature]
    slice: SaeSlice
    """Of those features."""
    site: HookSite
    loaded: LoadedModel
    bos: int | None

    @classmethod
    def load(
        cls,
        recipe: Recipe,
        workspace: Workspace,
        source: str | None = None,
        *,
        features: Sequence[int] = (),
        loaded: LoadedModel | None = None,
        say: Say = lambda _: None,
    ) -> Tracer:
        """Everything read and checked, but for a model that has been loaded and checked already, whole or cut.

        `source` is a guardrail or features (see `find_choice`); `features` are shown instead of those that were chosen.
        """
        choice = find_choice(workspace, source, say)
        chosen = choice.pick(features)
        if choice.guardrail is not None and not features:
            slice_, site = choice.guardrail.slice, choice.guardrail.read  # All that is needed is in its own file.
        else:
            sae = chain_sae(choice.artifact)
            slice_, site = load_slice(sae, [feature.index for feature in chosen]), sae.site
        header = choice.artifact.header
        loaded = loaded or load_chain_model(header, settle(recipe, header), cut=True)
        return cls(choice, chosen, slice_.to(loaded.model.device), site, loaded, choice.bos(loaded))

    def ids(self, prompt: str, *, chat: bool = False) -> list[int]:
        model = GuardedModel(self.loaded.model, self.loaded.tokenizer, self.bos)
        return prompt_ids(model, prompt, chat=chat, n_new=0)

    def traced(self, prompt: str, ids: Sequence[int]) -> Traced:
        seen = trace(
            self.loaded,
            ids,
            site=self.site,
            encode=lambda resid_TD: self.slice(resid_TD).acts,
            features=self.features,
            guard=self.choice.guardrail,
        )
        return Traced(prompt, self.choice.artifact.id, seen)


def trace_prompts(
    recipe: Recipe,
    workspace: Workspace,
    prompts: Sequence[str],
    *,
    source: str | None = None,
    features: Sequence[int] = (),
    chat: bool = False,
    say: Say = lambda _: None,
) -> Iterator[Traced]:
    """Show prompts to the newest guardrail, else the newest features, or to what is named."""
    tracer = Tracer.load(recipe, workspace, source, features=features, say=say)
    rows = [tracer.ids(prompt, chat=chat) for prompt in prompts]
    for prompt, ids in zip(prompts, rows, strict=True):
        yield tracer.traced(prompt, ids)


MOST_NEW = 512
"""Tokens that the page may ask for."""


@dataclass(frozen=True)
class Live:
    """Both models, loaded once, and what the page asks of them."""

    models: BothModels
    tracers: list[Tracer]
    """Of the guardrails, in their order."""

    def about(self) -> Json:
        """What the page shows before anything is asked."""
        composition, settings = self.models.composition, self.models.recipe.generate
        model = Path(composition.model)
        return {
            "model": model.name if model.is_absolute() else composition.model,
            "forget": composition.forget(),
            "guardrails": [
                {"id": stored.id, "gate": body.gate, "threshold": body.threshold}
                for stored, body in zip(composition.guardrails, composition.bodies, strict=True)
            ],
            "has_chat": self.models.loaded.base.tokenizer.chat_template is not None,
            "chat": settings.chat,
            "on_trigger": settings.on_trigger,
            "max_new_tokens": min(settings.max_new_tokens, MOST_NEW),
            "examples": _examples(composition.forget()),
        }

    def ask(self, request: Json) -> Json:
        """Answer `{prompt}`, which may come with `{chat, on_trigger, max_new_tokens}`.

        The answer is {tokens, n_prompt, guardrails: [{id, gate, threshold, score, floor, statistic, latched_at,
        clamped, features}], base, guarded}. floor: the score of a token on which no feature is active. A null among
        numbers could not be computed, and counts as the strongest signal there is.
        """
        models, loaded, prompt = self.models, self.models.loaded, request["prompt"]
        settings = _settings(models.recipe.generate, request)
        ids = models.ids(prompt, settings)
        sides = models.answer(prompt, ids, settings).sides
        with_prefix = with_prefixes(loaded.wrappers, ids, loaded.base.tokenizer)
        read = sides["guarded"].ids or with_prefix  # What a filter refuses, no gate reads.
        response: Json = {
            "tokens": [str(loaded.base.tokenizer.decode([token])) for token in read],
            "n_prompt": len(with_prefix),
            "guardrails": [self._trace(number, prompt, read, sides["guarded"]) for number in range(len(self.tracers))],
        }
        for side, written in sides.items():
            response[side] = {"text": written.text, "n_tokens": written.n_tokens, "refused": written.refused}
        finite: Json = _without_infinities(response)
        return finite

    def _trace(self, number: int, prompt: str, ids: Sequence[int], answer: TracedAnswer) -> Json:
        """By one guardrail: activations and scores as it would see the text alone, and what its gate made of it."""
        tracer, gate = self.tracers[number], answer.gates[number]
        traced = tracer.traced(prompt, ids).trace.as_json()
        steps = traced["gate"]
        return {
            "id": tracer.choice.artifact.id,
            "gate": gate.form,
            "threshold": gate.threshold,
            "score": steps["score"],
            "floor": steps["floor"],
            "statistic": gate.statistic,
            "latched_at": gate.latched_at,
            "clamped": steps["clamped"] if gate.statistic else [False] * len(ids),
            "features": traced["features"],
        }


def load(recipe: Recipe, workspace: Workspace, sources: Sequence[str] = (), say: Say = lambda _: None) -> Live:
    """Load the newest guardrail, model or wrapper, or those named together, and the base model."""
    generate = dataclasses.replace(recipe.generate, side="both")
    models = BothModels.load(dataclasses.replace(recipe, generate=generate), workspace, sources, say)
    tracers = [
        Tracer.load(recipe, workspace, str(stored.path), loaded=models.loaded.model)
        for stored in models.composition.guardrails
    ]
    return Live(models, tracers)


def _settings(settings: GenerateSection, request: Json) -> GenerateSection:
    changes = {name: request[name] for name in ("chat", "on_trigger", "max_new_tokens") if name in request}
    n_new = changes.get("max_new_tokens", 1)
    if type(n_new) is not int or not 1 <= n_new <= MOST_NEW:
        raise DsgError(f"New tokens are a number from 1 to {MOST_NEW}.")
    if changes.get("on_trigger", "clamp") not in ("clamp", "refuse") or type(changes.get("chat", False)) is not bool:
        raise DsgError("The page sent a setting that there is not.", "Load it again.")
    return dataclasses.replace(settings, **changes)


def _examples(forget: Sequence[str]) -> list[Json]:
    """On the lab: a dev question about what is to be forgotten, one near it and one far from it."""
    forgotten = next((name for name in forget if name in lab.BENCHES), None)
    if forgotten is None:
        return []
    examples = []
    for label, bench in (("to forget", forgotten), ("near", "lab-near"), ("far", "lab-far")):
        examples.append({"label": label, "prompt": lab.read_questions(bench, "dev")[0]["context"]})
    return examples


def _without_infinities(value: Any) -> Any:
    """JSON has none: null in their place."""
    if isinstance(value, dict):
        return {key: _without_infinities(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_infinities(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
