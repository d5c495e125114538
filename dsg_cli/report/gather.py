"""Which artifacts a report is about: those named, or the newest of each kind, with what they were made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import get_args

from dsg_cli.errors import DsgError
from dsg_cli.methods import Form
from dsg_cli.workspace.artifacts import KINDS
from dsg_cli.workspace.files import parse_json
from dsg_cli.workspace.results import Comparison, Json, StudyReport
from dsg_cli.workspace.store import Stored, Workspace

UNLEARNING = get_args(Form)
"""Kinds of what unlearns."""

WITH_ROWS = ("threshold", "inspect", "eval")
"""Kinds whose rows a report shows."""


@dataclass(frozen=True)
class Gathered:
    """What a report shows."""

    artifacts: list[Stored]
    """In the order of kinds, then of numbers."""
    rows: dict[str, list[Json]]
    """Id -> rows beside it, of kinds that have some to show."""

    def of(self, kind: str) -> list[Stored]:
        """The artifacts of one kind."""
        return [stored for stored in self.artifacts if stored.header.kind == kind]

    def chance(self, stored: Stored, bench: str) -> float | None:
        """Accuracy without any knowledge, on the questions that an evaluation asked; None where that is not known."""
        asked = [row for row in self.rows.get(stored.id, []) if row.get("bench") == bench]
        sizes = [len(row["base"]) for row in asked if isinstance(row.get("base"), list)]
        return sum(1 / n for n in sizes) / len(sizes) if sizes and len(sizes) == len(asked) and min(sizes) > 1 else None


def gather(workspace: Workspace, wanted: Sequence[str]) -> Gathered:
    """Read and verify them.

    Args:
        workspace: Where they are.
        wanted: Ids or paths; all evaluations and attacks of what unlearns come along. Without any, the newest
            comparison, inspection and study of each name, and the newest guardrail, model or wrapper. Where that was
            made in the course of the comparison, it is the row with the highest dev score instead.
    """
    named = [workspace.read(one) for one in wanted]
    along = [one for stored in named if stored.header.kind in UNLEARNING for one in _findings_on(stored)]
    chosen = [*named, *along] or list(_newest(workspace))
    if not chosen:
        raise DsgError(f"The workspace {workspace.folder} holds nothing to report.", "Try: dsg demo")
    found = {str(stored.path.resolve()): stored for stored in chosen}
    for stored in chosen:
        if stored.header.kind != "compare":
            found |= {str(one.path.resolve()): one for one in _made_from(stored)}
    order = list(KINDS)
    artifacts = sorted(found.values(), key=lambda one: (order.index(one.header.kind), _number(one.id), str(one.path)))
    if len({stored.id for stored in artifacts}) < len(artifacts):
        twice = next(one.id for i, one in enumerate(artifacts) if one.id in {other.id for other in artifacts[:i]})
        raise DsgError(f"Two artifacts are called {twice}.", "Report one workspace at a time.")
    rows = {
        stored.id: workspace.rows(stored)
        for stored in artifacts
        if stored.header.kind in WITH_ROWS and stored.path.with_suffix(".jsonl").is_file()
    }
    return Gathered(artifacts, rows)


def _newest(workspace: Workspace) -> Iterator[Stored]:
    for kind in ("compare", "inspect"):
        yield from (workspace.read(one) for one in workspace.ids(kind)[-1:])
    studies = [workspace.read(one) for one in workspace.ids("study")]
    yield from {stored.body_as(StudyReport).study: stored for stored in studies}.values()
    compared = workspace.ids("compare")[-1:]
    ids = [one for kind in UNLEARNING for one in workspace.ids(kind)]
    newest = max(ids, key=lambda one: _written(workspace, one), default=None)
    if compared and (newest is None or _written(workspace, newest)[0] <= _written(workspace, compared[0])[0]):
        yield from _best_of(workspace, workspace.read(compared[0]))
    elif newest is not None:
        stored = workspace.read(newest)
        yield from (stored, *_findings_on(stored))


def _written(workspace: Workspace, artifact_id: str) -> tuple[float, int]:
    """When it was done, by what it says itself (a copy has another time), and at one time by its number."""
    try:
        header = parse_json((workspace.folder / f"{artifact_id}.json").read_bytes())
        done = datetime.fromisoformat(header["created"]).timestamp() + float(header["seconds"])
    except (OSError, KeyError, TypeError, ValueError):  # Whoever reads it says what is wrong.
        done = 0.0
    return done, _number(artifact_id)


def _findings_on(stored: Stored) -> Iterator[Stored]:
    """Every evaluation and attack of what unlearns, in its own workspace."""
    workspace = Workspace(stored.path.parent)
    for kind in ("eval", "attack"):
        for one in workspace.ids(kind):
            found = workspace.read(one)
            if any(used.sha256 == stored.json["sha256"] for used in found.header.inputs):
                yield found


def _best_of(workspace: Workspace, stored: Stored) -> Iterator[Stored]:
    """What lies in the workspace of the row that did best by what settings were chosen by, not by test questions."""
    body = stored.body_as(Comparison)
    scores = {trial["method"]: trial["score"] for trial in body.trials if trial["is_chosen"]}
    rows = [row for row in body.rows if scores.get(row["method"]) is not None]
    if rows:
        best = max(rows, key=lambda row: scores[row["method"]])
        named = [one for one in (*best["artifacts"], best.get("eval"), best.get("attack")) if one]
        yield from (workspace.read(one) for one in named if one in workspace.ids())


def _made_from(stored: Stored) -> Iterator[Stored]:
    """What lies in the same folder and is what the artifact says."""
    for used in stored.header.inputs:
        path = stored.path.with_name(f"{used.id}.json")
        if used.is_elsewhere or not path.is_file():
            continue
        made = Workspace(path.parent).read(str(path))
        if made.json["sha256"] == used.sha256:
            yield made
            yield from _made_from(made)


def _number(artifact_id: str) -> int:
    return int(artifact_id.rsplit("-", 1)[1])
