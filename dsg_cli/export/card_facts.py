"""All that a model card says, before it is put into words."""

from __future__ import annotations

from dataclasses import dataclass

from dsg_cli.artifacts import AttackReport, EvalReport, FeatureSet, Guardrail, Header, Threshold
from dsg_cli.export.base_card import BaseCard
from dsg_cli.workspace import Stored


@dataclass(frozen=True)
class CardGuard:
    """One guardrail of an export."""

    stored: Stored
    key: str
    """Digest of what it does: numbers and tensors."""
    file: str
    """Its light file's name."""
    threshold: Stored | None
    features: Stored | None
    """What it was made from, if that lies beside it."""

    @property
    def header(self) -> Header:
        return self.stored.header

    @property
    def body(self) -> Guardrail:
        return self.stored.body_as(Guardrail)

    @property
    def query(self) -> str:
        """The words by which its features were picked, if they were; else nothing."""
        described = self.features.body_as(FeatureSet).described if self.features is not None else {}
        return str(described.get("query", ""))

    @property
    def calibration(self) -> Threshold | None:
        return self.threshold.body_as(Threshold) if self.threshold is not None else None


@dataclass(frozen=True)
class CardFacts:
    """What is exported, and what is known of it."""

    name: str
    """Of the folder or the repository."""
    address: str
    """By which it is loaded: the folder's name, or `org/name` on the hub."""
    is_on_hub: bool
    is_whole_model: bool
    architecture: str
    model: str
    """What the guardrails are on, by its name."""
    base: str
    """What that was made from, before any method trained it: usually the same."""
    base_card: BaseCard
    guards: list[CardGuard]
    lineage: list[Stored]
    """Trainings between the base and the model, the first one first."""
    evaluations: list[Stored]
    """Of exactly these guardrails together, on the weights that they were made for; oldest first."""
    attacks: list[Stored]
    is_mismatched: bool
    """They were put on other weights: nothing was measured there."""

    @property
    def forget(self) -> list[str]:
        """Corpora to forget, each once."""
        return list(dict.fromkeys(name for guard in self.guards for name in guard.body.forget))

    @property
    def retain(self) -> list[str]:
        """Corpora to retain, each once."""
        names = dict.fromkeys(name for guard in self.guards for name in guard.body.retain)
        return [name for name in names if name not in self.forget]

    def newest_evaluations(self) -> list[tuple[str, Stored]]:
        """Every bench and split with the newest evaluation that asked it."""
        newest: dict[tuple[str, str], Stored] = {}
        for stored in self.evaluations:
            body = stored.body_as(EvalReport)
            for bench in body.results:
                newest[bench, body.split] = stored
        return [(bench, stored) for (bench, _), stored in newest.items()]

    def newest_attacks(self) -> list[Stored]:
        """The newest report of every attack on every bench and split."""
        newest: dict[tuple[str, str, str], Stored] = {}
        for stored in self.attacks:
            body = stored.body_as(AttackReport)
            newest[body.attack, body.bench, split_of(stored)] = stored
        return list(newest.values())


def split_of(stored: Stored) -> str:
    """Which questions an evaluation or an attack asked: `test` or `dev`."""
    if isinstance(stored.body, EvalReport):
        return stored.body.split
    return str(stored.header.settings.get("split", "test"))
