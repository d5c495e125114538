"""What a model card says of guardrails: gathered from the workspace that they lie in."""

from __future__ import annotations

from pathlib import Path

from dsg_cli.artifacts import AttackReport, EvalReport
from dsg_cli.errors import DsgError
from dsg_cli.export.base_card import read_base_card
from dsg_cli.export.card_facts import CardFacts, CardGuard
from dsg_cli.export.folder import light_name
from dsg_cli.guardrail import GuardrailModule
from dsg_cli.hub import REPOSITORY
from dsg_cli.integrity import is_folder
from dsg_cli.lab import data as lab
from dsg_cli.stages.subject import Subject, lineage
from dsg_cli.workspace import Stored, Workspace

JUDGED = ("eval", "attack")


def card_facts(
    workspace: Workspace,
    subject: Subject,
    modules: list[GuardrailModule],
    *,
    name: str,
    address: str,
    is_on_hub: bool,
    is_whole_model: bool,
    instead: str | None,
    is_mismatched: bool,
) -> CardFacts:
    """All that is known of what is exported.

    Args:
        workspace: Where the guardrails lie.
        subject: They, and what they are on.
        modules: The same, in their order.
        name: Of the folder or repository.
        address: By which it is loaded.
        is_on_hub: Whether that is a repository.
        is_whole_model: Whether the model goes with them.
        instead: The model that they are put on, if it is another copy than that of the artifacts.
        is_mismatched: They may be on other weights than those that they were made for.
    """
    model = _model(subject, instead, is_mismatched)
    trained = lineage(subject) if model == subject.model else []
    base = trained[0].header.model.source if trained else model
    judged = [] if is_mismatched else _judgements(workspace, subject)
    return CardFacts(
        name=name,
        address=address,
        is_on_hub=is_on_hub,
        is_whole_model=is_whole_model,
        architecture=subject.header.model.architecture,
        model=model,
        base=base,
        base_card=read_base_card(base),
        guards=[
            _card_guard(stored, module.key, light_name(number))
            for number, (stored, module) in enumerate(zip(subject.guardrails, modules, strict=True))
        ],
        lineage=trained,
        evaluations=[stored for stored in judged if isinstance(stored.body, EvalReport)],
        attacks=[stored for stored in judged if isinstance(stored.body, AttackReport)],
        is_mismatched=is_mismatched,
    )


def _model(subject: Subject, instead: str | None, is_mismatched: bool) -> str:
    """The model's name: that of the artifacts, unless it says nothing elsewhere and another copy was named."""
    known = subject.model in lab.MODEL_DIRS or REPOSITORY.fullmatch(subject.model)
    if instead is None or (known and not is_mismatched):
        return subject.model
    return str(Path(instead).resolve()) if is_folder(Path(instead)) else instead


def _judgements(workspace: Workspace, subject: Subject) -> list[Stored]:
    """Evaluations and attacks of exactly these guardrails, on the weights that they were made for.

    One that is damaged says nothing; `dsg verify` names it.
    """
    wanted = {stored.json["sha256"] for stored in subject.named}
    found = []
    for artifact_id in [name for kind in JUDGED for name in workspace.ids(kind)]:
        try:
            stored = workspace.read(artifact_id)
        except DsgError:
            continue
        is_same = {one.sha256 for one in stored.header.inputs} == wanted
        if is_same and not stored.header.settings.get("allow_mismatch"):
            found.append(stored)
    return found


def _card_guard(guardrail: Stored, key: str, file: str) -> CardGuard:
    threshold = _made_from(guardrail, "threshold")
    return CardGuard(guardrail, key, file, threshold, _made_from(threshold or guardrail, "features"))


def _made_from(stored: Stored, kind: str) -> Stored | None:
    """The artifact of a kind that another was made from, if it lies beside it and is whole."""
    for named in stored.header.inputs:
        if named.id.startswith(f"{kind}-") and not named.is_elsewhere:
            try:
                found = Workspace(stored.path.parent).read(named.id)
            except DsgError:
                return None
            return found if found.json["sha256"] == named.sha256 else None
    return None
