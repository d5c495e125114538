"""`dsg run` and `dsg demo`: the whole chain from one recipe, through the same stage functions as the commands."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from dsg_cli.errors import DsgError
from dsg_cli.recipe import Recipe
from dsg_cli.stages.session import QUIET, Session
from dsg_cli.workspace import Stored, Workspace


def run(
    recipe: Recipe,
    workspace: Workspace,
    *,
    session: Session = QUIET,
    done: Callable[[Stored], Any] = lambda _: None,
) -> list[Stored]:
    """Select, calibrate, apply, evaluate and attack; each stage reads the artifact that the one before it wrote.

    Args:
        recipe: All settings; it must name corpora and benches. If it says what to teach (`methods.finetune.corpora`),
            the model is trained on that first, and all that follows is on the result.
        workspace: Where artifacts go.
        session: How it is run; one that goes on takes the artifacts that are there.
        done: Called with each artifact once it is written.

    Raises:
        DsgError: Anything the user can mend; a recipe that lacks a section, before anything runs.
    """
    if not recipe.eval.benches:
        raise DsgError("The recipe names no bench.", "Add eval.benches.")

    from dsg_cli.attacks.names import expanded
    from dsg_cli.benches.free import load_free
    from dsg_cli.benches.names import PAPER, is_free
    from dsg_cli.benches.paper import load_questions
    from dsg_cli.benches.tasks import load_tasks, metrics_of
    from dsg_cli.corpora import check_named
    from dsg_cli.expect import check_metrics, parse_expected
    from dsg_cli.sae import check_name
    from dsg_cli.stages import apply, attack, calibrate, evaluate, select, unlearn
    from dsg_cli.stages.candidates import is_picked

    kinds = expanded(recipe.attack.kinds) if recipe.attack.kinds else []
    for text in recipe.attack.expect:
        parse_expected(text, kinds)
    apply.check_strength(recipe.guardrail)
    expected = [parse_expected(text, recipe.eval.benches) for text in recipe.eval.expect]
    for name in (recipe.attack.bench, recipe.attack.utility_bench):
        attack.check_bench(name or "")
    asked_too = {name for name in (recipe.attack.bench, recipe.attack.utility_bench) if name}
    benches = [*recipe.eval.benches, *sorted(asked_too - set(recipe.eval.benches))]
    tasks = load_tasks(
        [bench for bench in benches if bench not in PAPER and not is_free(bench)],
        split=recipe.eval.split,
        include_path=recipe.eval.include_path,
        can_generate=recipe.calibrate.gate != "mean",
    )
    free, _ = load_free(
        recipe.eval.benches,
        split=recipe.eval.split,
        limit=recipe.eval.limit,
        holdout=recipe.eval.holdout,
        seed=recipe.seed,
    )
    check_metrics(expected, metrics_of(tasks) | {bench.name: set(bench.metrics) for bench in free})
    for bench in recipe.eval.benches:
        if bench in PAPER:
            load_questions(bench)
    chain: list[Stored] = []

    def keep(stored: Stored) -> str:
        chain.append(stored)
        done(stored)
        return str(stored.path)

    session = dataclasses.replace(session, reuse=session.reuse or session.resume)
    if recipe.methods.finetune.corpora:
        for role, names in (("forget", recipe.corpora.forget), ("retain", recipe.corpora.retain)):
            if names or role == "retain" or not is_picked(recipe.select):
                check_named(names, role=role)
        check_name(recipe.sae.source)  # Now, not after the training.
        keep(unlearn.run(recipe, workspace, "finetune", session=session))
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, source=chain[-1].id))
    features = keep(select.run(recipe, workspace, session=session))
    threshold = keep(calibrate.run(recipe, workspace, source=features, session=session))
    guardrail = keep(apply.run(recipe, workspace, source=threshold, session=session))
    keep(evaluate.run(recipe, workspace, sources=[guardrail], session=session))
    named = recipe.attack.kinds
    for stored in attack.run(recipe, workspace, named, sources=[guardrail], session=session) if named else ():
        keep(stored)
    return chain
