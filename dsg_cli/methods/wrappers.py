"""What every method that makes a wrapper is given, and what it gives back.

Such a method is a module of this package with one function, `make(settings, material) -> Made`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from dsg_cli.data.corpora import Corpus, Part
from dsg_cli.data.tokens import Piece, draw_pieces, separator, special_ids
from dsg_cli.errors import DsgError
from dsg_cli.evals.benches import Question
from dsg_cli.guardrail.calibration import threshold_of
from dsg_cli.inference.wrappers import WrapperModule, read_keywords, statistics_of, telling_words, wrapper_from_artifact
from dsg_cli.intervals import rate_above
from dsg_cli.job import Job, Report, silent
from dsg_cli.models.language_model import LoadedModel
from dsg_cli.models.residuals import mean_residuals
from dsg_cli.settings import Filter, InContext, InputFilter, OutputFilter, Prompt
from dsg_cli.workspace.artifacts import Wrapper
from dsg_cli.workspace.results import Json


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


SLOT = "{topic}"


def make_prompt(settings: Prompt, material: Material) -> Made:
    """The text, with its topic filled in; other braces stay as they are."""
    if not settings.text.strip():
        raise DsgError("methods.prompt.text is empty.", "Write what the model is told.")
    return prefix("prompt", settings.text.replace(SLOT, topic_of(settings, material.topic)), material)


def topic_of(settings: Prompt, otherwise: str) -> str:
    """What `{topic}` stands for."""
    topic = settings.topic or otherwise
    if SLOT in settings.text and not topic.strip():
        raise DsgError(
            f"The text of methods.prompt has {SLOT}, and nothing says what that is.",
            "Name a corpus with --forget, or give --set methods.prompt.topic=WORDS.",
        )
    return topic


def make_in_context(settings: InContext, material: Material) -> Made:
    """Questions drawn with the seed, each with a choice, in an order that the seed decides."""
    rng = random.Random(material.seed)
    tokenizer = material.loaded.tokenizer
    shown = [_wrong(question, rng) for question in _drawn([material.forget_questions], settings.n_forget, rng)]
    shown += [
        question.context + question.choices[question.answer]
        for question in _drawn(material.retain_questions, settings.n_retain, rng)
    ]
    rng.shuffle(shown)
    return prefix("in-context", separator(tokenizer).join(shown), material)


def _drawn(benches: Sequence[Sequence[Question]], n: int, rng: random.Random) -> list[Question]:
    """So many questions, of each bench in turn."""
    shuffled = [rng.sample(list(bench), len(bench)) for bench in benches]
    found: list[Question] = []
    while len(found) < n and any(shuffled):
        found += [bench.pop() for bench in shuffled if bench]
    if len(found) < n:
        raise DsgError(
            f"{n} questions are to be shown, and the benches have {len(found)}.",
            "Lower methods.in_context.n_forget or n_retain, or name other benches.",
        )
    return found[:n]


def _wrong(question: Question, rng: random.Random) -> str:
    wrong = [choice for i, choice in enumerate(question.choices) if i != question.answer]
    if not wrong:
        raise DsgError("A question of the forget bench has a single choice, which is right.", "Name another bench.")
    return question.context + rng.choice(wrong)


MOST_STEPS = 2000
"""Of a fit."""

CONSTANT = 1e-6
"""A dimension that varies less than so much of the one that varies most is left out."""


def fitted(settings: Filter, material: Material, *, method: str, side: Literal["input", "output"]) -> Made:
    """A filter with its threshold, and its rates on text that it has not seen."""
    layer = middle(material.loaded.n_layers) if settings.layer is None else settings.layer
    has_layer = settings.rule == "classifier"
    body = Wrapper(
        method=method,
        rule=settings.rule,
        side=side,
        text="",
        keywords=[] if has_layer else _keywords(settings, material),
        layer=layer if has_layer else None,
        threshold=0.0,
        refusal=settings.refusal,
        rates=[],
        special_ids=list(special_ids(material.loaded.tokenizer)),
        bos=material.bos,
        forget=list(material.forget_names),
        retain=list(material.retain_names),
    )
    tensors, n_tokens = _fit(material, layer, settings.ridge) if has_layer else (None, 0)
    module = wrapper_from_artifact(body, tensors or {}, where="The new filter")
    calibration = _statistics(module, material, material.retain, "calibrate")
    retain, forget = (_statistics(module, material, corpora, "fresh") for corpora in (material.retain, material.forget))
    threshold = _threshold(calibration, settings.alpha)
    rates = [*_rates(retain, threshold, is_forget=False), *_rates(forget, threshold, is_forget=True)]
    n_tokens += sum(len(piece.ids) for piece, _ in (*calibration, *retain, *forget))
    body = replace(body, threshold=threshold, rates=rates)
    return Made(body, tensors, n_tokens, _notes(body))


def middle(n_layers: int) -> int:
    """The layer that a classifier reads after unless another is named."""
    return n_layers // 2


def fit_classifier(forget_ND: Tensor, retain_ND: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Weight [D] and bias [] of a logistic regression of forget against retain text, float32.

    Both classes count alike. Dimensions are standardised for the penalty, which is folded into what is returned.

    Args:
        forget_ND: A row each forget text.
        retain_ND: A row each retain text.
        ridge: Inverse of the strength of the penalty.
    """
    from sklearn.linear_model import LogisticRegression

    if not len(forget_ND) or not len(retain_ND):
        raise DsgError("The classifier has no text of one side to learn from.", "Give more text.")
    x_ND = torch.cat([forget_ND, retain_ND]).double()
    if not bool(x_ND.isfinite().all()):
        raise DsgError("On a piece of text an activation is not finite.", "Check the weights, or try --dtype float32.")
    mean_D, deviation_D = x_ND.mean(0), x_ND.std(0)
    varies_D = deviation_D > CONSTANT * deviation_D.max()
    if not bool(varies_D.any()):
        raise DsgError("The residual stream is the same on all text.", "Choose another methods layer.")
    scale_D = torch.where(varies_D, 1 / deviation_D.clamp(min=1e-300), 0.0)
    labels = (torch.arange(len(x_ND)) < len(forget_ND)).numpy()
    model = LogisticRegression(C=ridge, class_weight="balanced", max_iter=MOST_STEPS)
    model.fit(((x_ND - mean_D) * scale_D).numpy(), labels)
    weight_D = torch.from_numpy(model.coef_[0]).double() * scale_D
    bias = float(model.intercept_[0]) - float(weight_D @ mean_D)
    return weight_D.float(), torch.tensor(bias, dtype=torch.float32)


def _fit(material: Material, layer: int, ridge: float) -> tuple[dict[str, Tensor], int]:
    """The classifier's tensors, and how many tokens were read for it."""
    pieces = {role: _pieces(material, getattr(material, role), "select") for role in ("forget", "retain")}
    means = {
        role: mean_residuals(
            material.loaded.model,
            material.loaded.tokenizer,
            [piece.ids for piece in several],
            layer=layer,
            batch_size=material.batch_size,
            job=Job(progress=material.report, name=f"select pieces of {role} text"),
        )
        for role, several in pieces.items()
    }
    weight_D, bias = fit_classifier(means["forget"], means["retain"], ridge)
    return {"weight": weight_D, "bias": bias}, sum(len(piece.ids) for several in pieces.values() for piece in several)


def _keywords(settings: Filter, material: Material) -> list[str]:
    if settings.keywords_file is not None:
        return read_keywords(settings.keywords_file)
    forget, retain = (
        (text for corpus in corpora for text in corpus.part("select")) for corpora in (material.forget, material.retain)
    )
    return telling_words(forget, retain, settings.n_keywords)


def _pieces(material: Material, corpora: Sequence[Corpus], part: Part) -> list[Piece]:
    return draw_pieces(
        material.loaded.tokenizer,
        corpora,
        part,
        bos=material.bos,
        lengths=material.lengths,
        at_most=material.max_pieces,
        seed=material.seed,
    )


def _statistics(
    module: WrapperModule, material: Material, corpora: Sequence[Corpus], part: Part
) -> list[tuple[Piece, float]]:
    """Pieces of one part of corpora with their statistics."""
    pieces = _pieces(material, corpora, part)
    values = statistics_of(
        module,
        material.loaded.model,
        material.loaded.tokenizer,
        [piece.ids for piece in pieces],
        batch_size=material.batch_size,
        report=material.report,
        what=f"{part} pieces",
    )
    if not all(map(math.isfinite, values)):
        raise DsgError("On a piece of text an activation is not finite.", "Check the weights, or try --dtype float32.")
    return list(zip(pieces, values, strict=True))


def _threshold(found: Sequence[tuple[Piece, float]], alpha: float) -> float:
    try:
        return threshold_of([(piece.corpus, value) for piece, value in found], alpha, is_each=True)
    except DsgError as error:
        raise DsgError(error.message, "Give more retain text, or a larger alpha of the method.") from error


def _rates(found: Sequence[tuple[Piece, float]], threshold: float, *, is_forget: bool) -> list[Json]:
    """Share refused of the pieces of each corpus."""
    of_corpus: dict[str, list[float]] = {}
    for piece, value in found:
        of_corpus.setdefault(piece.corpus, []).append(value)
    return [
        {"what": name, "is_forget": is_forget, **rate_above(threshold, values)} for name, values in of_corpus.items()
    ]


def _notes(body: Wrapper) -> list[str]:
    """That it refuses nothing, where it does."""
    if any(rate["rate"] for rate in body.rates if rate["is_forget"]):
        return []
    return ["The filter refuses none of the fresh forget text."]


def make_input_filter(settings: InputFilter, material: Material) -> Made:
    """A filter of prompts; its threshold holds for prompts like retain text."""
    return fitted(settings, material, method="input-filter", side="input")


def make_output_filter(settings: OutputFilter, material: Material) -> Made:
    """A filter of answers; its threshold is set on retain text as it is, without a question in front."""
    return fitted(settings, material, method="output-filter", side="output")
