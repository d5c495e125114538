"""What a guarded model writes: one prompt, streamed and with what its gates saw on the way, or many in batches."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from dsg_cli.data.batches import TokenBatch, pad_rows
from dsg_cli.data.tokens import Request, as_chat, encode, special_ids
from dsg_cli.errors import DsgError
from dsg_cli.guardrail.guarded import check_causal, guarded, last_decisions
from dsg_cli.guardrail.runtime.gates import latched_at
from dsg_cli.guardrail.runtime.guardrail import GuardrailModule
from dsg_cli.inference.scoring import Decision, GuardedModel, Verdict, decision_of
from dsg_cli.inference.wrappers import on_side, with_prefixes
from dsg_cli.job import ALONE, PLAIN_JOB, Job
from dsg_cli.models.residuals import OomSplitter
from dsg_cli.settings import GenerateSection
from dsg_cli.workspace.checkpoints import State
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
class Prompt:
    """What is written on, as the user sends it."""

    ids: tuple[int, ...]
    n_new: int
    """Tokens, at most."""
    stop: tuple[str, ...] = ()
    """What is written ends before the first of these."""


@dataclass(frozen=True)
class Completion:
    """What a model wrote in a batch."""

    text: str
    token_ids: tuple[int, ...]
    """Without special tokens; of a refusal, those of the refusal."""
    decision: Decision | None
    """Of gates and filters; None without any."""
    n_tokens: int
    """Tokens that the model read and wrote."""


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
class TracedAnswer:
    """What a model wrote after one prompt."""

    text: str
    n_tokens: int
    """Tokens that it wrote."""
    refused: bool = False
    tokens: list[str] = field(default_factory=list)
    """The tokens that the gates read; empty without guardrails."""
    ids: list[int] = field(default_factory=list)
    gates: list[GateTrace] = field(default_factory=list)


def prompt_ids(model: GuardedModel, prompt: str, *, chat: bool, n_new: int) -> list[int]:
    """Token ids of a prompt, as the user sends it; there must be room for what wrappers put in front of it, too."""
    if not prompt.strip():
        raise DsgError("The prompt is empty.", "Give text.")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise DsgError("The prompt is no text: it holds half of a surrogate pair.", "Give it in UTF-8.")
    if not chat:
        ids = encode(model.tokenizer, [prompt], bos=model.bos)[0]
    elif model.tokenizer.chat_template is None:
        raise DsgError("The model's tokenizer has no chat template.", "Leave --chat out.")
    else:
        ids = encode(model.tokenizer, [as_chat(model.tokenizer, prompt)], bos=None)[0]
    _check_room(model, len(with_prefixes(model.wrappers, ids, model.tokenizer)), n_new)
    return ids


def _check_room(model: GuardedModel, n_read: int, n_new: int) -> None:
    room = model.max_length - n_read
    if n_new > room:
        raise DsgError(
            f"A prompt of {n_read} tokens leaves room for {max(room, 0)} of the model's {model.max_length}.",
            f"Shorten it, or lower --max-new-tokens (now {n_new})." if n_new else "Shorten it.",
        )


def answer(
    model: GuardedModel, ids: Sequence[int], settings: GenerateSection, *, seed: int = 0, write: Write = lambda _: None
) -> TracedAnswer:
    """Continue one prompt, as the user sends it, and note what causal gates see of it.

    `write` is called with each piece of the answer. A prompt that a filter refuses is not shown to the model; where one
    filters answers, nothing is written before the answer is whole.
    """
    check_causal(guard.gate.form for guard in model.guardrails)
    is_held = bool(on_side(model.wrappers, "output"))
    unread = [GateTrace(guard.gate.form, guard.gate.threshold, [], None) for guard in model.guardrails]
    traced = TracedAnswer("", 0, gates=unread)

    def continue_prompt(_numbers: Sequence[int]) -> list[tuple[list[int], str]]:
        nonlocal traced
        traced = _continued(model, ids, settings, seed, (lambda _: None) if is_held else write)
        return [(encode(model.tokenizer, [traced.text], bos=None)[0], traced.text)]

    ((_, text, verdict),) = behind_filters(model, [ids], continue_prompt)
    if verdict.refusal is not None:
        traced = dataclasses.replace(traced, text=text, refused=True)
    if is_held or verdict.refusal is not None:
        write(traced.text)
    return traced


@torch.inference_mode()
def _continued(
    model: GuardedModel, ids: Sequence[int], settings: GenerateSection, seed: int, write: Write
) -> TracedAnswer:
    """The answer to a prompt that no filter refuses."""
    tokenizer, guardrails = model.tokenizer, model.guardrails
    read = with_prefixes(model.wrappers, ids, tokenizer)
    _check_room(model, len(read), settings.max_new_tokens)
    refuses = settings.on_trigger == "refuse" and bool(guardrails)
    watch = _Watch(model, len(read), ends_when_open=refuses)
    sampling = {"do_sample": True, "temperature": settings.temperature, "top_k": 0} if settings.temperature > 0 else {}
    for guard in guardrails:
        guard.trace = []
    try:
        with guarded(model.model, guardrails, allow_mismatch=True), torch.random.fork_rng():
            torch.manual_seed(seed)
            ids_BL = torch.tensor([read], device=model.device)
            stream = _Stream(tokenizer, write, watch)
            written = _extend(model, ids_BL, torch.ones_like(ids_BL), settings.max_new_tokens, watch, stream, sampling)
        traces = [_gate_trace(guard) for guard in guardrails]
    finally:
        for guard in guardrails:
            guard.trace = None
    new = written[0, len(read) :].tolist()
    is_refused = refuses and watch.is_open
    if is_refused:
        new = new[:-1]  # Written after the gate had opened.
    text = str(tokenizer.decode(new, skip_special_tokens=True))
    if is_refused:
        ending = f"{' ' if text else ''}{settings.refusal}"
        write(ending)
        text += ending
    n_tokens = len([token for token in new if token not in special_ids(tokenizer)])
    seen = [*read, *new][: len(traces[0].statistic)] if traces else []
    return TracedAnswer(text, n_tokens, is_refused, [str(tokenizer.decode([token])) for token in seen], seen, traces)


def _gate_trace(guard: GuardrailModule) -> GateTrace:
    assert guard.trace is not None
    statistic: Tensor = torch.cat([decision.statistic_BL[0] for decision in guard.trace]).cpu()
    gated: Tensor = torch.cat([decision.gated_BL[0] for decision in guard.trace]).cpu()
    return GateTrace(guard.gate.form, guard.gate.threshold, statistic.tolist(), latched_at(gated))


def behind_filters(
    model: GuardedModel,
    prompts: Sequence[Sequence[int]],
    write: Callable[[Sequence[int]], Sequence[tuple[Sequence[int], str]]],
    job: Job = PLAIN_JOB,
) -> list[tuple[Sequence[int], str, Verdict]]:
    """Answers to prompts of which the model's filters see each, and its answer: token ids, text, and their verdict.

    Prompts are as the user sends them; `write` gets the numbers of those that no filter refuses, and gives token ids
    and text of their answers.
    """
    job = dataclasses.replace(job, workers=ALONE)  # Texts are written by every worker.
    verdicts = model.verdicts(on_side(model.wrappers, "input"), [Request(tuple(ids), ()) for ids in prompts], job)
    passed = [i for i, verdict in enumerate(verdicts) if verdict.refusal is None]
    answers = dict(zip(passed, write(passed), strict=True)) if passed else {}
    whole = [Request(tuple(prompts[i]), tuple(answers[i][0])) for i in passed]
    for i, verdict in zip(passed, model.verdicts(on_side(model.wrappers, "output"), whole, job), strict=True):
        if verdict.statistic is not None:
            verdicts[i] = verdict
    refusals = {verdict.refusal for verdict in verdicts if verdict.refusal is not None}
    instead = {text: (encode(model.tokenizer, [text], bos=None)[0], text) for text in refusals}
    return [
        (*(answers[i] if verdict.refusal is None else instead[verdict.refusal]), verdict)
        for i, verdict in enumerate(verdicts)
    ]


def generate(model: GuardedModel, prompts: Sequence[Prompt], job: Job = PLAIN_JOB) -> list[Completion]:
    """What the model writes after each prompt, the likeliest token each time, in batches of prompts that end alike.

    Every prompt with its prefixes must leave room for its tokens. Each worker writes all.
    """
    drafts: dict[int, list[Any]] = {}

    def write(numbers: Sequence[int]) -> list[tuple[Sequence[int], str]]:
        drafts.update(zip(numbers, _drafts(model, [prompts[i] for i in numbers], job), strict=True))
        return [(drafts[i][0], drafts[i][1]) for i in numbers]

    completions = []
    answers = behind_filters(model, [prompt.ids for prompt in prompts], write, job)
    for i, (prompt, (ids, text, verdict)) in enumerate(zip(prompts, answers, strict=True)):
        written, _, gate, n_read = drafts.get(i, ([], "", None, 0))
        decision = decision_of(len(prompt.ids), gate, verdict)
        completions.append(Completion(text, tuple(ids), decision, n_read + len(written)))
    return completions


def _drafts(model: GuardedModel, prompts: Sequence[Prompt], job: Job) -> list[list[Any]]:
    """`[ids, text, [statistic, gated, edit] or None, tokens read]` of each prompt that the model is shown."""
    tokenizer = model.tokenizer
    rows = [tuple(with_prefixes(model.wrappers, prompt.ids, tokenizer)) for prompt in prompts]
    shown = [(row, prompt.n_new, prompt.stop) for row, prompt in zip(rows, prompts, strict=True)]
    this = job.named(f"{job.name}/{hashlib.sha256(repr(shown).encode()).hexdigest()}")
    drafts: dict[int, list[Any]] = {i: draft for i, *draft in (this.kept() or {"drafts": []})["drafts"]}

    def state() -> State:
        return {"drafts": [[i, *draft] for i, draft in drafts.items()]}

    # Prompts of a batch end alike.
    groups: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: (prompts[i].n_new, prompts[i].stop, -len(rows[i]), rows[i])):
        last = prompts[groups[-1][0]] if groups else None
        ends_alike = last is not None and (last.n_new, last.stop) == (prompts[i].n_new, prompts[i].stop)
        if not ends_alike or len(groups[-1]) == model.batch_size:
            groups.append([])
        groups[-1].append(i)
    split_on_oom, pad = OomSplitter(), tokenizer.pad_token_id or 0
    with at_safe_points(), guarded(model.model, model.guardrails, allow_mismatch=True), torch.inference_mode():
        for group in groups:
            if group[0] not in drafts:
                like = prompts[group[0]]
                batch = pad_rows([list(rows[i]) for i in group], pad, special_ids(tokenizer), model.device, index=group)
                for part, written in split_on_oom(batch, functools.partial(_draft_batch, model, like)):
                    drafts |= {i: [*draft, len(rows[i])] for i, draft in zip(part.index, written, strict=True)}
            job.progress(f"{job.name}, prompts", len(drafts), len(rows))
            this.reached(state)
    this.keep(state())
    return [drafts[i] for i in range(len(rows))]


def _draft_batch(model: GuardedModel, like: Prompt, batch: TokenBatch) -> list[list[Any]]:
    """`[ids, text, note]` of each row."""
    tokenizer, length = model.tokenizer, batch.ids_BL.shape[1]
    shift_B = length - batch.mask_BL.sum(-1)
    at_BL = (torch.arange(length, device=batch.ids_BL.device) - shift_B[:, None]) % length  # The padding in front.
    ids_BL, mask_BL = batch.ids_BL.gather(1, at_BL), batch.mask_BL.gather(1, at_BL).long()
    watch = _Watch(model, length, like.stop)
    padding = {"pad_token_id": tokenizer.pad_token_id or 0}
    written = _extend(model, ids_BL, mask_BL, like.n_new, watch, None, padding)
    end: Any = model.model.generation_config.eos_token_id
    ends = set(end) if isinstance(end, list) else {end}
    special = set(special_ids(tokenizer))
    drafts: list[list[Any]] = []
    for row, new in enumerate(written[:, length:].tolist()):
        new = new[: watch.lengths.get(row, len(new))]
        n = next((i for i, token in enumerate(new) if token in ends), len(new))
        ids = [token for token in new[:n] if token not in special]
        note = watch.notes[row] if watch.notes else None
        drafts.append([ids, _before(str(tokenizer.decode(ids)), like.stop), note])
    return drafts


def _extend(
    model: GuardedModel,
    ids_BL: Tensor,
    mask_BL: Tensor,
    n_new: int,
    watch: _Watch,
    stream: TextStreamer | None,
    options: dict[str, Any],
) -> Tensor:
    """Left-padded prompts with what the model writes after them, the guardrails being on."""
    written: Tensor = model.model.generate(
        ids_BL,
        attention_mask=mask_BL,
        max_new_tokens=n_new,
        stopping_criteria=StoppingCriteriaList([watch]),
        streamer=stream,
        **{"do_sample": False, **ONE_BY_ONE, **options},
    )
    return written


class _Watch(StoppingCriteria):
    """Ends rows in which a stop text stands, or all once a gate is open; notes what gates decide until a row ends."""

    def __init__(
        self, model: GuardedModel, n_prompt: int, stop: Sequence[str] = (), *, ends_when_open: bool = False
    ) -> None:
        self.model, self.n_prompt, self.stop, self.ends_when_open = model, n_prompt, stop, ends_when_open
        self.is_open = False
        self.lengths: dict[int, int] = {}
        """Row -> tokens written when a stop text ended it."""
        self.notes: list[list[Any]] = []
        """`[statistic, gated, edit]` of each row, the largest of all its tokens."""

    def __call__(self, input_ids: Any, _scores: Any, **_options: Any) -> Any:
        now = last_decisions(self.model.guardrails) if self.model.guardrails else []
        self.is_open = any(gated for _, gated, _ in now)
        self.notes = self.notes or [list(decision) for decision in now]
        for row, (note, decision) in enumerate(zip(self.notes, now, strict=True)):
            if row not in self.lengths:
                note[:] = [max(note[0], decision[0]), note[1] or decision[1], max(note[2], decision[2])]
        for row, new in enumerate(input_ids[:, self.n_prompt :].tolist() if self.stop else ()):
            if row not in self.lengths:
                text = str(self.model.tokenizer.decode(new))
                if _before(text, self.stop) != text:
                    self.lengths[row] = len(new)
        is_over = self.ends_when_open and self.is_open
        ended = [is_over or row in self.lengths for row in range(len(input_ids))]
        return torch.tensor(ended, device=input_ids.device)


class _Stream(TextStreamer):
    """Pieces of the answer as they are written. One token is held back: if a gate opens, it belongs to no answer."""

    def __init__(self, tokenizer: Any, write: Write, watch: _Watch) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.watch = write, watch
        self.held: Any = None

    def put(self, value: Any) -> None:
        if self.next_tokens_are_prompt:
            super().put(value)
            return
        if self.held is not None:
            super().put(self.held)
        self.held = value

    def end(self) -> None:
        if self.held is not None and not (self.watch.ends_when_open and self.watch.is_open):
            super().put(self.held)
        super().end()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002 (its name is the library's)
        self.write(text)


def _before(text: str, stop: Sequence[str]) -> str:
    """What stands before the first of some texts."""
    return text[: min((at for words in stop if (at := text.find(words)) >= 0), default=len(text))]
