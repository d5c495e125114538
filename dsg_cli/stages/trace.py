"""`dsg inspect --prompt`: what do the features, and the gate, see of a prompt?

Writes no artifact: prompts are text, which artifacts do not hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from dsg_cli.artifacts import Json
from dsg_cli.generation import prompt_ids
from dsg_cli.model import LoadedModel
from dsg_cli.recipe import Recipe
from dsg_cli.roles import Chosen
from dsg_cli.runtime.sites import HookSite
from dsg_cli.runtime.slices import SaeSlice
from dsg_cli.slicing import load_slice
from dsg_cli.stages.chain import chain_sae, load_chain_model, settle
from dsg_cli.stages.inspected import Inspected, find_inspected
from dsg_cli.tracing import Trace, trace
from dsg_cli.workspace import Workspace


@dataclass(frozen=True)
class Traced:
    """A prompt, and what was seen of it."""

    prompt: str
    inspected: str
    """Id of the guardrail or the features."""
    trace: Trace

    def as_json(self) -> Json:
        """For scripts and pages."""
        return {"prompt": self.prompt, "inspected": self.inspected, **self.trace.as_json()}


@dataclass(frozen=True)
class Tracer:
    """A guardrail or a selection beside its model, loaded once, to be shown any number of prompts."""

    inspected: Inspected
    features: list[Chosen]
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
    ) -> Tracer:
        """Everything read and checked.

        Args:
            recipe: Device and dtype.
            workspace: Where artifacts are.
            source: A guardrail or features; see `find_inspected`.
            features: Show these features of the SAE instead of those that were chosen.
            loaded: The artifact's model, whole or cut, if it has been loaded and checked already.

        Raises:
            DsgError: Nothing to inspect, no such feature, or another model or SAE than the artifact was made with.
        """
        inspected = find_inspected(workspace, source)
        chosen = inspected.some(features)
        if inspected.guard is not None and not features:
            slice_, site = inspected.guard.slice, inspected.guard.read  # All that is needed is in its own file.
        else:
            sae = chain_sae(inspected.sae, inspected.made.id)
            slice_, site = load_slice(sae, [one.index for one in chosen]), sae.site
        header = inspected.made.header
        loaded = loaded or load_chain_model(header, settle(recipe, header), cut=True)
        return cls(inspected, chosen, slice_.to(loaded.model.device), site, loaded, inspected.bos(loaded))

    def ids(self, prompt: str, *, chat: bool = False) -> list[int]:
        """Token ids of a prompt.

        Raises:
            DsgError: As for `prompt_ids`.
        """
        return prompt_ids(self.loaded, prompt, bos=self.bos, chat=chat, n_new=0)

    def traced(self, prompt: str, ids: Sequence[int]) -> Traced:
        """What is seen of a prompt.

        Raises:
            DsgError: A residual is not finite.
        """

        def encode(resid_TD: Tensor) -> Tensor:
            acts_TC: Tensor = self.slice(resid_TD).acts
            return acts_TC

        seen = trace(
            self.loaded, ids, site=self.site, encode=encode, features=self.features, guard=self.inspected.guard
        )
        return Traced(prompt, self.inspected.made.id, seen)


def run(
    recipe: Recipe,
    workspace: Workspace,
    prompts: Sequence[str],
    *,
    source: str | None = None,
    features: Sequence[int] = (),
    chat: bool = False,
) -> Iterator[Traced]:
    """Show prompts to the newest guardrail, else the newest features, or to what is named.

    Raises:
        DsgError: Anything the user can mend; every prompt is checked before the first is read.
    """
    tracer = Tracer.load(recipe, workspace, source, features=features)
    rows = [tracer.ids(prompt, chat=chat) for prompt in prompts]
    for prompt, ids in zip(prompts, rows, strict=True):
        yield tracer.traced(prompt, ids)
