"""Requests one after another: the same further corpora are to be forgotten, by the same method with the same settings.

Methods that change weights go on from the weights of the request before. Guardrails and wrappers get one more each,
and all of them act together.
"""

from __future__ import annotations

from collections.abc import Sequence

from dsg_cli.artifacts import EvalReport, Json
from dsg_cli.errors import DsgError
from dsg_cli.methods.comparison import Values
from dsg_cli.methods.names import METHODS
from dsg_cli.recipe import Recipe, with_values
from dsg_cli.stages import evaluate, method
from dsg_cli.stages.attack import default_bench
from dsg_cli.stages.session import Session
from dsg_cli.workspace import Workspace


def sequence_of(
    recipe: Recipe, workspace: Workspace, name: str, values: Values, benches: Json, session: Session
) -> Json:
    """`{method, curve: [{request, artifacts, results: {bench: acc}}], error}`, on test questions of every request.

    Args:
        recipe: Of the comparison.
        workspace: Where artifacts are and go.
        name: A method.
        values: Its settings.
        benches: Of the comparison.
        session: How it is run.
    """
    chosen = with_values(recipe, values)
    requests = [*chosen.corpora.forget[:1], *recipe.compare.sequence]
    asked = [benches["forget"], *(default_bench([one]) for one in requests[1:]), *benches["near"], *benches["other"]]
    acting: list[str] = []
    curve: list[Json] = []
    error = ""
    for number, request in enumerate(requests):
        session.say(f"{name}: request {number + 1} of {len(requests)}, {request}")
        try:
            acting = _applied(chosen, workspace, name, requests, number, acting, session)
            settings: Values = {
                "eval.benches": list(dict.fromkeys(asked)),
                "eval.split": "test",
                "guardrail.allow_ineffective": True,
            }
            report = evaluate.run(with_values(recipe, settings), workspace, sources=acting, session=session)
        except DsgError as failure:
            error = failure.message
            break
        sides = report.body_as(EvalReport).results
        curve.append(
            {
                "request": request,
                "artifacts": list(acting),
                "eval": report.id,
                "results": {bench: sides[bench]["unlearned"]["acc"] for bench in dict.fromkeys(asked)},
            }
        )
    return {"method": name, "curve": curve, "error": error}


def _applied(
    recipe: Recipe,
    workspace: Workspace,
    name: str,
    requests: Sequence[str],
    number: int,
    acting: Sequence[str],
    session: Session,
) -> list[str]:
    """What acts once a request has been met."""
    if number:
        # What has been asked to be forgotten is not held fast any more.
        retain = [one for one in recipe.corpora.retain if one.partition("=")[0] not in requests[: number + 1]]
        changes: Values = {"corpora.forget": [requests[number]], "corpora.retain": retain}
        if METHODS[name].form == "model":
            changes["model.source"] = acting[-1]
        recipe = with_values(recipe, changes)
    stored = method.run(recipe, workspace, name, session=session)
    return [stored.id] if METHODS[name].form == "model" else [*acting, stored.id]
