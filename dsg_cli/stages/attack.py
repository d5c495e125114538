"""`dsg attack`: how easily does the knowledge come back?

Runs one attack on the guarded model, with the same attack on the unguarded model beside it; writes attack-NNN.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from dsg_cli.artifacts import AttackReport, Guardrail, Json
from dsg_cli.attacks import dilution, relearn
from dsg_cli.benches.tasks import Question, check_benches, load_questions
from dsg_cli.corpora import check_names, load_corpora
from dsg_cli.errors import DsgError, nearest
from dsg_cli.guardrail import GuardrailModule
from dsg_cli.lab import data as lab
from dsg_cli.model import LoadedModel, context_length
from dsg_cli.progress import Report, silent
from dsg_cli.recipe import Recipe
from dsg_cli.stages.chain import load_chain_model, load_guardrail_module
from dsg_cli.stages.provenance import Clock, new_header
from dsg_cli.tokens import encode
from dsg_cli.workspace import Stored, Workspace, folder_digest

THREAT_MODELS = {"relearn": relearn.THREAT_MODEL, "dilution": dilution.THREAT_MODEL}


def run(
    recipe: Recipe,
    workspace: Workspace,
    kind: str,
    *,
    source: str | None = None,
    reuse: bool = False,
    report: Report = silent,
) -> Stored:
    """Attack the newest guardrail, or the one named, and write what came back.

    Raises:
        DsgError: Anything the user can mend.
    """
    clock = Clock()
    check_kind(kind)
    stored = workspace.find("guardrail", source)
    workspace.check_writable()
    settings = recipe.attack
    body = stored.body_as(Guardrail)
    bench = settings.bench or default_bench(body)
    benches = [bench, *([settings.utility_bench] if settings.utility_bench else [])]
    check_benches(benches, recipe.eval.include_path)
    check_names(body.retain)
    _check_settings(recipe)
    loaded = load_chain_model(stored.header, recipe, cut=False)
    header = new_header(
        "attack",
        recipe,
        settings={"kind": kind, **dataclasses.asdict(settings), "bench": bench, **_asked(recipe)},
        model=stored.header.model,
        sae=stored.header.sae,
        inputs=[stored],
    )
    if reuse and (found := workspace.matching(header)) is not None:
        return found

    module = load_guardrail_module(workspace, stored).to(loaded.model.device)
    if kind == "relearn":
        curve = _relearn(loaded, module, recipe, bench, report)
    else:
        curve = _dilute(loaded, module, recipe, bench, body.retain, report)
    report_body = AttackReport(
        attack=kind,
        threat_model=THREAT_MODELS[kind],
        bench=bench,
        curve=curve,
        summary=summarise(curve),
    )
    return workspace.write(clock.close(header), report_body)


def check_kind(kind: str) -> None:
    """Refuse an unknown attack.

    Raises:
        DsgError: It is.
    """
    if kind not in THREAT_MODELS:
        raise DsgError(f"There is no attack named {kind}.", nearest(kind, THREAT_MODELS))


def default_bench(guardrail: Guardrail) -> str:
    """The bench named like the forget corpus.

    Raises:
        DsgError: There is none.
    """
    for name in guardrail.forget:
        if name in lab.bench_names():
            return name
    raise DsgError(
        f"No bench is named like the forget corpus ({', '.join(guardrail.forget)}).", "Name one with --bench."
    )


def summarise(curve: list[Json]) -> Json:
    """The worst point of the guarded curve against its beginning."""
    worst = max(curve, key=lambda point: point["guarded"]["forget_acc"])
    return {
        "forget_acc_before": curve[0]["guarded"]["forget_acc"],
        "forget_acc_worst": worst["guarded"]["forget_acc"],
        "worst_x": worst["x"],
        "unguarded_at_worst": worst["unguarded"]["forget_acc"],
    }


def _asked(recipe: Recipe) -> Json:
    """What decides which questions are asked."""
    asked = recipe.eval
    return {"split": asked.split, "limit": asked.limit, "tasks_sha256": folder_digest(asked.include_path)}


def _check_settings(recipe: Recipe) -> None:
    settings = recipe.attack
    for name, values in (("dilution_lengths", settings.dilution_lengths), ("relearn_steps", settings.relearn_steps)):
        if not values or min(values) < 0 or sorted(set(values)) != values:
            raise DsgError(f"attack.{name} is {values}; give ascending whole numbers from 0 on.")
    if settings.relearn_questions < 1 or settings.relearn_learning_rate <= 0:
        raise DsgError("attack.relearn_questions and attack.relearn_learning_rate must be positive.")


def _questions(recipe: Recipe, bench: str, split: str) -> list[Question]:
    found = load_questions(bench, split=split, include_path=recipe.eval.include_path, limit=recipe.eval.limit)
    if not found:
        raise DsgError(f"The bench {bench} has no questions.")
    return found


def _dilute(
    loaded: LoadedModel, module: GuardrailModule, recipe: Recipe, bench: str, retain: Sequence[str], report: Report
) -> list[Json]:
    """With text of the retain corpora that neither selection nor calibration has seen."""
    texts = [text for corpus in load_corpora(retain, role="retain") for text in corpus.part("fresh")]
    return dilution.dilute(
        loaded.model,
        loaded.tokenizer,
        module,
        _questions(recipe, bench, recipe.eval.split),
        encode(loaded.tokenizer, texts, prepend_bos=False),
        recipe.attack.dilution_lengths,
        batch_size=recipe.eval.batch_size,
        max_length=context_length(loaded.model.config),
        report=report,
    )


def _relearn(loaded: LoadedModel, module: GuardrailModule, recipe: Recipe, bench: str, report: Report) -> list[Json]:
    """The attacker's questions come from the other split of a lab bench, else from the bench itself."""
    settings = recipe.attack
    asked = _questions(recipe, bench, recipe.eval.split)
    is_lab = bench in lab.bench_names()
    pool = _questions(recipe, bench, "dev" if recipe.eval.split == "test" else "test") if is_lab else list(asked)
    if len(pool) <= settings.relearn_questions:
        raise DsgError(
            f"{bench} has {len(pool)} questions; an attacker who trains on {settings.relearn_questions} leaves none.",
            "Lower attack.relearn_questions.",
        )
    known = random.Random(recipe.seed).sample(pool, settings.relearn_questions)
    return relearn.relearn(
        loaded.model,
        loaded.tokenizer,
        module,
        attacker_knows=known,
        forget=[question for question in asked if question not in known],
        utility=_questions(recipe, settings.utility_bench, recipe.eval.split) if settings.utility_bench else [],
        steps=settings.relearn_steps,
        learning_rate=settings.relearn_learning_rate,
        batch_size=recipe.eval.batch_size,
        max_length=context_length(loaded.model.config),
        seed=recipe.seed,
        report=report,
    )
