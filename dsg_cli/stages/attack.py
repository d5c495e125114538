"""`dsg attack`: how easily does the knowledge come back?

Runs one attack on the guarded model, with the same attack on the unguarded model beside it; writes attack-NNN.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

from dsg_cli.artifacts import AttackReport, Header, Json
from dsg_cli.attacks import dilution, relearn
from dsg_cli.benches.names import PAPER, known_benches
from dsg_cli.benches.tasks import Question, load_tasks, questions_of
from dsg_cli.checkpoints import Checkpoint
from dsg_cli.corpora import Corpus, load_corpora
from dsg_cli.errors import DsgError, nearest
from dsg_cli.guardrail import GuardrailModule
from dsg_cli.lab import data as lab
from dsg_cli.model import LoadedModel, context_length
from dsg_cli.recipe import Recipe
from dsg_cli.stages.chain import Guards, find_guards, identify, load_guards, settle
from dsg_cli.stages.provenance import Clock, new_header
from dsg_cli.stages.session import QUIET, Session
from dsg_cli.tokens import encode
from dsg_cli.workspace import Stored, Workspace

THREAT_MODELS = {"relearn": relearn.THREAT_MODEL, "dilution": dilution.THREAT_MODEL}


def run(
    recipe: Recipe,
    workspace: Workspace,
    kind: str,
    *,
    sources: Sequence[str] = (),
    session: Session = QUIET,
) -> Stored:
    """Attack the newest guardrail, or those named together, and write what came back.

    Raises:
        DsgError: Anything the user can mend.
    """
    clock = Clock()
    check_kind(kind)
    newest = session.named(workspace, "guardrail", None) if not sources else None
    with session.workers.in_turn():
        made = _prepared(recipe, workspace, kind, [newest] if newest else sources)
    # Nothing vouches for the data of other benches, so they are asked again.
    is_known = all(name in lab.bench_names() for name in made.questions)
    if is_known and (found := session.existing(workspace, made.header)) is not None:
        return found
    with session.checkpoint(workspace, made.header) as checkpoint:
        curve = _attacked(made, recipe, kind, session, checkpoint)
        body = AttackReport(
            attack=kind,
            threat_model=THREAT_MODELS[kind],
            bench=made.bench,
            curve=curve,
            summary=summarise(curve),
        )
        return session.write(workspace, lambda: workspace.write(clock.close(made.header), body))


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """All that an attack needs."""

    guards: Guards
    loaded: LoadedModel
    modules: list[GuardrailModule]
    bench: str
    questions: dict[str, list[Question]]
    retain: list[Corpus]
    header: Header


def _prepared(recipe: Recipe, workspace: Workspace, kind: str, sources: Sequence[str]) -> _Prepared:
    """Everything checked and read.

    Raises:
        DsgError: Anything the user can mend.
    """
    guards = find_guards(workspace, sources)
    workspace.check_writable()
    settings = recipe.attack
    bench = settings.bench or default_bench(guards.forget())
    benches = [bench, *([settings.utility_bench] if settings.utility_bench else [])]
    questions = {name: _questions(recipe, name, recipe.eval.split) for name in benches}
    benign = list(dict.fromkeys(name for body in guards.bodies for name in body.retain if name not in guards.forget()))
    retain = (
        load_corpora(benign, role="retain", limit=recipe.corpora.limit, seed=recipe.seed) if kind == "dilution" else []
    )
    digests = {corpus.name: corpus.sha256 for corpus in retain}
    recipe = settle(recipe, guards.header)
    loaded, modules = load_guards(workspace, guards, recipe)
    header = new_header(
        "attack",
        recipe,
        settings={
            "kind": kind,
            **dataclasses.asdict(settings),
            "bench": bench,
            "split": recipe.eval.split,
            "limit": recipe.eval.limit,
            "retain": digests,
            "allow_mismatch": recipe.model.allow_mismatch,
        },
        model=identify(loaded, guards.header.model.last_layer),
        sae=guards.header.sae,
        inputs=guards.stored,
    )
    return _Prepared(guards, loaded, modules, bench, questions, retain, header)


def _attacked(made: _Prepared, recipe: Recipe, kind: str, session: Session, checkpoint: Checkpoint) -> list[Json]:
    """The curve of one attack."""
    settings, loaded, asked = recipe.attack, made.loaded, made.questions[made.bench]
    options: dict[str, Any] = {
        "bos": made.guards.bos,
        "batch_size": recipe.eval.batch_size,
        "max_length": context_length(loaded.model.config),
        "workers": session.workers,
        "checkpoint": checkpoint,
        "report": session.report,
    }
    if kind == "relearn":
        known, others = _attacker_knows(recipe, made.bench, asked)
        return relearn.relearn(
            loaded.model,
            loaded.tokenizer,
            made.modules,
            attacker_knows=known,
            forget=others,
            utility=made.questions.get(settings.utility_bench or "", []),
            steps=settings.relearn_steps,
            learning_rate=settings.relearn_learning_rate,
            **options,
        )
    # Text that neither selection nor calibration has seen.
    texts = [text for corpus in made.retain for text in corpus.part("fresh")]
    return dilution.dilute(
        loaded.model,
        loaded.tokenizer,
        made.modules,
        asked,
        encode(loaded.tokenizer, texts, bos=None),
        settings.dilution_lengths,
        **options,
    )


def check_kind(kind: str) -> None:
    """Refuse an unknown attack.

    Raises:
        DsgError: It is.
    """
    if kind not in THREAT_MODELS:
        raise DsgError(f"There is no attack named {kind}.", nearest(kind, THREAT_MODELS))


def default_bench(forget: Sequence[str]) -> str:
    """The bench named like the forget corpus.

    Raises:
        DsgError: There is none.
    """
    for name in forget:
        if name in known_benches():
            return name
    raise DsgError(f"No bench is named like the forget corpus ({', '.join(forget)}).", "Name one with --bench.")


def summarise(curve: list[Json]) -> Json:
    """The worst point of the guarded curve against its beginning."""
    worst = max(curve, key=lambda point: point["guarded"]["forget_acc"])
    return {
        "forget_acc_before": curve[0]["guarded"]["forget_acc"],
        "forget_acc_worst": worst["guarded"]["forget_acc"],
        "worst_x": worst["x"],
        "unguarded_at_worst": worst["unguarded"]["forget_acc"],
    }


def check_bench(bench: str) -> None:
    """Refuse a bench of the paper's protocol, whose prompts attacks cannot change.

    Raises:
        DsgError: It is one.
    """
    if bench in PAPER:
        raise DsgError(f"Attacks cannot ask {bench}.", f"Take {bench.partition('-paper')[0]}.")


def _questions(recipe: Recipe, bench: str, split: str) -> list[Question]:
    check_bench(bench)
    tasks = load_tasks([bench], split=split, include_path=recipe.eval.include_path)
    found = [question for task in tasks for question in questions_of(task, limit=recipe.eval.limit)]
    if not found:
        raise DsgError(f"The bench {bench} has no questions.")
    return found


def _attacker_knows(recipe: Recipe, bench: str, asked: list[Question]) -> tuple[list[Question], list[Question]]:
    """What the attacker trains on and what is then asked: of a lab bench the two splits, else disjoint samples."""
    n_known = recipe.attack.relearn_questions
    is_lab = bench in lab.bench_names()
    pool = _questions(recipe, bench, "dev" if recipe.eval.split == "test" else "test") if is_lab else asked
    if len(pool) < n_known + (not is_lab):
        raise DsgError(
            f"{bench} has {len(pool)} questions for an attacker who trains on {n_known} and is asked others.",
            "Lower attack.relearn_questions.",
        )
    known = random.Random(recipe.seed).sample(range(len(pool)), n_known)
    others = asked if is_lab else [question for i, question in enumerate(asked) if i not in known]
    return [pool[i] for i in known], others
