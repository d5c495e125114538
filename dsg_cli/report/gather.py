"""Which artifacts a report is about: those named, or the newest of each kind, with what they were made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import get_args

from dsg_cli.errors import DsgError
from dsg_cli.methods import Form
from dsg_cli.workspace.artifacts import KINDS
from dsg_cli.workspace.body import Json
from dsg_cli.workspace.results import Comparison, StudyReport
from dsg_cli.workspace.store import Stored, Workspace

UNLEARNING = get_args(Form)  # Kinds of what unlearns.
WITH_ROWS = ("threshold", "inspect", "eval")  # Kinds whose rows a report shows.


@dataclass(frozen=True)
class Gathered:
    """What a report shows."""

    artifacts: list[Stored]  # In the order of kinds, then of numbers.
    rows: dict[str, list[Json]]  # Id -> rows beside it, of kinds that have some to show.

    def of(self, kind: str) -> list[Stored]:
        return [stored for stored in self.artifacts if stored.header.kind == kind]

    def chance(self, stored: Stored, bench: str) -> float | None:
        """Accuracy without any knowledge, on the questions that an evaluation asked; None where that is not known."""
        rows = [row for row in self.rows.get(stored.id, []) if row.get("bench") == bench]
        sizes = [len(row["base"]) for row in rows if isinstance(row.get("base"), list)]
        return sum(1 / n for n in sizes) / len(sizes) if sizes and len(sizes) == len(rows) and min(sizes) > 1 else None


def gather(workspace: Workspace, names: Sequence[str]) -> Gathered:
    """Read and verify artifacts by their ids or paths; all evaluations and attacks of what unlearns come along.

    Without names, the newest comparison, inspection and study of each name, and the newest guardrail, model or wrapper.
    Where that was made in the course of the comparison, it is the row with the highest dev score instead.
    """
    named = [workspace.read(name) for name in names]
    judgements = [other for stored in named if stored.header.kind in UNLEARNING for other in _judgements(stored)]
    chosen = [*named, *judgements] or list(_newest(workspace))
    if not chosen:
        raise DsgError(f"The workspace {workspace.folder} holds nothing to report.", "Try: dsg demo")
    origins = [origin for stored in chosen if stored.header.kind != "compare" for origin in _origins(stored)]
    by_path = {str(stored.path.resolve()): stored for stored in (*chosen, *origins)}

    def place(stored: Stored) -> tuple[int, int, str]:
        return list(KINDS).index(stored.header.kind), int(stored.id.rsplit("-", 1)[1]), str(stored.path)

    artifacts = sorted(by_path.values(), key=place)
    for above, stored in pairwise(artifacts):
        if above.id == stored.id:
            raise DsgError(f"Two artifacts are called {stored.id}.", "Report one workspace at a time.")
    rows = {
        stored.id: workspace.rows(stored)
        for stored in artifacts
        if stored.header.kind in WITH_ROWS and stored.path.with_suffix(".jsonl").is_file()
    }
    return Gathered(artifacts, rows)


def _newest(workspace: Workspace) -> Iterator[Stored]:
    comparison, inspection = workspace.newest(["compare"]), workspace.newest(["inspect"])
    yield from (workspace.read(name) for name in (comparison, inspection) if name is not None)
    studies = [workspace.read(name) for name in sorted(workspace.ids("study"), key=workspace.done)]
    yield from {stored.body_as(StudyReport).study: stored for stored in studies}.values()
    newest = workspace.newest(UNLEARNING, finetuned=False) or workspace.newest(UNLEARNING)
    if comparison is not None and (newest is None or workspace.done(newest)[0] <= workspace.done(comparison)[0]):
        yield from _best_of(workspace, workspace.read(comparison))
    elif newest is not None:
        stored = workspace.read(newest)
        yield from (stored, *_judgements(stored))


def _judgements(stored: Stored) -> Iterator[Stored]:
    """Every evaluation and attack of what unlearns, in its own workspace."""
    workspace = Workspace(stored.path.parent)
    for judgement in (workspace.read(name) for kind in ("eval", "attack") for name in workspace.ids(kind)):
        if any(used.sha256 == stored.json["sha256"] for used in judgement.header.inputs):
            yield judgement


def _best_of(workspace: Workspace, stored: Stored) -> Iterator[Stored]:
    """What lies in the workspace of the row that did best by what settings were chosen by, not by test questions."""
    body = stored.body_as(Comparison)
    scores = {trial["method"]: trial["score"] for trial in body.trials if trial["is_chosen"]}
    rows = [row for row in body.rows if scores.get(row["method"]) is not None]
    if rows:
        best = max(rows, key=lambda row: scores[row["method"]])
        names = (*best["artifacts"], best.get("eval"), best.get("attack"))
        yield from (workspace.read(name) for name in names if name in workspace.ids())


def _origins(stored: Stored) -> Iterator[Stored]:
    """What lies in the same folder and is what the artifact says that it was made from."""
    for used in stored.header.inputs:
        path = stored.path.with_name(f"{used.id}.json")
        if not used.is_elsewhere and path.is_file():
            origin = Workspace(path.parent).read(str(path))
            if origin.json["sha256"] == used.sha256:
                yield from (origin, *_origins(origin))
