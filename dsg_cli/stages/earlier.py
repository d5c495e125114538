"""What earlier evaluations of the same base model found, so that it is not asked again."""

from __future__ import annotations

from collections.abc import Iterable

from dsg_cli.artifacts import EvalReport, Header
from dsg_cli.checkpoints import Checkpoint
from dsg_cli.errors import DsgError
from dsg_cli.stages.session import Session
from dsg_cli.text_answers import Results
from dsg_cli.workspace import Workspace

Answers = dict[bytes, tuple[float, bool]]


def earlier_answers(
    workspace: Workspace, header: Header, session: Session, checkpoint: Checkpoint
) -> dict[str, Answers]:
    """Answers that the same base model gave, by evaluation: same weights, device, dtype and versions.

    Every worker, and a run that goes on, looks at the same evaluations: what is known decides what a batch holds.
    """
    from dsg_cli.scorer import answers_from_tensors

    kept = checkpoint.entry("evaluations")
    ids: list[str] = session.workers.agreed(kept["ids"] if kept else workspace.ids("eval"))
    checkpoint.keep("evaluations", {"ids": ids})
    earlier = {}
    for artifact_id in ids:
        try:
            stored = workspace.read(artifact_id)
        except DsgError:  # A damaged artifact is no reason not to ask again.
            continue
        if _answers_count(stored.header, header) and stored.path.with_suffix(".safetensors").exists():
            earlier[artifact_id] = answers_from_tensors(workspace.tensors(stored))
    return earlier


def earlier_texts(workspace: Workspace, asked: dict[str, str], header: Header, checkpoint: Checkpoint) -> Results:
    """Bench on free text -> what an earlier evaluation found of the same items of the same base model.

    Args:
        workspace: Where evaluations are.
        asked: Bench -> digest of all that is asked.
        header: Of the evaluation that is made.
        checkpoint: Says which evaluations are looked at.
    """
    found: Results = {}
    for artifact_id in (checkpoint.entry("evaluations") or {"ids": []})["ids"] if asked else ():
        try:
            stored = workspace.read(artifact_id)
            of_stored = stored.body_as(EvalReport).asked
            same = [name for name, digest in asked.items() if of_stored.get(name) == digest]
            if same and _answers_count(stored.header, header):
                rows = workspace.rows(stored)
                found |= {name: [row["base"] for row in rows if row["bench"] == name] for name in same}
        except DsgError:
            continue
    return found


def _answers_count(one: Header, other: Header) -> bool:
    def key(header: Header) -> tuple[object, ...]:
        return (
            header.settings.get("model_digest"),
            header.settings.get("batch_size"),
            header.git,
            header.device,
            header.dtype,
            header.packages,
            header.dsg_version,
        )

    return key(one) == key(other)


def taken_from_earlier(answers: Iterable[bytes], earlier: dict[str, Answers]) -> dict[str, int]:
    """How many answers came from which evaluation; of several that have one, the last."""
    counts: dict[str, int] = {}
    for key in answers:
        holder = next((artifact_id for artifact_id in reversed(earlier) if key in earlier[artifact_id]), None)
        if holder is not None:
            counts[holder] = counts.get(holder, 0) + 1
    return counts
