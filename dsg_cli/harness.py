"""A model as lm-eval knows one: what it asks goes through scorer.py, what it has written through wrappers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from dsg_cli.errors import DsgError
from dsg_cli.guardrail import guarded
from dsg_cli.scorer import Decision, Scorer
from dsg_cli.scoring import Request
from dsg_cli.tokens import with_bos
from dsg_cli.wrapper import Verdict, WrapperModule, judged, on_side, prefix_ids, prompt_with


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
        """Prompts, padded, with the prefixes after their BOS; too long a prompt loses its beginning, never a prefix.

        Raises:
            DsgError: The prefixes leave no room for a prompt.
        """
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
