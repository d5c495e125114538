"""Write on from many prompts at once, greedily, under guardrails and behind wrappers; note what gates decide.

The sister of scorer.py for text that is written. Prompts are padded on the left; each row ends by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from dsg_cli.checkpoints import Checkpoint, State
from dsg_cli.fitting import Fitting
from dsg_cli.generation import ONE_BY_ONE
from dsg_cli.guardrail import GuardrailModule, guarded, last_decisions
from dsg_cli.interruption import at_safe_points
from dsg_cli.model import LoadedModel
from dsg_cli.progress import Report, silent
from dsg_cli.scorer import Decision
from dsg_cli.scoring import Request, requests_digest
from dsg_cli.tokens import TokenBatch, encode, pad_rows, special_ids
from dsg_cli.wrapper import WrapperModule, judged, on_side, prompt_with


@dataclass(frozen=True)
class Prompt:
    """What is written on, as the user sends it."""

    ids: tuple[int, ...]
    n_new: int
    """Tokens, at most."""
    stop: tuple[str, ...] = ()
    """What is written ends before the first of these."""


@dataclass(frozen=True)
class Written:
    """What a model wrote."""

    text: str
    ids: tuple[int, ...]
    """Without special tokens; of a refusal, those of the refusal."""
    decision: Decision | None
    """Of gates and filters; None without any."""


@dataclass
class Writer:
    """A model, guarded and wrapped or not, that writes in batches."""

    loaded: LoadedModel
    guardrails: Sequence[GuardrailModule] = ()
    wrappers: Sequence[WrapperModule] = ()
    batch_size: int = 32
    what: str = "writing"
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    report: Report = silent
    n_tokens: int = 0
    n_calls: int = 0

    def __call__(self, prompts: Sequence[Prompt]) -> list[Written]:
        """What the model writes after each prompt; every prompt with its prefixes must leave room for its tokens."""
        loaded, wrappers = self.loaded, self.wrappers
        filters = {side: on_side(wrappers, side) for side in ("input", "output")}
        asked_of = [Request(prompt.ids, ()) for prompt in prompts]
        before = judged(
            filters["input"], loaded.model, loaded.tokenizer, asked_of, batch_size=self.batch_size, report=self.report
        )
        refusals = [one.refusal for one in before]
        left = [i for i, refusal in enumerate(refusals) if refusal is None]
        found = dict(zip(left, self._written([prompts[i] for i in left]), strict=True))
        answers = [Request(prompts[i].ids, tuple(found[i][0])) for i in left]
        after = judged(
            filters["output"], loaded.model, loaded.tokenizer, answers, batch_size=self.batch_size, report=self.report
        )
        verdicts = list(before)
        for i, verdict in zip(left, after, strict=True):
            refusals[i] = verdict.refusal
            verdicts[i] = verdict if verdict.statistic is not None else verdicts[i]
        written = []
        for i, (prompt, refusal, verdict) in enumerate(zip(prompts, refusals, verdicts, strict=True)):
            ids, text, note = found.get(i, ([], "", None))
            if refusal is not None:
                text, ids = refusal, encode(loaded.tokenizer, [refusal], bos=None)[0]
            decided = None
            if note is not None:
                decided = Decision(len(prompt.ids), note[0], bool(note[1]) or refusal is not None, note[2])
            elif verdict.statistic is not None:
                decided = Decision(len(prompt.ids), verdict.statistic, refusal is not None, 0.0)
            elif self.guardrails and refusal is not None:
                decided = Decision(len(prompt.ids), 0.0, True, 0.0)
            written.append(Written(text, tuple(ids), decided))
        return written

    def _written(self, prompts: Sequence[Prompt]) -> list[list[Any]]:
        """`[ids, text, [statistic, gated, edit] or None]` of each prompt that the model is shown."""
        tokenizer, bos = self.loaded.tokenizer, self.loaded.tokenizer.bos_token_id
        rows = [tuple(prompt_with(self.wrappers, prompt.ids, tokenizer, bos)) for prompt in prompts]
        name = f"{self.what}/{self.n_calls}"
        self.n_calls += 1
        digest = requests_digest([Request(row, (one.n_new,)) for row, one in zip(rows, prompts, strict=True)])
        kept = self.checkpoint.entry(name) or {}
        found: dict[int, list[Any]] = {i: one for i, *one in kept.get("found", [])} if kept.get("of") == digest else {}
        order = sorted(range(len(rows)), key=lambda i: (prompts[i].n_new, prompts[i].stop, -len(rows[i]), rows[i]))

        def state() -> State:
            return {"of": digest, "found": [[i, *one] for i, one in found.items()]}

        fit = Fitting()
        with (
            at_safe_points(),
            guarded(self.loaded.model, self.guardrails, allow_mismatch=True),
            torch.inference_mode(),
        ):
            for group in _groups(order, prompts, self.batch_size):
                if group[0] not in found:
                    first = prompts[group[0]]
                    pad, special = self.loaded.tokenizer.pad_token_id or 0, special_ids(self.loaded.tokenizer)
                    device = str(self.loaded.model.device)
                    batch = pad_rows([list(rows[i]) for i in group], pad, special, device, index=group)
                    for part, several in fit(batch, functools.partial(self._batch, like=first)):
                        found |= dict(zip(part.index, several, strict=True))
                self.n_tokens += sum(len(rows[i]) + len(found[i][0]) for i in group)
                self.report(f"{self.what}, prompts", len(found), len(rows))
                self.checkpoint.reached(name, state)
        self.checkpoint.keep(name, state())
        return [found[i] for i in range(len(rows))]

    def _batch(self, batch: TokenBatch, like: Prompt) -> list[list[Any]]:
        ids_BL, mask_BL = _left_padded(batch)
        tokenizer = self.loaded.tokenizer
        ending = _Ending(tokenizer, ids_BL.shape[1], like.stop, self.guardrails)
        written: Any = self.loaded.model.generate(
            ids_BL,
            attention_mask=mask_BL,
            max_new_tokens=like.n_new,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or 0,
            stopping_criteria=StoppingCriteriaList([ending]),
            **ONE_BY_ONE,
        )
        special = set(special_ids(tokenizer))
        found: list[list[Any]] = []
        notes: list[Any] = [*ending.notes] or [None] * len(ids_BL)
        for row, note in enumerate(notes):
            n = ending.lengths.get(row, written.shape[1] - ids_BL.shape[1])
            new = written[row, ids_BL.shape[1] :][:n].tolist()
            ids = [token for token in _until(new, _ends(self.loaded.model)) if token not in special]
            found.append([ids, _before(str(tokenizer.decode(ids)), like.stop), note])
        return found


class _Ending(StoppingCriteria):
    """Ends the rows in which a stop text stands, and notes what gates decide on each row until it ends."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        n_prompt: int,
        stop: Sequence[str],
        guardrails: Sequence[GuardrailModule],
    ) -> None:
        self.tokenizer, self.n_prompt, self.stop, self.guardrails = tokenizer, n_prompt, stop, guardrails
        self.lengths: dict[int, int] = {}
        """Row -> tokens written when it was ended."""
        self.notes: list[list[Any]] = []

    def __call__(self, input_ids: Any, _scores: Any, **_options: Any) -> Any:
        if self.guardrails:
            now = last_decisions(self.guardrails)
            if not self.notes:
                self.notes = [list(one) for one in now]
            else:
                for row, (note, one) in enumerate(zip(self.notes, now, strict=True)):
                    if row not in self.lengths:
                        note[:] = [max(note[0], one[0]), note[1] or one[1], max(note[2], one[2])]
        for row, new in enumerate(input_ids[:, self.n_prompt :].tolist() if self.stop else ()):
            if row not in self.lengths and _before(text := str(self.tokenizer.decode(new)), self.stop) != text:
                self.lengths[row] = len(new)
        return torch.tensor([row in self.lengths for row in range(len(input_ids))], device=input_ids.device)


def _groups(order: Sequence[int], prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    """Prompts in batches whose rows end alike."""
    groups: list[list[int]] = []
    for i in order:
        last = prompts[groups[-1][0]] if groups else None
        if last is None or len(groups[-1]) == size or (last.n_new, last.stop) != (prompts[i].n_new, prompts[i].stop):
            groups.append([])
        groups[-1].append(i)
    return groups


def _left_padded(batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, L] with the padding in front."""
    length = batch.ids_BL.shape[1]
    shift_B = length - batch.mask_BL.sum(-1)
    at_BL = (torch.arange(length, device=batch.ids_BL.device) - shift_B[:, None]) % length
    return batch.ids_BL.gather(1, at_BL), batch.mask_BL.gather(1, at_BL).long()


def _ends(model: Any) -> set[int]:
    """Tokens that end an answer."""
    end = model.generation_config.eos_token_id
    return set(end) if isinstance(end, list) else set() if end is None else {end}


def _until(ids: Sequence[int], ends: set[int]) -> list[int]:
    n = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return list(ids[:n])


def _before(text: str, stop: Sequence[str]) -> str:
    """What stands before the first of some texts."""
    return text[: min((at for one in stop if (at := text.find(one)) >= 0), default=len(text))]
