"""Methods that wrap the model, which stays as it is: a text in front of prompts, or a filter of prompts or answers.

What makes a wrapper is a function from `WrapperInputs` and its settings to a `WrapperResult`. A filter's classifier or
keywords come from the `select` part of the corpora, its threshold from the `calibrate` part of the retain corpora, and
its rates from the `fresh` parts.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from dsg_cli.data.corpora import Corpus, Part
from dsg_cli.data.tokens import Piece, draw_pieces, separator, special_ids
from dsg_cli.errors import DsgError
from dsg_cli.evals.questions import Question
from dsg_cli.guardrail.calibration import threshold_of
from dsg_cli.guardrail.runtime.sites import decoder_layers
from dsg_cli.inference.scoring import GuardedModel
from dsg_cli.inference.wrappers import WrapperModule, read_keywords, telling_words, wrapper_from_artifact
from dsg_cli.intervals import rate_above
from dsg_cli.job import PLAIN_JOB, Job
from dsg_cli.models.residuals import mean_residuals
from dsg_cli.settings import Filter, InContext, InputFilter, OutputFilter, PromptPrefix
from dsg_cli.workspace.artifacts import Wrapper
from dsg_cli.workspace.body import Json

SLOT = "{topic}"

MAX_FIT_STEPS = 2000

CONSTANT = 1e-6
"""A dimension that varies less than so much of the one that varies most is left out of a classifier."""


@dataclass(frozen=True)
class WrapperInputs:
    """The model, and what is known of what it is to forget; a method says what it needs."""

    model: GuardedModel
    """Bare."""
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
    seed: int = 0
    job: Job = PLAIN_JOB


@dataclass(frozen=True)
class WrapperResult:
    """A wrapper, its tensors, and what a person should know of it."""

    body: Wrapper
    tensors: dict[str, Tensor] | None = None
    n_tokens: int = 0
    """That were read for it."""
    notes: list[str] = field(default_factory=list)


def make_prompt(inputs: WrapperInputs, settings: PromptPrefix) -> WrapperResult:
    """Tell the model, in front of every prompt, that it does not know (2403.03329).

    The text, with its topic filled in; other braces stay as they are.
    """
    return _prefix("prompt", settings.text.replace(SLOT, topic_of(settings, inputs.topic)), inputs)


def topic_of(settings: PromptPrefix, otherwise: str) -> str:
    """What `{topic}` stands for."""
    topic = settings.topic or otherwise
    if SLOT in settings.text and not topic.strip():
        raise DsgError(
            f"The text of methods.prompt has {SLOT}, and nothing says what that is.",
            "Name a corpus with --forget, or give --set methods.prompt.topic=WORDS.",
        )
    return topic


def make_in_context(inputs: WrapperInputs, settings: InContext) -> WrapperResult:
    """Show questions with their answers first: wrong ones on what the model is to forget (2310.07579).

    Questions are drawn with the seed, which also decides their order and which of the wrong choices is shown.
    """
    rng = random.Random(inputs.seed)
    shown = []
    for question in _draw_questions([inputs.forget_questions], settings.n_forget, rng):
        wrong = [choice for i, choice in enumerate(question.choices) if i != question.answer]
        if not wrong:
            raise DsgError("A question of the forget bench has a single choice, which is right.", "Name another bench.")
        shown.append(question.context + rng.choice(wrong))
    shown += [
        question.context + question.choices[question.answer]
        for question in _draw_questions(inputs.retain_questions, settings.n_retain, rng)
    ]
    rng.shuffle(shown)
    return _prefix("in-context", separator(inputs.model.tokenizer).join(shown), inputs)


def _draw_questions(benches: Sequence[Sequence[Question]], n: int, rng: random.Random) -> list[Question]:
    """So many questions, of each bench in turn."""
    shuffled = [rng.sample(list(bench), len(bench)) for bench in benches]
    drawn: list[Question] = []
    while len(drawn) < n and any(shuffled):
        drawn += [bench.pop() for bench in shuffled if bench]
    if len(drawn) < n:
        raise DsgError(
            f"{n} questions are to be shown, and the benches have {len(drawn)}.",
            "Lower methods.in_context.n_forget or n_retain, or name other benches.",
        )
    return drawn[:n]


def _prefix(method: str, text: str, inputs: WrapperInputs) -> WrapperResult:
    """A wrapper that puts a text in front of prompts, a blank line between them where the tokenizer knows any."""
    tokenizer = inputs.model.tokenizer
    text = f"{text.strip()}{separator(tokenizer).strip(' ')}"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    n_unknown = ids.count(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0
    body = _wrapper(inputs, method=method, rule="prefix", side="input", text=text)
    notes = [f"Of {len(ids)} tokens of the text, {n_unknown} are unknown to the model."] if n_unknown else []
    return WrapperResult(body, notes=notes)


def _wrapper(inputs: WrapperInputs, **fields: Any) -> Wrapper:
    """The artifact's body: nothing is refused but by what the fields say."""
    nothing: dict[str, Any] = {"text": "", "keywords": [], "layer": None, "threshold": 0.0, "refusal": "", "rates": []}
    return Wrapper(
        **(nothing | fields),
        special_ids=list(special_ids(inputs.model.tokenizer)),
        bos=inputs.model.bos,
        forget=list(inputs.forget_names),
        retain=list(inputs.retain_names),
    )


def make_input_filter(inputs: WrapperInputs, settings: InputFilter) -> WrapperResult:
    """Refuse prompts by keywords or by a linear classifier (2403.03329); the threshold holds for prompts like retain
    text."""
    return _filter(inputs, settings, method="input-filter", side="input")


def make_output_filter(inputs: WrapperInputs, settings: OutputFilter) -> WrapperResult:
    """Refuse answers by keywords or by a linear classifier (2403.03329); the threshold is set on retain text as it is,
    without a question in front."""
    return _filter(inputs, settings, method="output-filter", side="output")


def _filter(inputs: WrapperInputs, settings: Filter, *, method: str, side: Literal["input", "output"]) -> WrapperResult:
    """A filter with its threshold, and its rates on text that it has not seen."""
    if settings.rule == "classifier":
        n_layers = len(decoder_layers(inputs.model.model))
        layer = n_layers // 2 if settings.layer is None else settings.layer
        body = _wrapper(inputs, method=method, rule="classifier", side=side, layer=layer, refusal=settings.refusal)
        tensors, n_tokens = _fit(inputs, layer, settings.ridge)
    else:
        keywords = _keywords(inputs, settings)
        body = _wrapper(inputs, method=method, rule="keywords", side=side, keywords=keywords, refusal=settings.refusal)
        tensors, n_tokens = None, 0
    module = wrapper_from_artifact(body, tensors or {}, where="The new filter")
    calibration = _statistics(module, inputs, inputs.retain, "calibrate")
    retain, forget = (_statistics(module, inputs, corpora, "fresh") for corpora in (inputs.retain, inputs.forget))
    try:
        threshold = threshold_of([(piece.corpus, value) for piece, value in calibration], settings.alpha, is_each=True)
    except DsgError as error:
        raise DsgError(error.message, "Give more retain text, or a larger alpha of the method.") from error
    rates = [*_rates(retain, threshold, is_forget=False), *_rates(forget, threshold, is_forget=True)]
    n_tokens += sum(len(piece.ids) for piece, _ in (*calibration, *retain, *forget))
    refuses_any = any(rate["rate"] for rate in rates if rate["is_forget"])
    notes = [] if refuses_any else ["The filter refuses none of the fresh forget text."]
    return WrapperResult(body.replace(threshold=threshold, rates=rates), tensors, n_tokens, notes)


def fit_classifier(forget_ND: Tensor, retain_ND: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Weight [D] and bias [] of a logistic regression of forget against retain text, a row each text, float32.

    Both classes count alike. Dimensions are standardised for the penalty, whose strength is 1 / ridge; that is folded
    into what is returned.
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
    model = LogisticRegression(C=ridge, class_weight="balanced", max_iter=MAX_FIT_STEPS)
    model.fit(((x_ND - mean_D) * scale_D).numpy(), labels)
    weight_D = torch.from_numpy(model.coef_[0]).double() * scale_D
    bias = float(model.intercept_[0]) - float(weight_D @ mean_D)
    return weight_D.float(), torch.tensor(bias, dtype=torch.float32)


def _fit(inputs: WrapperInputs, layer: int, ridge: float) -> tuple[dict[str, Tensor], int]:
    """The classifier's tensors, and how many tokens were read for it."""
    pieces = {role: _pieces(inputs, getattr(inputs, role), "select") for role in ("forget", "retain")}
    means, model = {}, inputs.model
    for role, of_role in pieces.items():
        rows, job = [piece.ids for piece in of_role], inputs.job.named(f"select pieces of {role} text")
        means[role] = mean_residuals(
            model.model, model.tokenizer, rows, layer=layer, batch_size=model.batch_size, job=job
        )
    weight_D, bias = fit_classifier(means["forget"], means["retain"], ridge)
    n_tokens = sum(len(piece.ids) for of_role in pieces.values() for piece in of_role)
    return {"weight": weight_D, "bias": bias}, n_tokens


def _keywords(inputs: WrapperInputs, settings: Filter) -> list[str]:
    if settings.keywords_file is not None:
        return read_keywords(settings.keywords_file)
    forget, retain = (
        (text for corpus in corpora for text in corpus.part("select")) for corpora in (inputs.forget, inputs.retain)
    )
    return telling_words(forget, retain, settings.n_keywords)


def _pieces(inputs: WrapperInputs, corpora: Sequence[Corpus], part: Part) -> list[Piece]:
    options: Json = {"lengths": inputs.lengths, "at_most": inputs.max_pieces, "seed": inputs.seed}
    return draw_pieces(inputs.model.tokenizer, corpora, part, bos=inputs.model.bos, **options)


def _statistics(
    module: WrapperModule, inputs: WrapperInputs, corpora: Sequence[Corpus], part: Part
) -> list[tuple[Piece, float]]:
    pieces = _pieces(inputs, corpora, part)
    job = Job(progress=inputs.job.progress, name=f"{part} pieces")
    values = inputs.model.filter_statistics(module, [piece.ids for piece in pieces], job)
    if not all(map(math.isfinite, values)):
        raise DsgError("On a piece of text an activation is not finite.", "Check the weights, or try --dtype float32.")
    return list(zip(pieces, values, strict=True))


def _rates(statistics: Sequence[tuple[Piece, float]], threshold: float, *, is_forget: bool) -> list[Json]:
    of_corpus: dict[str, list[float]] = {}
    for piece, value in statistics:
        of_corpus.setdefault(piece.corpus, []).append(value)
    rates = {name: rate_above(threshold, values) for name, values in of_corpus.items()}
    return [{"what": name, "is_forget": is_forget, **rate} for name, rate in rates.items()]
