"""`dsg eval`: what does the model still know, and what did it cost elsewhere?

Asks every bench of the base model and of the same model under the guardrail, through lm-eval; writes eval-NNN with
one row a question.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dsg_cli.artifacts import EvalReport
from dsg_cli.benches.tasks import load_tasks
from dsg_cli.expect import check_expected, parse_expected
from dsg_cli.lab import data as lab
from dsg_cli.progress import Report, silent
from dsg_cli.recipe import Recipe
from dsg_cli.stages.chain import find_guards, identify, load_guards, settle
from dsg_cli.stages.provenance import Clock, new_header
from dsg_cli.workspace import Stored, Workspace


def run(
    recipe: Recipe, workspace: Workspace, *, sources: Sequence[str] = (), reuse: bool = False, report: Report = silent
) -> Stored:
    """Evaluate the newest guardrail, or those named together, and write the report.

    Raises:
        DsgError: Anything the user can mend. An expectation that is not met is no error here; it is in the report.
    """
    clock = Clock()
    settings = recipe.eval
    guards = find_guards(workspace, sources)
    workspace.check_writable()
    expected = [parse_expected(text, settings.benches) for text in settings.expect]
    tasks = load_tasks(
        settings.benches,
        split=settings.split,
        include_path=settings.include_path,
        can_generate=guards.can_generate,
    )
    is_known = all(bench in lab.bench_names() for bench in settings.benches)
    recipe = settle(recipe, guards.header)
    loaded, modules = load_guards(workspace, guards, recipe)
    header = new_header(
        "eval",
        recipe,
        settings={**dataclasses.asdict(settings), "allow_mismatch": recipe.model.allow_mismatch},
        model=identify(loaded, guards.header.model.last_layer),
        sae=guards.header.sae,
        inputs=guards.stored,
    )
    # Nothing vouches for the data of other benches, so they are asked again.
    if reuse and is_known and (stored := workspace.matching(header)) is not None:
        return stored

    from dsg_cli.evaluation import evaluate

    found = evaluate(
        loaded,
        modules,
        tasks,
        bos=guards.bos,
        batch_size=settings.batch_size,
        limit=settings.limit,
        samples=settings.samples,
        allow_mismatch=recipe.model.allow_mismatch,
        report=report,
    )
    body = EvalReport(
        split=settings.split,
        results=found.results,
        gate=found.gate,
        expected=check_expected(expected, found.results),
    )
    return workspace.write(clock.close(header, n_tokens=found.n_tokens), body, rows=found.rows)
