"""Write an answer under guardrails and behind wrappers, and note what the gates saw on the way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList, TextStreamer

from dsg_cli.data.batches import TokenBatch, pad_rows
from dsg_cli.data.tokens import Request, as_chat, encode, special_ids
from dsg_cli.errors import DsgError
from dsg_cli.guardrail.guarded import check_causal, guarded, last_decisions
from dsg_cli.guardrail.runtime.gates import latched_at
from dsg_cli.guardrail.runtime.guardrail import GuardrailModule
from dsg_cli.inference.scoring import Decision, requests_digest
from dsg_cli.inference.wrappers import WrapperModule, judged, on_side, prompt_with, refuses_answer, refuses_prompt
from dsg_cli.job import Report, silent
from dsg_cli.models.language_model import LoadedModel, context_length
from dsg_cli.models.residuals import OomSplitter
from dsg_cli.workspace.checkpoints import Checkpoint, State
from dsg_cli.workspace.files import at_safe_points

Write = Callable[[str], None]

ONE_BY_ONE: dict[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "use_cache": True,
    "return_dict_in_generate": False,
    "prompt_lookup_num_tokens": None,
    "stop_strings": None,
}
"""Whatever a model's own generation settings say: one sequence a prompt, token by token."""


@dataclass(frozen=True)
class GateTrace:
    """What one gate saw of a prompt and of the answer to it."""

    form: str
    threshold: float
    statistic: list[float]
    """After each token that was read: the prompt's, then the answer's but for its last. Empty where a filter refused
    the prompt."""
    latched_at: int | None
    """The first token at which it was open."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote."""

    text: str
    n_tokens: int
    """Tokens that it wrote."""
    refused: bool = False
    tokens: list[str] = field(default_factory=list)
    """The tokens that the gates read; empty without guardrails."""
    ids: list[int] = field(default_factory=list)
    """Theirs."""
    gates: list[GateTrace] = field(default_factory=list)


def prompt_ids(
    loaded: LoadedModel,
    prompt: str,
    *,
    bos: int | None,
    chat: bool,
    n_new: int,
    wrappers: Sequence[WrapperModule] = (),
) -> list[int]:
    """Token ids of a prompt, as the user sends it; there must be room for what wrappers put in front of it, too."""
    if not prompt.strip():
        raise DsgError("The prompt is empty.", "Give text.")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise DsgError("The prompt is no text: it holds half of a surrogate pair.", "Give it in UTF-8.")
    if not chat:
        ids = encode(loaded.tokenizer, [prompt], bos=bos)[0]
    elif loaded.tokenizer.chat_template is None:
        raise DsgError(f"The tokenizer of {loaded.source} has no chat template.", "Leave --chat out.")
    else:
        ids = encode(loaded.tokenizer, [as_chat(loaded.tokenizer, prompt)], bos=None)[0]
    _check_room(loaded, len(prompt_with(wrappers, ids, loaded.tokenizer, bos)), n_new)
    return ids


def _check_room(loaded: LoadedModel, n_read: int, n_new: int) -> None:
    room = context_length(loaded.model.config) - n_read
    if n_new > room:
        raise DsgError(
            f"A prompt of {n_read} tokens leaves room for {max(room, 0)} of the model's "
            f"{context_length(loaded.model.config)}.",
            f"Shorten it, or lower --max-new-tokens (now {n_new})." if n_new else "Shorten it.",
        )


def answer(
    loaded: LoadedModel,
    ids: Sequence[int],
    *,
    guardrails: Sequence[GuardrailModule] = (),
    wrappers: Sequence[WrapperModule] = (),
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    refusal: str | None = None,
    allow_mismatch: bool = False,
    write: Write = lambda _: None,
) -> Answer:
    """Continue a prompt.

    Args:
        loaded: The whole model.
        ids: Of the prompt, as the user sends it.
        guardrails: With causal gates; none for the base model.
        wrappers: In the order in which they act. A prompt that one refuses is not shown to the model; where one
            filters answers, nothing is shown before the answer is whole.
        max_new_tokens: Tokens to write, at most.
        temperature: 0 takes the likeliest token.
        seed: Of the draws, if the temperature is not 0.
        refusal: If given, the answer ends with it where a gate opens; else it goes on, clamped.
        allow_mismatch: Also if the model is not the one that the guardrails were made for.
        write: Called with each piece of the answer.
    """
    check_causal(guard.gate.form for guard in guardrails)
    model, tokenizer = loaded.model, loaded.tokenizer
    instead = refuses_prompt(wrappers, model, tokenizer, ids)
    if instead is not None:
        write(instead)
        unread = [GateTrace(guard.gate.form, guard.gate.threshold, [], None) for guard in guardrails]
        return Answer(instead, 0, refused=True, gates=unread)
    asked = prompt_with(wrappers, ids, tokenizer, tokenizer.bos_token_id)
    _check_room(loaded, len(asked), max_new_tokens)
    is_held = bool(on_side(wrappers, "output"))
    found = _continued(
        loaded,
        asked,
        guardrails,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        refusal=refusal,
        allow_mismatch=allow_mismatch,
        write=(lambda _: None) if is_held else write,
    )
    if is_held:
        instead = refuses_answer(wrappers, model, tokenizer, ids, encode(tokenizer, [found.text], bos=None)[0])
        found = found if instead is None else replace(found, text=instead, refused=True)
        write(found.text)
    return found


@torch.inference_mode()
def _continued(
    loaded: LoadedModel,
    ids: Sequence[int],
    guardrails: Sequence[GuardrailModule],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    refusal: str | None,
    allow_mismatch: bool,
    write: Write,
) -> Answer:
    """The answer to a prompt as the model reads it."""
    opened = Opened(guardrails) if refusal is not None and guardrails else None
    stream = Stream(loaded.tokenizer, write, opened)
    input_ids = torch.tensor([list(ids)], device=loaded.model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
    for guard in guardrails:
        guard.trace = []
    try:
        with guarded(loaded.model, guardrails, allow_mismatch=allow_mismatch), torch.random.fork_rng():
            torch.manual_seed(seed)
            written: Any = loaded.model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=max_new_tokens,
                stopping_criteria=StoppingCriteriaList([opened] if opened else []),
                streamer=stream,
                **ONE_BY_ONE,
                **sampling,
            )
        traces = [gate_trace(guard) for guard in guardrails]
    finally:
        for guard in guardrails:
            guard.trace = None
    new = written[0, len(ids) :].tolist()
    refused = opened is not None and opened.is_open
    if refused:
        new = new[:-1]  # Written after the gate had opened.
    text = str(loaded.tokenizer.decode(new, skip_special_tokens=True))
    if refused:
        ending = f"{' ' if text else ''}{refusal}"
        write(ending)
        text += ending
    read = [*ids, *new][: len(traces[0].statistic)] if traces else []
    tokens = [str(loaded.tokenizer.decode([token])) for token in read]
    return Answer(text, len([i for i in new if i not in special_ids(loaded.tokenizer)]), refused, tokens, read, traces)


def gate_trace(guard: GuardrailModule) -> GateTrace:
    """What a guardrail noted of one sequence."""
    assert guard.trace is not None
    statistic: Tensor = torch.cat([decision.statistic_BL[0] for decision in guard.trace]).cpu()
    gated: Tensor = torch.cat([decision.gated_BL[0] for decision in guard.trace]).cpu()
    return GateTrace(guard.gate.form, guard.gate.threshold, statistic.tolist(), latched_at(gated))


class Opened(StoppingCriteria):
    """Stop once a gate is open."""

    def __init__(self, guardrails: Sequence[GuardrailModule]) -> None:
        self.guardrails = guardrails
        self.is_open = False

    def __call__(self, input_ids: Any, _scores: Any, **_options: Any) -> Any:
        self.is_open = any(bool(guard.last_gated_B.any()) for guard in self.guardrails)
        return torch.full((len(input_ids),), self.is_open, device=input_ids.device)


class Stream(TextStreamer):
    """Pieces of the answer as they are written. One token is held back: if a gate opens, it belongs to no answer."""

    def __init__(self, tokenizer: Any, write: Write, opened: Opened | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.opened = opened
        self.held: Any = None

    def put(self, value: Any) -> None:
        if self.next_tokens_are_prompt:
            super().put(value)
            return
        if self.held is not None:
            super().put(self.held)
        self.held = value

    def end(self) -> None:
        if self.held is not None and not (self.opened is not None and self.opened.is_open):
            super().put(self.held)
        super().end()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002 (its name is the library's)
        self.write(text)


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

        split_on_oom = OomSplitter()
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
                    for part, several in split_on_oom(batch, functools.partial(self._batch, like=first)):
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
