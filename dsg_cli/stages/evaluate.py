"""`dsg eval`: what does the model still know, and what did it cost elsewhere?

Asks every bench of the base model and of the unlearned one, through lm-eval, in the paper's way or as free text; writes
eval-NNN with one row a question, and in the folder eval-NNN/ lm-eval's own results files.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsg_cli.errors import DsgError, nearest
from dsg_cli.evals import PAPER, is_free
from dsg_cli.evals.benches import commits, load_free, load_tasks, metrics_of
from dsg_cli.evals.expect import check_expected, check_metrics, parse_expected
from dsg_cli.evals.free_text import FreeText, Reference, Results, check_room, evaluate_texts
from dsg_cli.evals.metrics import EvalResult
from dsg_cli.evals.paper_protocol import evaluate_paper, load_paper_questions, read_question_ids
from dsg_cli.inference.scoring import GuardedModel, answers_from_tensors, answers_to_tensors
from dsg_cli.job import Job
from dsg_cli.lab import data as lab
from dsg_cli.models.language_model import load_model, load_tokenizer, model_digest
from dsg_cli.settings import Recipe
from dsg_cli.stages.composition import Composition, find_composition, load_composition, newest
from dsg_cli.stages.inputs import identify, named_model
from dsg_cli.stages.stage import QUIET, RunOptions, settle, stage
from dsg_cli.workspace.artifacts import Header
from dsg_cli.workspace.body import Json
from dsg_cli.workspace.files import Content, is_file, parse_json
from dsg_cli.workspace.provenance import Clock
from dsg_cli.workspace.results import EvalReport
from dsg_cli.workspace.store import Stored, Workspace


def run(recipe: Recipe, workspace: Workspace, *, sources: Sequence[str] = (), options: RunOptions = QUIET) -> Stored:
    """Evaluate the newest guardrail, model or wrapper, or those named together, and write the report."""
    clock, settings = Clock(), recipe.eval
    expected = [parse_expected(text, settings.benches) for text in settings.expect]
    is_newest, sources = not sources, sources or [options.agreed(lambda: newest(workspace))]
    with options.workers.in_turn():
        if not settings.benches:
            raise DsgError("No bench is named.", "Give one with --bench: `dsg ls benches` lists them.")
        composition = find_composition(workspace, sources)
        if is_newest:
            options.say(composition.acting)
        workspace.check_writable()
        in_paper = [bench for bench in settings.benches if bench in PAPER]
        question_ids = read_question_ids(Path(settings.question_ids) if settings.question_ids else None, in_paper)
        others = [bench for bench in settings.benches if bench not in PAPER and not is_free(bench)]
        split, path, can_generate = settings.split, settings.include_path, composition.can_generate
        tasks = load_tasks(others, split=split, include_path=path, can_generate=can_generate) if others else []
        free, free_commits = load_free(
            settings.benches, split=split, limit=settings.limit, holdout=settings.holdout, seed=recipe.seed
        )
        check_metrics(expected, metrics_of(tasks) | {bench.name: set(bench.metrics) for bench in free})
        texts = FreeText(free, composition.bos, settings.apply_chat_template)
        needing = {bench.name for bench in free if bench.relative}
        digests = {name: digest for name, digest in texts.digests().items() if name in needing}
        reference = find_reference(recipe, workspace, digests)
        paper_questions = {bench: load_paper_questions(bench) for bench in in_paper}
        recipe = settle(recipe, composition.header)
        loaded = load_composition(workspace, composition, recipe)
        if settings.apply_chat_template and not loaded.base.tokenizer.chat_template:
            missing = f"The tokenizer of {loaded.base.source} has no chat template."
            raise DsgError(missing, "Leave --apply-chat-template out.")
        base, unlearned = (make(settings.batch_size) for make in (loaded.base_model, loaded.unlearned_model))
        check_room(texts, base, unlearned)
        if reference is not None:
            reference = load_reference(reference, recipe, base)
    paper_commits = {bench: questions[0].revision for bench, questions in paper_questions.items()}
    header_settings: Json = {
        **dataclasses.asdict(settings),
        "allow_mismatch": recipe.model.allow_mismatch,
        "model_digest": model_digest(loaded.base.model),
        "commits": commits(tasks) | paper_commits | free_commits,
        "asked": texts.digests(),
        "reference_digest": reference.digest if reference is not None else "",
        "reference_scores": dict(reference.scores) if reference is not None else {},
    }
    # Nothing vouches for the data of other benches, so they are asked again.
    with stage(
        "eval",
        recipe,
        workspace,
        options,
        clock,
        header_settings,
        inputs=composition.named,
        model=identify(loaded.base, composition.header.model.last_layer),
        sae=composition.header.sae,
        is_reusable=all(bench in lab.bench_names() for bench in settings.benches),
    ) as this:
        if this.existing:
            return this.existing
        from dsg_cli.evals.lm_harness import evaluate, results_files

        evaluations = earlier_evaluations(workspace, this.header, this.job)
        texts_known = {} if settings.samples else known_texts(workspace, texts.digests(), evaluations)
        earlier = {
            stored.id: answers_from_tensors(workspace.tensors(stored))
            for stored in evaluations
            if f"{stored.id}.safetensors" in stored.header.files
        }
        known = {key: answer for answers in earlier.values() for key, answer in answers.items()}
        parts: list[EvalResult] = []
        if tasks:
            parts.append(evaluate(base, unlearned, tasks, settings, this.job, known=known))
        if paper_questions:
            part = evaluate_paper(
                base, unlearned, paper_questions, settings, this.job, question_ids=question_ids, known=known
            )
            parts.append(part)
        if texts.benches:
            part = evaluate_texts(base, unlearned, texts, settings, this.job, reference=reference, known=texts_known)
            parts.append(part)
        results = {bench: sides for part in parts for bench, sides in part.results.items()}
        first = [bench for bench in settings.benches if bench in results]
        results = {bench: results[bench] for bench in (*first, *(name for name in results if name not in first))}
        answers = {key: answer for part in parts for key, answer in part.answers.items()}
        gate = {bench: rate for part in parts for bench, rate in part.gate.items()} if unlearned.decides else {}
        last_held = {key: evaluation for evaluation, held in earlier.items() for key in held}
        reference_used: Json = {}
        if reference is not None:
            scores = {bench: of_bench for part in parts for bench, of_bench in part.reference_scores.items()}
            reference_used = {"source": reference.source, "digest": reference.digest, "scores": scores}
        body = EvalReport(
            split=split,
            results=results,
            gate=gate,
            expected=check_expected(expected, results, gate),
            question_ids={bench: ids for part in parts for bench, ids in part.question_ids.items()},
            base_from=dict(Counter(last_held[key] for key in answers if key in last_held)),
            composition=composition.described(),
            asked={bench: digest for part in parts for bench, digest in part.asked.items()},
            reference=reference_used,
            refused={bench: metrics for part in parts for bench, metrics in part.refused.items()},
        )
        created, source = this.header.created, loaded.base.source
        files: dict[str, Content] = {}
        notes = _unchecked(composition)
        for part in parts:
            if part.lm_eval:
                files |= results_files(part.lm_eval, model=source, created=created, samples=settings.samples)
            # lm-eval leaves a task that fixes its examples at 0 as it is.
            n_shot = set(part.lm_eval.get("base", {}).get("n-shot", {}).values()) - {settings.num_fewshot}
            if settings.num_fewshot is not None and n_shot:
                notes.append(f"Some tasks fix their number of examples: {sorted(n_shot)}, not {settings.num_fewshot}.")
        stored = this.write(
            body,
            n_tokens=sum(part.n_tokens for part in parts),
            notes=notes,
            tensors=answers_to_tensors(answers),
            rows=[row for part in parts for row in part.rows],
            folder=files,
        )
    _check_effect(stored, composition, recipe)
    return stored


def _unchecked(composition: Composition) -> list[str]:
    """Guardrails of features that were picked without forget text: nothing says on which bench they should act."""
    return [
        f"Nothing says what {stored.id} should make the model forget, so that it does anything there is not checked. "
        "Add --expect 'BENCH.gate>=0.5' for the bench."
        for stored, body in zip(composition.guardrails, composition.bodies, strict=True)
        if not body.forget
    ]


def _check_effect(stored: Stored, composition: Composition, recipe: Recipe) -> None:
    body = stored.body_as(EvalReport)
    names = [name for guardrail in composition.bodies for name in guardrail.forget]
    # A filter or other weights may leave nothing for a guardrail to do.
    is_alone = not composition.weights and not composition.wrappers
    for name in names if is_alone and not recipe.guardrail.allow_ineffective else ():
        for bench in (name, f"{name}-paper"):
            gate = body.gate.get(bench)
            if gate is not None and not (gate["rate"] and gate["edit"]):
                raise DsgError(
                    f"The guardrail did nothing on {bench}, which it should make the model forget: "
                    + ("no question was gated." if not gate["rate"] else "its edits change nothing.")
                    + f" The report is {stored.id}.",
                    "Calibrate for questions of that length and form, or pass --allow-ineffective.",
                )


def earlier_evaluations(workspace: Workspace, header: Header, job: Job) -> list[Stored]:
    """Evaluations of the same base model: same weights, device, dtype, batches and versions.

    Every worker, and a run that goes on, looks at the same evaluations: what is known decides what a batch holds.
    """
    kept = job.checkpoint.entry("evaluations")
    ids: list[str] = job.workers.agreed(kept["ids"] if kept else workspace.ids("eval"))
    job.checkpoint.keep("evaluations", {"ids": ids})

    def key(header: Header) -> list[object]:
        settings = [header.settings.get(name) for name in ("model_digest", "batch_size")]
        return [*settings, header.git, header.device, header.dtype, header.packages, header.dsg_version]

    return [stored for stored in workspace.readable(ids) if key(stored.header) == key(header)]


def known_texts(workspace: Workspace, digests: Mapping[str, str], earlier: Sequence[Stored]) -> Results:
    """Bench on free text -> what the last earlier evaluation found of the same items, by the digest of the bench."""
    results: Results = {}
    for stored in earlier:
        earlier_digests = stored.body_as(EvalReport).asked
        same = [name for name, digest in digests.items() if earlier_digests.get(name) == digest]
        rows = workspace.rows(stored) if same else []
        results |= {name: [row["base"] for row in rows if row["bench"] == name] for name in same}
    return results


FORM = 'Write {"muse-news": {"auc": 0.47}} or {"tofu-forget10": {"truth_ratios": [0.8, ...]}}.'


def find_reference(recipe: Recipe, workspace: Workspace, digests: Mapping[str, str]) -> Reference | None:
    """What `eval.reference` means for benches that need one (-> digest of what is asked); no weights are loaded yet."""
    named = recipe.eval.reference
    if named is None:
        return None
    if not digests:
        raise DsgError("No bench that is run needs eval.reference.", "Leave it out, or add a bench of MUSE or TOFU.")
    if named.startswith("eval-") or named.endswith(".json"):
        return _stored_reference(named, workspace, digests)
    source = named_model(workspace, named)
    try:
        load_tokenizer(source, recipe.model)
    except DsgError as error:
        hint = "Give --reference a model, an evaluation (eval-NNN) or a .json file of scores."
        raise DsgError(f"The reference {named} cannot be read. {error.message}", hint) from error
    return Reference(source)


def load_reference(reference: Reference, recipe: Recipe, base: GuardedModel) -> Reference:
    """The reference with its model, where it is one."""
    if reference.scores:
        return reference
    loaded = load_model(reference.source, recipe.model)
    if loaded.tokenizer.get_vocab() != base.tokenizer.get_vocab():
        raise DsgError(
            f"{reference.source} and the base model read different tokens, so that their scores cannot be compared.",
            "Name a model that was trained from the same base.",
        )
    model = dataclasses.replace(base, model=loaded.model, tokenizer=loaded.tokenizer, max_length=0)
    return dataclasses.replace(reference, model=model, digest=model_digest(loaded.model))


def _stored_reference(named: str, workspace: Workspace, digests: Mapping[str, str]) -> Reference:
    if not named.endswith(".json"):
        report = workspace.find("eval", named).body_as(EvalReport)
    else:
        if not is_file(Path(named)):
            raise DsgError(f"There is no file {named} (eval.reference).")
        try:
            held = parse_json(Path(named).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DsgError(f"The reference scores in {named} cannot be read: {error}.") from error
        if not isinstance(held, dict):
            raise DsgError(f"{named} holds no scores of a reference.", FORM)
        if held.get("kind") != "eval":
            return Reference(named, scores={bench: _scores_of(named, bench, held) for bench in digests})
        report = workspace.read(named).body_as(EvalReport)
    if not report.reference:
        raise DsgError(f"{named} was made without a reference.", "Name an evaluation that asked one, or a model.")
    for bench, digest in digests.items():
        if bench in report.asked and report.asked[bench] != digest:
            raise DsgError(
                f"{named} asked other questions of {bench}: another limit, split, prompt or revision of the data.",
                "Ask the reference model itself: --reference MODEL.",
            )
    scores = {bench: _scores_of(named, bench, report.reference["scores"]) for bench in digests}
    results = {bench: sides["reference"] for bench, sides in report.results.items() if "reference" in sides}
    return Reference(report.reference["source"], report.reference["digest"], None, scores, results)


def _scores_of(where: str, bench: str, held: Mapping[str, Any]) -> Json:
    if bench not in held:
        raise DsgError(f"{where} has no scores for {bench}.", nearest(bench, map(str, held)))
    scores = held[bench]
    values = [scores.get("auc")] if isinstance(scores, dict) and "auc" in scores else []
    if not values and isinstance(scores, dict) and isinstance(scores.get("truth_ratios"), list):
        values = scores["truth_ratios"] or [None]
    name = "truth_ratios" if "tofu" in bench else "auc"
    is_fine = all(isinstance(value, int | float) and 0 < value < math.inf for value in values)
    if not values or not is_fine or name not in scores:
        raise DsgError(f"The scores for {bench} in {where} are not positive numbers called {name}.", FORM)
    return dict(scores)
