"""Write an answer under guardrails and behind wrappers, and note what the gates saw on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from dsg_cli.errors import DsgError
from dsg_cli.guardrail import GuardrailModule, check_causal, guarded
from dsg_cli.model import LoadedModel, context_length
from dsg_cli.tokens import as_chat, encode, special_ids
from dsg_cli.wrapper import WrapperModule, on_side, prompt_with, refuses_answer, refuses_prompt

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
    """Token ids of a prompt, as the user sends it; there must be room for what wrappers put in front of it, too.

    Raises:
        DsgError: Nothing in it, no chat template, or no room for an answer.
    """
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

    Raises:
        DsgError: The model is another one, a gate needs whole sequences, a residual was not finite, or prompt and
            answer do not fit the model.
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
    latched_at = int(gated.int().argmax()) if bool(gated.any()) else None
    return GateTrace(guard.gate.form, guard.gate.threshold, statistic.tolist(), latched_at)


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
