"""What every method that makes a wrapper is given, and what it gives back.

Such a method is a module of this package with one function, `make(settings, material) -> Made`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dsg_cli.artifacts import Wrapper
from dsg_cli.attacks.few_shot import separator
from dsg_cli.benches.tasks import Question
from dsg_cli.corpora import Corpus
from dsg_cli.model import LoadedModel
from dsg_cli.progress import Report, silent
from dsg_cli.tokens import special_ids


@dataclass(frozen=True)
class Material:
    """The model, and what is known of what it is to forget; a method says what it needs."""

    loaded: LoadedModel
    bos: int | None
    """Token that every text begins with."""
    topic: str = ""
    """What is to be forgotten, in words."""
    forget: Sequence[Corpus] = ()
    retain: Sequence[Corpus] = ()
    forget_names: Sequence[str] = ()
    """Of the corpora, whether they are read or not."""
    retain_names: Sequence[str] = ()
    forget_questions: Sequence[Question] = ()
    retain_questions: Sequence[Sequence[Question]] = ()
    """Of each bench."""
    lengths: Sequence[int] = ()
    """Of pieces of text in tokens, each as likely as the others."""
    max_pieces: int = 4096
    """Of each part of the corpora, about."""
    batch_size: int = 32
    seed: int = 0
    report: Report = silent


@dataclass(frozen=True)
class Made:
    """A wrapper, its tensors, and what a person should know of it."""

    body: Wrapper
    tensors: dict[str, Tensor] | None = None
    n_tokens: int = 0
    """That were read for it."""
    notes: list[str] = field(default_factory=list)


def prefix(method: str, text: str, material: Material) -> Made:
    """A wrapper that puts a text in front of prompts, a blank line between them where the tokenizer knows any."""
    tokenizer = material.loaded.tokenizer
    text = f"{text.strip()}{separator(tokenizer).strip(' ')}"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    n_unknown = ids.count(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0
    body = Wrapper(
        method=method,
        rule="prefix",
        side="input",
        text=text,
        keywords=[],
        layer=None,
        threshold=0.0,
        refusal="",
        rates=[],
        special_ids=list(special_ids(tokenizer)),
        bos=material.bos,
        forget=list(material.forget_names),
        retain=list(material.retain_names),
    )
    notes = [f"Of {len(ids)} tokens of the text, {n_unknown} are unknown to the model."] if n_unknown else []
    return Made(body, notes=notes)
