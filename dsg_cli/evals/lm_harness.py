"""Base and unlearned model side by side, through lm-eval."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval import evaluator

from dsg_cli.artifacts import Json
from dsg_cli.benches.names import bench_name
from dsg_cli.benches.tasks import task_index
from dsg_cli.checkpoints import Checkpoint
from dsg_cli.guardrail import GuardrailModule, check_model
from dsg_cli.harness import ScoringLM, asked_key
from dsg_cli.model import LoadedModel
from dsg_cli.progress import Report, silent
from dsg_cli.scorer import Decision, Known, Scorer
from dsg_cli.sides import SideBySide, counts, gate_rate
from dsg_cli.workers import ALONE, Workers
from dsg_cli.wrapper import WrapperModule

COUNTED = ("acc", "acc_norm", "exact_match")
"""Metrics that are shares of questions, for which an interval is given."""


@dataclass(frozen=True)
class Asking:
    """How lm-eval asks."""

    limit: int | None = None
    """Questions a bench, at most."""
    num_fewshot: int | None = None
    """Examples in front of each question; None leaves it to the task."""
    chat: bool = False
    """Put questions in the tokenizer's chat template."""


def evaluate(
    loaded: LoadedModel,
    guardrails: Sequence[GuardrailModule],
    tasks: Sequence[Any],
    *,
    bos: int | None,
    batch_size: int = 32,
    asking: Asking | None = None,
    unlearned: LoadedModel | None = None,
    wrappers: Sequence[WrapperModule] = (),
    samples: bool = False,
    allow_mismatch: bool = False,
    known: Known | None = None,
    workers: Workers = ALONE,
    checkpoint: Checkpoint | None = None,
    report: Report = silent,
) -> SideBySide:
    """Ask every bench of the base model and of the same model under its guardrails and behind its wrappers.

    Args:
        loaded: The base model, whole.
        guardrails: What unlearned it.
        tasks: lm-eval's tasks and groups, as `benches.tasks.load_tasks` gives them.
        bos: Token that every sequence begins with.
        batch_size: Sequences in a batch; results depend on it by rounding only.
        asking: How the questions are put.
        unlearned: The model with changed weights that guardrails and wrappers are on; None if it is the base.
        wrappers: Of the unlearned model, in the order in which they act.
        samples: Keep the questions' texts in the rows.
        allow_mismatch: Also if the model is not the one that the guardrails were made for.
        known: Answers of the base model that an earlier evaluation got.
        workers: Who scores; each gets the whole result. Texts of generating tasks are written by each of them.
        checkpoint: Where scoring goes on from, and is kept.
        report: Progress.

    Raises:
        DsgError: A log-likelihood is not finite, or memory runs out on a single sequence.
    """
    asking = asking or Asking()
    for guard in () if allow_mismatch else guardrails:
        check_model((unlearned or loaded).model, guard)
    found: dict[str, Any] = {}
    scorers: dict[str, Scorer] = {}
    decisions: dict[tuple[str, ...], Decision] = {}
    for side in ("base", "unlearned"):
        guards = guardrails if side == "unlearned" else ()
        model = (unlearned or loaded) if side == "unlearned" else loaded
        scorer = Scorer(model, guards, batch_size, 0, what=f"{side} model", workers=workers, report=report)
        scorer.checkpoint = checkpoint or Checkpoint()
        scorer.known = (known or {}) if side == "base" else {}
        scorer.wrappers = wrappers if side == "unlearned" else ()
        lm = ScoringLM(scorer, bos=bos)
        found[side] = _simple_evaluate(
            model=lm,
            tasks=list(tasks),
            task_manager=task_index((), False),
            limit=asking.limit,
            num_fewshot=asking.num_fewshot,
            apply_chat_template=asking.chat,
            log_samples=True,
        )
        scorers[side] = scorer
        decisions |= lm.decisions
    rows = _rows(found["base"], found["unlearned"], decisions, samples)
    names = list(found["base"]["results"])
    rates = _gate_rates(rows, found["base"], names)
    for row in rows:
        row["bench"] = bench_name(row["bench"])
    return SideBySide(
        results={bench_name(name): {side: _metrics(found[side], name) for side in found} for name in names},
        gate={bench_name(name): rate for name, rate in rates.items()},
        rows=rows,
        n_tokens=sum(scorer.n_tokens for scorer in scorers.values()),
        answers=scorers["base"].answers,
        n_known=scorers["base"].n_known,
        found=found,
    )


def _simple_evaluate(**options: Any) -> Any:
    """lm-eval's entry point, without its look at the machine and at the working folder's repository.

    Both cost a second and print to the terminal; our header has what is needed of them.
    """
    nothing = {name: getattr(evaluator, name) for name in ("add_env_info", "get_git_commit_hash")}
    # It returns nothing to other processes than the first of a machine; ours all ask everything, in shared batches.
    local_rank = os.environ.pop("LOCAL_RANK", None)
    try:
        for name in nothing:
            setattr(evaluator, name, lambda *_arguments: None)
        return evaluator.simple_evaluate(**options)
    finally:
        if local_rank is not None:
            os.environ["LOCAL_RANK"] = local_rank
        for name, original in nothing.items():
            setattr(evaluator, name, original)


def _metrics(found: Any, name: str) -> Json:
    metrics: Json = {}
    for key, value in found["results"][name].items():
        metric, _, filter_name = key.partition(",")
        if filter_name and isinstance(value, int | float):
            metrics[metric if filter_name == "none" else f"{metric}_{filter_name}"] = float(value)
    metrics["n"] = n = sum(found["n-samples"][task]["effective"] for task in _tasks_of(found, name))
    for metric in (name for name in COUNTED if name in metrics):
        k = metrics[metric] * n
        if n and abs(k - round(k)) < 1e-6:
            metrics |= counts(round(k), n, metric)
    return metrics


def _tasks_of(found: Any, name: str) -> list[str]:
    """The tasks of a group, however deep, or the task itself."""
    children = found.get("group_subtasks", {}).get(name) or []
    return [task for child in children for task in _tasks_of(found, child)] or [name]


def _gate_rates(rows: list[Json], found: Any, names: list[str]) -> dict[str, Json]:
    rates = {}
    for name in names:
        tasks = set(_tasks_of(found, name))
        asked = [row for row in rows if row["bench"] in tasks]
        if asked:
            rates[name] = gate_rate(asked)
    return rates


def _rows(base: Any, unlearned: Any, decisions: dict[tuple[str, ...], Decision], samples: bool) -> list[Json]:
    rows = []
    for bench, asked in unlearned["samples"].items():
        by_id = {sample["doc_id"]: sample for sample in base["samples"][bench]}
        for sample in asked:
            decided = [decisions[key] for key in map(asked_key, sample["arguments"]) if key in decisions]
            row: Json = {
                "bench": bench,
                "id": _label(sample["doc"].get("id"), str(sample["doc_id"])),
                "group": _label(sample["doc"].get("subject"), bench),
                "length": max((d.n_tokens for d in decided), default=0),
                "statistic": max((d.statistic for d in decided), default=0.0),
                "gated": any(d.gated for d in decided),
                "edit": max((d.edit for d in decided), default=0.0),
                "answer": sample["target"] if isinstance(sample["target"], int) else None,
                "base": _loglikelihoods(by_id[sample["doc_id"]]),
                "unlearned": _loglikelihoods(sample),
            }
            if samples:
                row["context"] = sample["arguments"][0][0]
                row["choices"] = [argument[1] for argument in sample["arguments"] if isinstance(argument[1], str)]
            rows.append(row)
    return rows


def _label(value: Any, otherwise: str) -> str:
    """A name in a task's document, unless it may be text: rows hold none."""
    named = str(value) if isinstance(value, str | int) else ""
    return named if named and len(named) <= 100 and not re.search(r"\s", named) else otherwise


def _loglikelihoods(sample: Any) -> list[float]:
    return [float(response[0][0]) for response in sample["resps"] if isinstance(response[0], tuple | list)]
