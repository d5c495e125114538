"""Base and unlearned model side by side, through lm-eval."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import handle_non_serializable, sanitize_model_name
from torch import Tensor

from dsg_cli.data.tokens import Request, with_bos
from dsg_cli.errors import DsgError
from dsg_cli.evals import bench_name
from dsg_cli.evals.benches import task_index
from dsg_cli.evals.metrics import EvalResult, counts, gate_rate
from dsg_cli.guardrail.guarded import guarded
from dsg_cli.inference.generation import behind_filters
from dsg_cli.inference.scoring import UNDECIDED, Answer, AnswerCache, Decision, GuardedModel, decision_of
from dsg_cli.inference.wrappers import prefix_ids, with_prefixes
from dsg_cli.job import PLAIN_JOB, Job
from dsg_cli.settings import EvalSection
from dsg_cli.workspace.body import Json


def request_texts(arguments: Sequence[Any]) -> tuple[str, ...]:
    """What tells requests of lm-eval apart: context and continuation, or the context alone of what is to be written."""
    return tuple(text for text in arguments if isinstance(text, str))


class ScoringLM(HFLM):
    """lm-eval's Hugging Face model, with log-likelihoods computed by scoring.py: true lengths reach the gate."""

    def __init__(self, model: GuardedModel, job: Job = PLAIN_JOB, cache: AnswerCache | None = None) -> None:
        super().__init__(pretrained=model.model, tokenizer=model.tokenizer, batch_size=model.batch_size)
        self.guarded = replace(model, max_length=self.max_length)
        self.job = job
        self.cache = cache or AnswerCache()
        self.decisions: dict[tuple[str, ...], Decision] = {}
        """By `request_texts`."""

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Without lm-eval's progress bar: ours reports the same work."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_options: Any
    ) -> list[tuple[float, bool]]:
        bos = self.guarded.bos
        ours = [Request(tuple(with_bos(context, bos)), tuple(continuation)) for _, context, continuation in requests]
        scores = self.guarded.loglikelihoods(ours, self.job, cache=self.cache)
        for (texts, _, _), score in zip(requests, scores, strict=True):
            if score.decision is not None:
                self.decisions[texts] = score.decision
        return [(score.loglikelihood, score.is_greedy) for score in scores]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers under the guardrails and behind the wrappers, by lm-eval's own loop: tasks bring its settings."""
        prompts = [with_bos(self.tok_encode(request.args[0]), self.guarded.bos) for request in requests]

        def write(numbers: Sequence[int]) -> list[tuple[list[int], str]]:
            with guarded(self.guarded.model, self.guarded.guardrails, allow_mismatch=True):
                texts = super(ScoringLM, self).generate_until([requests[i] for i in numbers], disable_tqdm=disable_tqdm)
            return [(self.tok_encode(text, add_special_tokens=False), text) for text in texts]

        answers = behind_filters(self.guarded, prompts, write)
        for request, prompt, (_, _, verdict) in zip(requests, prompts, answers, strict=True):
            if (decision := decision_of(len(prompt), None, verdict)) is not None:
                self.decisions[request_texts(request.args)] = decision
        return [text for _, text, _ in answers]

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Prompts, padded, with the prefixes after their BOS; too long a prompt loses its beginning, never a prefix."""
        n_prefix = len(prefix_ids(self.guarded.wrappers, self.tokenizer))
        if left_truncate_len is not None and left_truncate_len <= n_prefix:
            raise DsgError(
                f"The text in front of prompts has {n_prefix} tokens; with the answer it leaves no room for a prompt."
            )
        room = left_truncate_len - n_prefix if left_truncate_len is not None else None
        ids_BL, mask_BL = super().tok_batch_encode(strings, padding_side, room, truncation)
        if not n_prefix:
            return ids_BL, mask_BL
        rows = [
            with_prefixes(self.guarded.wrappers, ids_L[mask_L.bool()].tolist(), self.tokenizer)
            for ids_L, mask_L in zip(ids_BL, mask_BL, strict=True)
        ]
        length = max(map(len, rows))
        pad = self.tokenizer.pad_token_id or 0
        ids = [[pad] * (length - len(row)) + row for row in rows]
        mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids), torch.tensor(mask)


COUNTED = ("acc", "acc_norm", "exact_match")
"""Metrics that are shares of questions, for which an interval is given."""


def evaluate(
    base: GuardedModel,
    unlearned: GuardedModel,
    tasks: Sequence[Any],
    settings: EvalSection,
    job: Job = PLAIN_JOB,
    *,
    known: Mapping[bytes, Answer] | None = None,
) -> EvalResult:
    """Evaluate the base model, bare, and the unlearned one on lm-eval's tasks and groups (`benches.load_tasks`).

    Each of the job's workers gets the whole result, and writes all texts of generating tasks. `known` are answers of
    the base model that an earlier evaluation got.
    """
    models = {"base": base, "unlearned": unlearned}
    caches = {"base": AnswerCache(known or {}), "unlearned": AnswerCache()}
    lm_eval: dict[str, Any] = {}
    decisions: dict[tuple[str, ...], Decision] = {}
    for side, model in models.items():
        lm = ScoringLM(model, job.named(f"{side} model"), caches[side])
        lm_eval[side] = _simple_evaluate(
            model=lm,
            tasks=list(tasks),
            task_manager=task_index((), False),
            limit=settings.limit,
            num_fewshot=settings.num_fewshot,
            apply_chat_template=settings.apply_chat_template,
            log_samples=True,
        )
        decisions |= lm.decisions
    rows = _rows(lm_eval["base"], lm_eval["unlearned"], decisions, settings.samples)
    names = list(lm_eval["base"]["results"])
    gate = {}
    for name in names:
        of_group = set(_tasks_of(lm_eval["base"], name))
        if of_bench := [row for row in rows if row["bench"] in of_group]:
            gate[bench_name(name)] = gate_rate(of_bench)
    for row in rows:
        row["bench"] = bench_name(row["bench"])
    return EvalResult(
        results={bench_name(name): {side: _metrics(lm_eval[side], name) for side in lm_eval} for name in names},
        gate=gate,
        rows=rows,
        n_tokens=sum(cache.n_tokens for cache in caches.values()),
        answers=caches["base"].answers,
        n_known=caches["base"].n_known,
        lm_eval=lm_eval,
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


def _metrics(lm_eval: Any, name: str) -> Json:
    metrics: Json = {}
    for key, value in lm_eval["results"][name].items():
        metric, _, filter_name = key.partition(",")
        if filter_name and isinstance(value, int | float):
            metrics[metric if filter_name == "none" else f"{metric}_{filter_name}"] = float(value)
    metrics["n"] = n = sum(lm_eval["n-samples"][task]["effective"] for task in _tasks_of(lm_eval, name))
    for metric in (metric for metric in COUNTED if metric in metrics):
        k = metrics[metric] * n
        if n and abs(k - round(k)) < 1e-6:
            metrics |= counts(round(k), n, metric)
    return metrics


def _tasks_of(lm_eval: Any, name: str) -> list[str]:
    """The tasks of a group, however deep, or the task itself."""
    children = lm_eval.get("group_subtasks", {}).get(name) or []
    return [task for child in children for task in _tasks_of(lm_eval, child)] or [name]


def _rows(base: Any, unlearned: Any, decisions: dict[tuple[str, ...], Decision], samples: bool) -> list[Json]:
    rows = []
    for bench, of_bench in unlearned["samples"].items():
        by_id = {sample["doc_id"]: sample for sample in base["samples"][bench]}
        for sample in of_bench:
            keys = map(request_texts, sample["arguments"])
            decided = [decisions[key].row() for key in keys if key in decisions] or [UNDECIDED.row()]
            row: Json = {
                "bench": bench,
                "id": _label(sample["doc"].get("id"), str(sample["doc_id"])),
                "group": _label(sample["doc"].get("subject"), bench),
                **{name: max(decision[name] for decision in decided) for name in decided[0]},
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


def results_files(lm_eval: Mapping[str, Json], *, model: str, created: str, samples: bool) -> dict[str, bytes]:
    """Paths below an evaluation's folder and their content: lm-eval's results of each side, named as lm-eval names them
    by model and time, and its samples, which hold the prompts, only where they are wanted."""
    stamp = created.replace(":", "-").replace("+00-00", "")
    files = {}
    for side, results in lm_eval.items():
        name = model if side == "base" else f"{model}-guarded"
        folder = f"{side}/{sanitize_model_name(name)}"
        shown = {key: value for key, value in results.items() if key != "samples"}
        if not samples:  # A task's own examples are prompts too.
            shown["configs"] = {task: _without_examples(config) for task, config in shown.get("configs", {}).items()}
        shown["config"] = {**shown.get("config", {}), "model": name}  # Not where it lies on this machine.
        shown |= {"model_source": "dsg", "model_name": name, "model_name_sanitized": sanitize_model_name(name)}
        files[f"{folder}/results_{stamp}.json"] = _dumped(_plain(shown), indent=2)
        for task, of_task in results["samples"].items() if samples else ():
            lines = b"".join(_dumped(_plain(sample)) + b"\n" for sample in of_task)
            files[f"{folder}/samples_{task}_{stamp}.jsonl"] = lines
    return files


def _without_examples(config: Any) -> Any:
    fewshot = config.get("fewshot_config") if isinstance(config, Mapping) else None
    if not isinstance(fewshot, Mapping) or "samples" not in fewshot:
        return config
    return {**config, "fewshot_config": {key: value for key, value in fewshot.items() if key != "samples"}}


def _dumped(value: Any, indent: int | None = None) -> bytes:
    return json.dumps(value, indent=indent, default=handle_non_serializable, ensure_ascii=False).encode()


def _plain(value: Any) -> Any:
    """Without functions, whose only text is where they lie in memory."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items() if not callable(inner)}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
