"""`dsg eval`: what does the model still know, and what did it cost elsewhere?

Asks every bench of the base model and of the same model under the guardrail, through lm-eval; writes eval-NNN with
one row a question.
"""

from __future__ import annotations

import dataclasses

from dsg_cli.artifacts import EvalReport
from dsg_cli.benches.tasks import check_benches
from dsg_cli.errors import DsgError
from dsg_cli.expect import check_expected, parse_expected
from dsg_cli.progress import Report, silent
from dsg_cli.recipe import Recipe
from dsg_cli.stages.chain import load_chain_model, load_guardrail_module
from dsg_cli.stages.provenance import Clock, new_header
from dsg_cli.workspace import Stored, Workspace, folder_digest


def run(
    recipe: Recipe, workspace: Workspace, *, source: str | None = None, reuse: bool = False, report: Report = silent
) -> Stored:
    """Evaluate the newest guardrail, or the one named, and write the report.

    Raises:
        DsgError: Anything the user can mend. An expectation that is not met is no error here; it is in the report.
    """
    clock = Clock()
    settings = recipe.eval
    guardrail = workspace.find("guardrail", source)
    workspace.check_writable()
    expected = [parse_expected(text, settings.benches) for text in settings.expect]
    if settings.batch_size < 1 or (settings.limit is not None and settings.limit < 1):
        raise DsgError("The batch size and the limit must be at least 1.")
    check_benches(settings.benches, settings.include_path)
    loaded = load_chain_model(guardrail.header, recipe, cut=False)
    header = new_header(
        "eval",
        recipe,
        settings=dataclasses.asdict(settings) | {"tasks_sha256": folder_digest(settings.include_path)},
        model=guardrail.header.model,
        sae=guardrail.header.sae,
        inputs=[guardrail],
    )
    if reuse and (stored := workspace.matching(header)) is not None:
        return stored

    from dsg_cli.evaluation import evaluate

    found = evaluate(
        loaded,
        load_guardrail_module(workspace, guardrail),
        settings.benches,
        split=settings.split,
        include_path=settings.include_path,
        batch_size=settings.batch_size,
        limit=settings.limit,
        samples=settings.samples,
        report=report,
    )
    body = EvalReport(
        split=settings.split,
        results=found.results,
        gate=found.gate,
        expected=check_expected(expected, found.results),
    )
    return workspace.write(clock.close(header, n_tokens=found.n_tokens), body, rows=found.rows)
