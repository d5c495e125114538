"""What `dsg inspect` looks at: a guardrail or a selection, and the features that it chose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsg_cli.artifacts import Guardrail, SaeIdentity
from dsg_cli.errors import DsgError
from dsg_cli.guardrail import GuardrailModule
from dsg_cli.model import LoadedModel
from dsg_cli.roles import Chosen, chosen_by
from dsg_cli.stages.chain import check_tokens
from dsg_cli.stages.subject import find_subject, guard_modules, only_guardrails
from dsg_cli.tokens import bos_to_prepend
from dsg_cli.workspace import Stored, Workspace

KINDS = ("guardrail", "features")


@dataclass(frozen=True)
class Inspected:
    """An artifact that chose features."""

    made: Stored
    guard: GuardrailModule | None
    """None for a selection."""
    chosen: list[Chosen]

    @property
    def sae(self) -> SaeIdentity:
        """The SAE that it was made with."""
        assert self.made.header.sae is not None
        return self.made.header.sae

    def some(self, indices: Sequence[int]) -> list[Chosen]:
        """These features of the SAE, with their roles if they have any; all that were chosen if none are named.

        Raises:
            DsgError: The SAE does not have one of them.
        """
        for index in indices:
            if not 0 <= index < self.sae.n_features:
                raise DsgError(f"The SAE {self.sae.source} has {self.sae.n_features} features; there is no {index}.")
        known = {one.index: one for one in self.chosen}
        return [known.get(index, Chosen(index, [])) for index in dict.fromkeys(indices)] or self.chosen

    def bos(self, loaded: LoadedModel) -> int | None:
        """The token that every sequence begins with, after a look at the model's others.

        Raises:
            DsgError: The tokenizer has other special tokens than when a guardrail was made.
        """
        body = self.made.body
        if isinstance(body, Guardrail):
            check_tokens(loaded, body.special_ids, self.made.id)
            return body.bos
        return bos_to_prepend(loaded.tokenizer, self.sae.prepend_bos)


def features_of(made: Stored) -> Stored | None:
    """The features that an artifact was made from, where they lie beside it; itself, if it is features.

    Raises:
        DsgError: They do not verify.
    """
    if made.header.kind == "features":
        return made
    beside = Workspace(made.path.parent)
    for one in made.header.inputs:
        path = made.path.with_name(f"{one.id}.json")
        if not one.is_elsewhere and path.is_file() and (found := features_of(beside.read(str(path)))) is not None:
            return found
    return None


def find_inspected(workspace: Workspace, source: str | None) -> Inspected:
    """The newest guardrail, else the newest features, or what is named.

    Args:
        workspace: Where artifacts are.
        source: An id or path of either kind; a guardrail also as a light file, or from the hub.

    Raises:
        DsgError: There is none, it is of another kind, or it does not verify.
    """
    if source is None:
        kind = next((kind for kind in KINDS if workspace.ids(kind)), "features")
        source = workspace.find(kind).id
    if Path(source).name.startswith("features-"):
        made = workspace.find("features", source)
        return Inspected(made, None, chosen_by(made.body))  # type: ignore[arg-type]
    if Path(source).name.startswith(("threshold-", "eval-", "attack-", "study-", "compare-", "inspect-")):
        raise DsgError(f"dsg inspect takes a guardrail or features, not {source}.")
    subject = find_subject(workspace, [source])
    only_guardrails(subject, "dsg inspect")
    guard = guard_modules(workspace, subject)[0]
    return Inspected(subject.guardrails[0], guard, chosen_by(subject.bodies[0], guard.detect))
