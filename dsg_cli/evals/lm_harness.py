"""Base and unlearned model side by side, through lm-eval."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from dsg_cli.guardrail.guarded import check_model, guarded
from dsg_cli.guardrail.runtime.guardrail import GuardrailModule
from dsg_cli.inference.scoring import Decision, Known, Scorer, SideBySide, counts, gate_rate
from dsg_cli.inference.wrappers import Verdict, WrapperModule, judged, on_side, prefix_ids, prompt_with
from dsg_cli.job import ALONE, Report, Workers, silent
from dsg_cli.models.language_model import LoadedModel
from dsg_cli.workspace.checkpoints import Checkpoint
from dsg_cli.workspace.results import Json


def asked_key(arguments: Sequence[Any]) -> tuple[str, ...]:
    """What tells requests of lm-eval apart: context and continuation, or the context alone of what is to be written."""
    return tuple(one for one in arguments if isinstance(one, str))


class ScoringLM(HFLM):
    """lm-eval's Hugging Face model, with log-likelihoods computed by scoring.py: true lengths reach the gate."""

    def __init__(self, scorer: Scorer, *, bos: int | None) -> None:
        loaded = scorer.loaded
        super().__init__(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=scorer.batch_size)
        self.bos = bos
        self.scorer = scorer
        scorer.max_length = self.max_length
        scorer.bos = bos
        self.decisions: dict[tuple[str, ...], Decision] = {}
        """By `asked_key`."""

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Without lm-eval's progress bar: ours reports the same work."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_options: Any
    ) -> list[tuple[float, bool]]:
        asked = [
            Request(tuple(with_bos(context, self.bos)), tuple(continuation)) for _, context, continuation in requests
        ]
        scores, decisions = self.scorer(asked)
        for (texts, _, _), decided in zip(requests, decisions, strict=True):
            if decided is not None:
                self.decisions[texts] = decided
        return [(found.loglikelihood, found.is_greedy) for found in scores]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers under the guardrails and behind the wrappers.

        A prompt that a filter refuses is not shown to the model, an answer that one refuses to nobody.
        """
        wrappers = self.scorer.wrappers
        prompts = [tuple(with_bos(self.tok_encode(request.args[0]), self.bos)) for request in requests]
        verdicts = self._judged(on_side(wrappers, "input"), [Request(prompt, ()) for prompt in prompts])
        answers = [one.refusal for one in verdicts]
        asked = [i for i, refusal in enumerate(answers) if refusal is None]
        with guarded(self.scorer.loaded.model, self.scorer.guardrails, allow_mismatch=True):
            written = super().generate_until([requests[i] for i in asked], disable_tqdm=disable_tqdm) if asked else []
        whole = [
            Request(prompts[i], tuple(self.tok_encode(text, add_special_tokens=False)))
            for i, text in zip(asked, written, strict=True)
        ]
        for i, text, verdict in zip(asked, written, self._judged(on_side(wrappers, "output"), whole), strict=True):
            answers[i] = text if verdict.refusal is None else verdict.refusal
            verdicts[i] = verdict if verdict.statistic is not None else verdicts[i]
        for request, prompt, verdict in zip(requests, prompts, verdicts, strict=True):
            if verdict.statistic is not None:
                is_refused = verdict.refusal is not None
                self.decisions[asked_key(request.args)] = Decision(len(prompt), verdict.statistic, is_refused, 0.0)
        return [str(answer) for answer in answers]

    def _judged(self, filters: Sequence[WrapperModule], requests: Sequence[Request]) -> list[Verdict]:
        loaded, batch_size = self.scorer.loaded, self.scorer.batch_size
        return judged(filters, loaded.model, loaded.tokenizer, requests, batch_size=batch_size)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Prompts, padded, with the prefixes after their BOS; too long a prompt loses its beginning, never a prefix."""
        n_prefix = len(prefix_ids(self.scorer.wrappers, self.tokenizer))
        if left_truncate_len is not None and left_truncate_len <= n_prefix:
            raise DsgError(
                f"The text in front of prompts has {n_prefix} tokens; with the answer it leaves no room for a prompt."
            )
        room = left_truncate_len - n_prefix if left_truncate_len is not None else None
        ids_BL, mask_BL = super().tok_batch_encode(strings, padding_side, room, truncation)
        if not n_prefix:
            return ids_BL, mask_BL
        rows = [
            prompt_with(self.scorer.wrappers, ids_L[mask_L.bool()].tolist(), self.tokenizer, self.bos)
            for ids_L, mask_L in zip(ids_BL, mask_BL, strict=True)
        ]
        length = max(map(len, rows))
        pad = self.tokenizer.pad_token_id or 0
        ids = [[pad] * (length - len(row)) + row for row in rows]
        mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids), torch.tensor(mask)


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


def results_files(found: Mapping[str, Json], *, model: str, created: str, samples: bool) -> dict[str, bytes]:
    """Paths below an evaluation's folder and their content.

    Args:
        found: Side -> what lm-eval returned.
        model: What the model is called.
        created: ISO time, which is in lm-eval's names of files.
        samples: Also its samples, which hold the prompts.
    """
    stamp = created.replace(":", "-").replace("+00-00", "")
    files = {}
    for side, results in found.items():
        name = model if side == "base" else f"{model}-guarded"
        folder = f"{side}/{sanitize_model_name(name)}"
        shown = {key: value for key, value in results.items() if key != "samples"}
        if not samples:  # A task's own examples are prompts too.
            shown["configs"] = {task: _without_examples(config) for task, config in shown.get("configs", {}).items()}
        shown["config"] = {**shown.get("config", {}), "model": name}  # Not where it lies on this machine.
        shown |= {"model_source": "dsg", "model_name": name, "model_name_sanitized": sanitize_model_name(name)}
        files[f"{folder}/results_{stamp}.json"] = _dumped(_plain(shown), indent=2)
        for task, asked in results["samples"].items() if samples else ():
            lines = b"".join(_dumped(_plain(sample)) + b"\n" for sample in asked)
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
