"""Base and unlearned model side by side, through lm-eval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM

from dsg_cli.artifacts import Json
from dsg_cli.benches.tasks import task_index
from dsg_cli.guardrail import GuardrailModule, guarded, last_decisions
from dsg_cli.model import LoadedModel
from dsg_cli.progress import Report, silent
from dsg_cli.scoring import Request, score
from dsg_cli.tokens import TokenBatch, special_ids, with_bos


@dataclass(frozen=True)
class Decision:
    """What the gate made of one input."""

    n_tokens: int
    statistic: float
    gated: bool


@dataclass(frozen=True)
class SideBySide:
    """An evaluation of two models on the same questions."""

    results: dict[str, Json]
    """bench -> side -> metrics"""
    gate: dict[str, Json]
    rows: list[Json]
    """One a question."""
    n_tokens: int


class ScoringLM(HFLM):
    """lm-eval's Hugging Face model, with log-likelihoods computed by scoring.py: true lengths reach the gate."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        bos: int | None,
        batch_size: int,
        guardrails: Sequence[GuardrailModule],
        what: str,
        report: Report,
    ) -> None:
        super().__init__(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size)
        self.bos = bos
        self.guardrails = guardrails
        self.what = what
        self.report = report
        self.decisions: dict[tuple[str, str], Decision] = {}
        self.n_tokens = 0

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Without lm-eval's progress bar: ours reports the same work."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_options: Any
    ) -> list[tuple[float, bool]]:
        asked = [
            Request(tuple(with_bos(context, self.bos)), tuple(continuation)) for _, context, continuation in requests
        ]
        noted: list[tuple[list[float], list[bool]]] = []

        def note(batch: TokenBatch) -> None:
            self.n_tokens += int(batch.mask_BL.sum())
            if self.guardrails:
                noted.append(last_decisions(self.guardrails))

        scores = score(
            self.model,
            asked,
            pad=self.tokenizer.pad_token_id or 0,
            special=special_ids(self.tokenizer),
            batch_size=int(self.batch_size),
            max_length=self.max_length,
            device=str(self.device),
            after_batch=note,
            what=self.what,
            report=self.report,
        )
        if noted:
            for (texts, _, _), request, found in zip(requests, asked, scores, strict=True):
                statistics, gates = noted[found.batch]
                n_tokens = len(request.inputs(self.max_length))
                self.decisions[texts] = Decision(n_tokens, statistics[found.row], gates[found.row])
        return [(found.loglikelihood, found.is_greedy) for found in scores]


def evaluate(
    loaded: LoadedModel,
    guardrails: Sequence[GuardrailModule],
    tasks: Sequence[Any],
    *,
    bos: int | None,
    batch_size: int = 32,
    limit: int | None = None,
    samples: bool = False,
    allow_mismatch: bool = False,
    report: Report = silent,
) -> SideBySide:
    """Ask every bench of the base model and of the same model under its guardrails.

    Args:
        loaded: The whole model.
        guardrails: What unlearned it.
        tasks: lm-eval's tasks and groups, as `benches.tasks.load_tasks` gives them.
        bos: Token that every sequence begins with.
        batch_size: Sequences in a batch; no result depends on it.
        limit: Questions a bench, at most.
        samples: Keep the questions' texts in the rows.
        allow_mismatch: Also if the model is not the one that the guardrails were made for.
        report: Progress.
    """
    found: dict[str, Any] = {}
    n_tokens = 0
    decisions: dict[tuple[str, str], Decision] = {}
    for side in ("base", "unlearned"):
        guards = guardrails if side == "unlearned" else ()
        lm = ScoringLM(loaded, bos=bos, batch_size=batch_size, guardrails=guards, what=f"{side} model", report=report)
        with guarded(loaded.model, guards, allow_mismatch=allow_mismatch):
            found[side] = _simple_evaluate(
                model=lm, tasks=list(tasks), task_manager=task_index(None, False), limit=limit, log_samples=True
            )
        n_tokens += lm.n_tokens
        decisions |= lm.decisions
    rows = _rows(found["base"], found["unlearned"], decisions, samples)
    names = list(found["base"]["results"])
    results = {name: {side: _metrics(found[side], name) for side in found} for name in names}
    return SideBySide(results=results, gate=_gate_rates(rows, found["base"], names), rows=rows, n_tokens=n_tokens)


def _simple_evaluate(**options: Any) -> Any:
    """lm-eval's entry point, without its look at the machine and at the working folder's repository.

    Both cost a second and print to the terminal; our header has what is needed of them.
    """
    nothing = {name: getattr(evaluator, name) for name in ("add_env_info", "get_git_commit_hash")}
    try:
        for name in nothing:
            setattr(evaluator, name, lambda *_arguments: None)
        return evaluator.simple_evaluate(**options)
    finally:
        for name, original in nothing.items():
            setattr(evaluator, name, original)


def _metrics(found: Any, name: str) -> Json:
    metrics: Json = {}
    for key, value in found["results"][name].items():
        metric, _, filter_name = key.partition(",")
        if filter_name and isinstance(value, int | float):
            metrics[metric if filter_name == "none" else f"{metric}_{filter_name}"] = float(value)
    metrics["n"] = sum(found["n-samples"][task]["effective"] for task in _tasks_of(found, name))
    return metrics


def _tasks_of(found: Any, name: str) -> list[str]:
    """The tasks of a group, however deep, or the task itself."""
    children = found.get("group_subtasks", {}).get(name) or []
    return [task for child in children for task in _tasks_of(found, child)] or [name]


def _gate_rates(rows: list[Json], found: Any, names: list[str]) -> dict[str, Json]:
    rates = {}
    for name in names:
        tasks = set(_tasks_of(found, name))
        gated = [row["gated"] for row in rows if row["bench"] in tasks]
        if gated:
            rates[name] = {"rate": sum(gated) / len(gated), "n": len(gated)}
    return rates


def _rows(base: Any, unlearned: Any, decisions: dict[tuple[str, str], Decision], samples: bool) -> list[Json]:
    rows = []
    for bench, asked in unlearned["samples"].items():
        by_id = {sample["doc_id"]: sample for sample in base["samples"][bench]}
        for sample in asked:
            decided = [decisions[key] for key in map(tuple, sample["arguments"]) if key in decisions]
            row: Json = {
                "bench": bench,
                "id": str(sample["doc"].get("id", sample["doc_id"])),
                "group": str(sample["doc"].get("subject", bench)),
                "length": max((d.n_tokens for d in decided), default=0),
                "statistic": max((d.statistic for d in decided), default=0.0),
                "gated": any(d.gated for d in decided),
                "answer": sample["target"] if isinstance(sample["target"], int) else None,
                "base": _loglikelihoods(by_id[sample["doc_id"]]),
                "unlearned": _loglikelihoods(sample),
            }
            if samples:
                row["context"] = sample["arguments"][0][0]
                row["choices"] = [argument[1] for argument in sample["arguments"]]
            rows.append(row)
    return rows


def _loglikelihoods(sample: Any) -> list[float]:
    return [float(response[0][0]) for response in sample["resps"] if isinstance(response[0], tuple | list)]
