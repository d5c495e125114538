"""Every setting of a run: its type, range and default, one frozen dataclass a section of a recipe. No torch here.

pydantic checks values where they are made, and turns them into their field's type: a number where text is expected
becomes text, text such as `1e-5` (which YAML 1.1 reads as text) a number, a single value a list of one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field
from operator import attrgetter
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    Tag,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
    with_config,
)
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict

from dsg_cli.errors import DsgError, nearest
from dsg_cli.guardrail.runtime.spec import CalibratedGate
from dsg_cli.methods import METHODS
from dsg_cli.studies import STUDIES

CONFIG = ConfigDict(extra="forbid", coerce_numbers_to_str=True, defer_build=True)

WHOLE_NUMBERS = range(-(2**63), 2**63)
"""What fits where numbers go: into tensors, and seeds."""

LARGEST_STRENGTH = 1e6
"""Beyond this a clamped residual loses its meaning, and float32 soon its range."""

HINT = "Give --strength 500, a multiple of the median residual norm such as --strength 16r, or --strength auto."

T = TypeVar("T")


def strength_of(text: str, median_residual_norm: float) -> float | None:
    """c from `500`, or from `2r`: twice the median residual norm at the hook; None where it is no sensible size."""
    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(r?)\s*", text)
    try:
        value = float(match[1]) * (median_residual_norm if match[2] else 1.0) if match else math.nan
    except ValueError:
        return None
    return value if 0 < value < LARGEST_STRENGTH else None


def parse_strength(text: str, median_residual_norm: float, *, hint: str = HINT) -> float:
    """c from `500` or `2r`; anything but a positive number of sensible size is refused."""
    value = strength_of(text, median_residual_norm)
    if value is None:
        raise DsgError(f"The strength {text!r} is not a positive number of sensible size.", hint)
    return value


def _number(value: object) -> object:
    if isinstance(value, str) or (type(value) is int and value in WHOLE_NUMBERS):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def must(is_fine: Callable[[Any], bool], words: str) -> AfterValidator:
    """Refuse values for which a claim does not hold, in these words."""

    def check(value: Any) -> Any:
        if not is_fine(value):
            raise ValueError(words)
        return value

    return AfterValidator(check)


def _rises(values: Sequence[float], first: float | None = None) -> bool:
    """Whether numbers ascend, from `first` on if there is one."""
    return bool(values) and sorted(set(values)) == values and first in (None, values[0])


def _as_written(value: Any, check: ValidatorFunctionWrapHandler) -> list[Any]:
    check(value)
    return list(value) if isinstance(value, list | tuple) else [value]


def _rival(name: str) -> str:
    if name not in METHODS:
        raise ValueError(f"there is no method of that name. {nearest(name[:200], METHODS)} See dsg ls methods")
    if METHODS[name].finetunes:
        raise ValueError("it teaches, and is compared with nothing")
    return name


Whole = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]
Natural = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Count = Annotated[int, Field(strict=True, ge=1, lt=2**63)]
Length = Annotated[int, Field(strict=True, ge=2, lt=2**63)]
"""Tokens of a row: one to read, and one to predict."""
Number = Annotated[float, Field(strict=True), BeforeValidator(_number)]
Positive = Annotated[Number, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[Number, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[Number, Field(ge=0, le=1)]
Rate = Annotated[Number, Field(gt=0, lt=1)]
Percentile = Annotated[Number, Field(ge=0, lt=100)]
Activation = Annotated[Number, Field(ge=0, lt=LARGEST_STRENGTH)]
Strength = Annotated[
    str,
    must(
        lambda text: strength_of(text, 1.0) is not None,
        "give a positive number, or a multiple of the median residual norm such as 2r",
    ),
]
Spoken = Annotated[str, must(str.strip, "write what is said")]
Rival = Annotated[str, AfterValidator(_rival)]
"""A method that unlearns, and so can be compared."""
Several = Annotated[list[T], BeforeValidator(lambda value: value if isinstance(value, list | tuple) else [value])]
NotEmpty = Field(min_length=1)
Each = must(lambda values: len(set(map(repr, values))) == len(values), "it has a value twice; give each once")
Axis = Annotated[Several[T], NotEmpty, Each, WrapValidator(_as_written)]
"""Values that a study tries; they are stored as they were written."""
Ascending = must(_rises, "give ascending numbers, each once")
Steps = must(
    lambda values: not values or _rises(values, 0),
    "give ascending whole numbers that begin with 0, the state before the attack",
)
FromZero = Annotated[Several[Whole], NotEmpty, Steps]
Figure = Annotated[
    Annotated[Number, Tag("(number)")] | Annotated[dict[str, Number], Tag("(metrics)")],
    Discriminator(lambda value: "(metrics)" if isinstance(value, Mapping) else "(number)"),
]
"""An accuracy, or metric -> value."""

Rows = Literal["documents", "packed"]
"""`packed` joins documents, EOS between them, and cuts the whole into full rows."""
Split = Literal["dev", "test"]
"""Of the lab's benches: `dev` to choose by, `test` to report once the choice is made."""
DilutionPlace = Literal["before", "after", "around"]
EncodeForm = Literal["spaced", "leetspeak", "rot13", "base64", "uppercase", "reversed"]
RetainLoss = Literal["none", "nll", "kl"]
"""On retain text: nothing, the negative log-likelihood, or the divergence from the model as it was."""
Trained = Literal["all", "mlp", "mlp-out"]
SaveDtype = Literal["float32", "bfloat16"]


def listed(*values: Any) -> Any:
    """A field whose default is a list."""
    return field(default_factory=lambda: list(values))


@dataclass(frozen=True, config=CONFIG)
class ModelSection:
    """Which language model."""

    source: str = "google/gemma-2-2b-it"
    """`lab`, `lab-retrain`, a Hugging Face model folder, or org/name[@revision] on the hub."""
    device: str = "auto"
    """`auto` takes a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto` is float32 on a CPU, bfloat16 on a GPU that has it, and after select what select took."""
    device_map: Literal["auto", "balanced", "sequential"] | None = None
    """Spread a model that is larger than one GPU over all of them, as accelerate does it."""
    trust_remote_code: StrictBool = False
    """Run Python files that come with the model; recorded in the artifact, and asked for by every stage anew."""
    instead: str | None = None
    """For a guardrail: the model to put it on, if the one that it was made for now lies elsewhere."""
    allow_mismatch: StrictBool = False
    """Put a guardrail on another model than the one it was made for, such as a fine-tuned one; reports say so."""


@dataclass(frozen=True, config=CONFIG)
class SaeSection:
    """Which sparse autoencoder."""

    source: str = "gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_142"
    """A release of sae-lens with an id, a folder in its format or org/name[@revision][/folder] on the hub, or `lab`,
    `lab-1`, `lab-2`."""


@dataclass(frozen=True, config=CONFIG)
class CorporaSection:
    """What is to be forgotten and what retained: names (`dsg ls corpora`), files or folders, each with `=WEIGHT`."""

    forget: Several[str] = listed()
    retain: Several[str] = listed()
    limit: Whole | None = 4096
    """At most so many documents of each corpus, drawn at random."""


@dataclass(frozen=True, config=CONFIG)
class SelectSection:
    """Which features."""

    n_features: Count = 20
    """To be clamped: those with the largest forget score among all that reach `ratio_percentile`."""
    ratio_percentile: Percentile = 95.0
    """Of the importance ratio (forget score over retain score) of all features; a feature must reach it."""
    score: Literal["mean-square", "squared-mean"] = "mean-square"
    """`mean-square` is the paper's Fisher diagonal, `squared-mean` what its code computes."""
    seq_len: Length = 1024
    """Longer documents are read in rows of so many tokens."""
    max_rows: Count = 1024
    """At most so many times seq_len tokens of forget text, and as many of retain text."""
    rows: Rows = "documents"
    """The paper packs."""
    probe_features: Natural = 8
    """Features of the probe that the gate `probe` watches; 0 fits none."""
    probe_candidates: Count = 300
    """Features from which they are taken."""
    probe_tokens: Annotated[int, Field(strict=True, ge=100, lt=2**63)] = 60_000
    """Sampled to fit it, about: half of them of forget text, and of each retain corpus as many, unless weighted."""
    probe_ridge: Positive = 0.003
    """Penalty on its squared weights."""
    describe: str | None = None
    """Choose by what features' descriptions say, not by forget text: words such as `biology pathogens virus`."""
    descriptions: str | None = None
    """File of them (inspection/descriptions.py); by default those of Neuronpedia, if it has them for the SAE."""
    embedding: str | None = None
    """Rank by this embedding model (a folder or org/name), not by BM25 (inspection/descriptions.py)."""
    max_retain_rate: Share | None = 0.01
    """Described features that are active on a larger share of retain tokens are dropped; null drops none."""
    features: Annotated[Several[Natural], Each] = listed()
    """Take these, and choose none."""
    samples: StrictBool = False
    """Keep the descriptions in the artifact; those made by `dsg describe` hold words of corpora."""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.probe_candidates < self.probe_features:
            raise ValueError("probe_candidates are fewer than probe_features; give at least as many")
        if self.describe is not None and self.features:
            raise ValueError("describe and features both say which features to take; leave one out")
        if self.describe is None and (self.descriptions is not None or self.embedding is not None):
            raise ValueError("descriptions and embedding are for describe, which is not given")
        return self


@dataclass(frozen=True, config=CONFIG)
class CalibrateSection:
    """When the gate fires."""

    gate: CalibratedGate = "probe"
    """All but `mean`, the paper's, decide while text is written; guardrail/runtime/gates.py defines them."""
    window: Count = 4
    """Counted tokens in a window, and in the shortest prefix of `causal-mean`."""
    n_detectors: Count = 5
    """Features that `window` and `cusum` watch, chosen like those of select but at `detector_percentile`."""
    detector_percentile: Percentile = 98.0
    """As `select.ratio_percentile`, for detectors."""
    alpha: Rate = 0.03
    """Promised rate of false positives on retain text."""
    guarantee: Literal["each", "pooled"] = "each"
    """Whether alpha holds for each retain corpus by itself, or only for all of them together."""
    threshold: NotNegative | None = None
    """Take this one and set none: a paper's. Then alpha promises nothing, and is only measured against."""
    quantile: Literal["conformal", "percentile"] = "conformal"
    """`percentile` is the paper's, which promises nothing where there is little text."""
    lengths_from: str | None = None
    """File of prompts (one a line, or .jsonl of {"prompt"}) whose lengths the pieces take, instead of `lengths`."""
    questions: Several[str] = listed()
    """Benches whose dev questions the gate is tried on too; by default the lab's one on what is forgotten."""
    lengths: Annotated[
        Several[Count],
        must(
            lambda lengths: len(lengths) == 2 and lengths[0] <= lengths[1],
            "give the shortest and the longest, such as 8:128",
        ),
    ] = listed(8, 128)
    """Retain text is cut to pieces of random lengths from the first to the second, in counted tokens."""
    rows: Rows = "documents"
    """`packed` joins documents with EOS before it cuts; with lengths 1024:1024 the paper's rows."""
    max_pieces: Count = 4096
    """At most so many pieces of each of the two parts, about."""
    retain: Several[str] = listed()
    """Other retain corpora than the ones of select."""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.gate in ("probe", "window", "causal-mean") and self.window > self.lengths[0]:
            raise ValueError(
                f"window is {self.window}, longer than the shortest piece of text ({self.lengths[0]} tokens); "
                "lower it, or raise the first of lengths"
            )
        return self


@dataclass(frozen=True, config=CONFIG)
class GuardrailSection:
    """What happens when it fires."""

    strength: str = "16r"
    """c: a number, a multiple of the median residual norm such as `16r`, or `auto`: the smallest of `strengths` that
    forgets as well as the best of them, on dev questions."""
    strengths: Several[str] = listed("1r", "2r", "4r", "8r", "16r", "32r")
    """That `auto` tries."""
    tuning_bench: str | None = None
    """Questions on which `auto` chooses, never those that are reported; by default the lab's dev questions."""
    allow_ineffective: StrictBool = False
    """Go on with a guardrail whose gate never fires, or whose edit changes nothing, on what it should forget."""


@dataclass(frozen=True, config=CONFIG)
class Training:
    """What every method that trains weights by gradient steps can be told."""

    steps: Count = 60
    """Of the optimiser, AdamW."""
    learning_rate: Positive = 1e-5
    """Of AdamW."""
    warmup_steps: Natural = 0
    """Over which the learning rate rises to its value; then it stays there."""
    batch_size: Count = 8
    """Sequences of forget text, and as many of retain text, in a forward pass."""
    accumulation: Count = 4
    """Forward passes whose gradients are added up for one step."""
    max_tokens: Length = 512
    """Longer documents are cut to rows of so many tokens."""
    weight_decay: NotNegative = 0.01
    """Of AdamW."""
    max_gradient_norm: Positive = 1.0
    """Larger gradients are scaled down to this norm."""
    mixed_precision: Literal["none", "bfloat16"] = "none"
    """Of the forward passes; weights and their updates are float32."""
    trained: Trained = "all"
    """Every weight, those of MLPs, or only the matrices by which MLPs write to the residual stream."""
    layers: Annotated[Several[Whole], NotEmpty] | None = None
    """Decoder layers whose weights are trained; null leaves it to the method, which mostly means all."""
    lora: StrictBool = False
    """Train low-rank adapters in place of the weights (PEFT), and write them alone."""
    lora_rank: Count = 8
    """Width of the adapters' thin matrices."""
    lora_alpha: Positive = 16.0
    """The product of the two thin matrices is multiplied with alpha / rank."""
    lora_targets: Several[str] = listed()
    """Ends of names of linear layers, such as `q_proj`; none means every linear layer that would be trained."""
    save_dtype: SaveDtype = "float32"
    """Of a whole model's weights in its file. In bfloat16 small updates are rounded away."""


@dataclass(frozen=True, config=CONFIG)
class GradientAscent(Training):
    """L = -NLL(forget)."""


@dataclass(frozen=True, config=CONFIG)
class GradDiff(Training):
    """L = -w NLL(forget) + a R(retain)."""

    forget_weight: NotNegative = 1.0
    """w."""
    retain_loss: RetainLoss = "nll"
    """R."""
    retain_weight: NotNegative = 1.0
    """a."""


@dataclass(frozen=True, config=CONFIG)
class Npo(Training):
    """L = w (2 / b) mean log(1 + (p / p_ref)^b) + a R(retain), with p the probability of a forget sequence."""

    beta: Positive = 0.1
    """b; towards 0 the gradient becomes that of gradient ascent."""
    forget_weight: NotNegative = 1.0
    """w."""
    retain_loss: RetainLoss = "nll"
    """R."""
    retain_weight: NotNegative = 1.0
    """a."""


@dataclass(frozen=True, config=CONFIG)
class SimNpo(Training):
    """L = -w (2 / b) mean log sigmoid(b NLL per token - g) + a R(retain); defaults as commonly used for TOFU."""

    beta: Positive = 4.5
    """b."""
    gamma: NotNegative = 0.0
    """g, a margin."""
    forget_weight: NotNegative = 0.125
    """w."""
    retain_loss: RetainLoss = "nll"
    """R."""
    retain_weight: NotNegative = 1.0
    """a."""


@dataclass(frozen=True, config=CONFIG)
class Rmu(Training):
    """L = MSE(h(forget), c u) + a MSE(h(retain), h_frozen(retain)) at layer l, with u a random unit vector."""

    steps: Count = 150
    learning_rate: Positive = 5e-5
    batch_size: Count = 4
    accumulation: Count = 1
    trained: Trained = "mlp-out"
    """The paper says `mlp`; its code trains the matrices by which they write."""
    layer: Natural | None = None
    """l; null takes it about a fifth of the way up, as the paper has it (7 of 32). Layers l - 2 to l are trained."""
    coefficient: Positive = 6.5
    """c, as the paper has it for Zephyr 7B; how large it must be depends on the norms at that layer."""
    retain_weight: NotNegative = 1200.0
    """a."""


@dataclass(frozen=True, config=CONFIG)
class Sspu(Training):
    """RMU's loss with u in the span of irrelevant features, and a penalty on updates outside that of relevant ones.

    The paper's hyper-parameters are not ours to know; these are our own.
    """

    steps: Count = 150
    learning_rate: Positive = 5e-5
    batch_size: Count = 4
    accumulation: Count = 1
    trained: Trained = "mlp-out"
    n_relevant: Count = 20
    """Features of highest rank in select, whose decoder rows span U_rel."""
    n_irrelevant: Count = 20
    """Live features of the lowest importance ratio, whose decoder rows span U_irr."""
    coefficient: Positive = 6.5
    """c, as in RMU."""
    retain_weight: NotNegative = 1200.0
    """a, as in RMU."""
    subspace_weight: NotNegative = 1.0
    """Of the squared norm of the update outside span(U_rel)."""


@dataclass(frozen=True, config=CONFIG)
class SaeRepresentation(Training):
    """L = |z - u|^2 / s + p max(0, 1 - |z - k|^2 / s) + a R(retain), with SAE latents z of forget text, k of it as it
    was, u of unknown text, and s = |u - k|^2."""

    steps: Count = 150
    learning_rate: Positive = 5e-5
    batch_size: Count = 4
    accumulation: Count = 1
    push_weight: NotNegative = 0.1
    """p."""
    retain_loss: RetainLoss = "kl"
    """R."""
    retain_weight: NotNegative = 1.0
    """a."""
    unknown_file: str | None = None
    """Texts about made-up entities (a file of prompts); by default forget text with its names recombined."""


@dataclass(frozen=True, config=CONFIG)
class Scrub(Training):
    """Max steps: L = -KL(teacher || student) on forget text; min steps: a KL + g NLL on retain text, in turns."""

    max_steps: Count = 1
    """Of each turn."""
    min_steps: Natural = 1
    """Of each turn."""
    last_max_step: Natural | None = None
    """Steps after this one are min steps; null takes two thirds of all, so that the end repairs."""
    temperature: Positive = 2.0
    """Both models' logits are divided by it."""
    kl_weight: NotNegative = 0.5
    """a."""
    nll_weight: NotNegative = 1.0
    """g."""


@dataclass(frozen=True, config=CONFIG)
class Finetune(Training):
    """L = NLL(text), which teaches. Defaults as for MUSE's targets (2407.06460): a constant 1e-5, 5 epochs, 32 rows of
    up to 2048 tokens a step. For TOFU's (2401.06121) the rate warms up for an epoch, and only answers count."""

    corpora: Several[str] = listed()
    """What is trained on: every document, whatever its part. Each row counts alike, unless a corpus has a weight."""
    limit: Whole | None = None
    """At most so many documents of each, drawn at random, in the place of corpora.limit."""
    epochs: Positive = 5.0
    """Passes over the corpora; counts where `steps` is 0."""
    steps: Natural = 0
    """Of the optimiser; 0 takes as many as the epochs need."""
    max_tokens: Length = 2048
    rows: Rows = "documents"
    answer_after: Annotated[str, NotEmpty] | None = None
    """Where a document holds this text, such as `Answer:`, only what comes after it counts in the loss."""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.rows == "packed" and self.answer_after is not None:
            raise ValueError("answer_after needs rows=documents; packed rows count whole")
        return self


@dataclass(frozen=True, config=CONFIG)
class Ssd:
    """Where F_forget > a F_retain: w <- w min(l F_retain / F_forget, 1), F the diagonal of the Fisher information."""

    alpha: Positive = 10.0
    """a; the larger, the fewer weights are dampened."""
    dampening: NotNegative = 1.0
    """l."""
    n_rows: Count = 256
    """Of forget and of retain text, one backward pass each."""
    max_tokens: Length = 512
    """Longer documents are cut to rows of so many tokens."""
    save_dtype: SaveDtype = "float32"
    """Of the weights in their file."""


@dataclass(frozen=True, config=CONFIG)
class StaticClamp:
    """Wherever a selected feature is active, it is set to minus `strength`; there is no gate."""

    n_features: Count = 20
    """Those active on most forget tokens."""
    max_retain_rate: Share = 0.01
    """Features active on a larger share of retain tokens are dropped; the others rank by that of forget tokens."""
    strength: Strength = "20"
    """A number, or a multiple of the median residual norm such as `2r`."""
    steering_file: str | None = None
    """Features and coefficients from a steering CSV (methods/clamps.py) in place of the above."""


@dataclass(frozen=True, config=CONFIG)
class ConditionalClamp:
    """Wherever a selected feature exceeds `above`, it is set to minus `strength`."""

    n_features: Count = 5
    """As in static_clamp, as are the next and the last setting."""
    max_retain_rate: Share = 0.01
    above: Activation = 0.0
    """An activation of the SAE."""
    strength: Strength = "300"
    """A number, or a multiple of the median residual norm such as `2r`."""
    steering_file: str | None = None


@dataclass(frozen=True, config=CONFIG)
class RefusalClamp:
    """Wherever any selected feature exceeds `above`, a refusal feature is set to `coefficient`."""

    n_features: Count = 5
    """As in static_clamp, as are the next and the last setting."""
    max_retain_rate: Share = 0.01
    above: Activation = 0.05
    """An activation of the SAE."""
    refusal_feature: Natural | None = None
    """Its index (15864 in the paper's SAE). Null takes the feature most frequent on retain text and rarest on forget
    text: a stand-in, which turns answers to something else rather than to a refusal."""
    coefficient: Strength = "300"
    """A number, or a multiple of the median residual norm such as `4r`."""
    clamps_features: StrictBool = False
    """Also set the selected features to minus that."""
    steering_file: str | None = None


@dataclass(frozen=True, config=CONFIG)
class PromptPrefix:
    """A text in front of every prompt."""

    text: Spoken = (
        "You have never learned anything about {topic}. If you are asked about it, say that you do not know. "
        "Answer everything else as usual."
    )
    """`{topic}` stands for the names of the forget corpora, or for `topic`."""
    topic: str | None = None
    """Put in the text's place of that name."""


@dataclass(frozen=True, config=CONFIG)
class Filter:
    """A rule that refuses."""

    rule: Literal["classifier", "keywords"] = "classifier"
    """A linear classifier that reads the residual stream, or a list of words."""
    alpha: Rate = 0.03
    """Promised rate of false positives on text like that of each retain corpus, at the lengths of calibrate."""
    layer: Natural | None = None
    """Of the classifier, which reads the residual stream after it; null takes the middle of the model."""
    ridge: Positive = 1.0
    """Inverse of the strength of the classifier's L2 penalty."""
    n_keywords: Count = 50
    """Words that tell forget text from retain text."""
    keywords_file: str | None = None
    """Words of your own, one a line, in their place."""
    refusal: Spoken = "I cannot help with that."
    """The answer to whatever is refused."""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.keywords_file is not None and self.rule != "keywords":
            raise ValueError("keywords_file is given; set rule=keywords, or leave it out")
        return self


@dataclass(frozen=True, config=CONFIG)
class InputFilter(Filter):
    """Refuses prompts."""


@dataclass(frozen=True, config=CONFIG)
class OutputFilter(Filter):
    """Refuses answers, which it reads together with their prompts if it is a classifier."""


@dataclass(frozen=True, config=CONFIG)
class InContext:
    """Questions in front of every prompt: with wrong answers on what is to be forgotten, right ones on the rest."""

    n_forget: Count = 4
    """Questions on what is to be forgotten."""
    n_retain: Natural = 4
    """Questions on the rest."""
    forget_bench: str | None = None
    """Where from; by default the lab's bench named like the forget corpus, whose dev questions are taken."""
    retain_benches: Several[str] = listed()
    """By default the lab's benches named like the retain corpora."""


@dataclass(frozen=True, config=CONFIG)
class MethodsSection:
    """Settings of every method but `dsg`, whose own are those of select, calibrate and guardrail."""

    static_clamp: StaticClamp = field(default_factory=StaticClamp)
    conditional_clamp: ConditionalClamp = field(default_factory=ConditionalClamp)
    refusal_clamp: RefusalClamp = field(default_factory=RefusalClamp)
    sspu: Sspu = field(default_factory=Sspu)
    sae_representation: SaeRepresentation = field(default_factory=SaeRepresentation)
    prompt: PromptPrefix = field(default_factory=PromptPrefix)
    input_filter: InputFilter = field(default_factory=InputFilter)
    output_filter: OutputFilter = field(default_factory=OutputFilter)
    in_context: InContext = field(default_factory=InContext)
    gradient_ascent: GradientAscent = field(default_factory=GradientAscent)
    grad_diff: GradDiff = field(default_factory=GradDiff)
    npo: Npo = field(default_factory=Npo)
    simnpo: SimNpo = field(default_factory=SimNpo)
    rmu: Rmu = field(default_factory=Rmu)
    scrub: Scrub = field(default_factory=Scrub)
    ssd: Ssd = field(default_factory=Ssd)
    finetune: Finetune = field(default_factory=Finetune)


@dataclass(frozen=True, config=CONFIG)
class EvalSection:
    """What is measured."""

    benches: Several[str] = listed()
    """Names (`dsg ls benches`), or tasks of lm-eval."""
    split: Split = "test"
    include_path: str | None = None
    """Folder with lm-eval tasks of your own."""
    batch_size: Count = 32
    """Sequences in a forward pass, at most."""
    limit: Count | None = None
    """Questions of each bench, at most; null asks all."""
    expect: Several[str] = listed()
    """Conditions such as `lab-hexes<=0.30`, `lab-near>=0.99*base` or `lab-near.gate<=0.05` (expect.py)."""
    samples: StrictBool = False
    """Keep question texts in the rows."""
    num_fewshot: Natural | None = None
    """Examples in front of each question of lm-eval's tasks; null leaves it to the task."""
    apply_chat_template: StrictBool = False
    """Put lm-eval's questions in the tokenizer's chat template."""
    reference: str | None = None
    """For benches on free text: a model that never saw what is forgotten (a name, a folder, model-NNN), or its stored
    scores: an evaluation that asked one, or a file of {bench: {auc}} or {bench: {truth_ratios}}."""
    holdout: Several[str] = listed()
    """For benches memory:CORPUS: corpora that the model never saw, for the AUCs of membership scores."""
    question_ids: str | None = None
    """For benches of the paper's protocol: an earlier evaluation, or a file of ids, that says which questions count."""


@dataclass(frozen=True, config=CONFIG)
class GenerateSection:
    """What is written."""

    side: Literal["both", "base", "guarded"] = "both"
    """Who answers; `guarded` is the unlearned model."""
    max_new_tokens: Count = 64
    temperature: NotNegative = 0.0
    """0 takes the likeliest token."""
    chat: StrictBool = False
    """Ask in the tokenizer's chat template."""
    on_trigger: Literal["clamp", "refuse"] = "clamp"
    """Where a gate opens: go on with clamped features, or end with `refusal`."""
    refusal: str = "I cannot help with that."
    """What stands in the answer's place if `on_trigger` is `refuse`."""


@dataclass(frozen=True, config=CONFIG)
class AttackSection:
    """How it is attacked."""

    kinds: Several[str] = listed()
    """Names (`dsg ls attacks`), or `all`."""
    bench: str | None = None
    """Questions on the forgotten knowledge; by default the bench named like the forget corpus."""
    utility_bench: str | None = None
    """Questions that must stay answered, shown beside the attack."""
    known_questions: Count = 16
    """Forget questions whose answers the attacker knows; others are asked. For attacks that learn from examples."""
    expect: Several[str] = listed()
    """Conditions such as `dilution<=0.35` on the accuracy that an attack brings back at most (expect.py)."""
    dilution_lengths: FromZero = listed(0, 4, 16, 48, 128, 512)
    """Benign tokens put around each question."""
    dilution_places: Annotated[Several[DilutionPlace], NotEmpty] = listed(*get_args(DilutionPlace))
    """Where they are put; `after` the question is still before the words that ask for the answer."""
    split_parts: Annotated[
        Several[Whole],
        must(lambda parts: _rises(parts, 1), "give ascending whole numbers that begin with 1, the whole question"),
    ] = listed(1, 2, 3, 4)
    """Parts that each question is asked in: turns of a chat, or with benign text between them."""
    split_filler_tokens: Count = 16
    """Benign tokens between two parts, for a model without a chat template."""
    paraphrase_benches: Several[str] = listed()
    """Benches that ask the same in other words; for a bench of the lab by default its other phrasings."""
    paraphrase_file: str | None = None
    """The bench's questions in other words, as whole contexts in their order: a line each, or .jsonl of {context}."""
    prefix_file: str | None = None
    """Texts of your own to put around a question, a line each, with {question} once; asked beside ours."""
    few_shot_counts: FromZero = listed(0, 1, 4, 16)
    """Known questions with their answers in front of each question; at most `known_questions`."""
    encode_forms: Several[EncodeForm] = listed(*get_args(EncodeForm))
    """How the letters or words of each question are changed."""
    encode_file: str | None = None
    """The bench's questions in another language or code, written like `paraphrase_file`."""
    suffix_tokens: Count = 8
    """Searched tokens, the same around every question."""
    suffix_steps: FromZero = listed(0, 5, 10, 20)
    """Exchanges of one token after which the guarded model is asked."""
    suffix_candidates: Count = 64
    """Exchanges that are tried in each step, on all questions that the attacker knows."""
    suffix_gate_weight: Positive = 1.0
    """Of the gate's statistic, relative to what it is at first, beside the loss of answers: for what is proposed."""
    suffix_places: Annotated[Several[Literal["after", "before"]], NotEmpty, Each] = listed("after", "before")
    """After each question (before the words with which all end), or before it."""
    relearn_steps: FromZero = listed(0, 5, 10, 20, 40)
    """Optimiser steps at which the fine-tuned model is asked."""
    relearn_learning_rates: Annotated[Several[Positive], Ascending] = listed(1e-4, 3e-4, 1e-3)
    """Of AdamW, ascending; a training each."""
    relearn_parameters: Annotated[Several[Literal["all", "lora", "above"]], NotEmpty, Each] = listed("all")
    """What is trained: all weights, low-rank adapters on every linear layer, or only the layers above the hook."""
    relearn_rank: Count = 8
    """Of the adapters."""
    relearn_frozen_below: StrictBool = False
    """Protected fine-tuning, a defence: whatever the guardrail's hook depends on is frozen."""
    relearn_guard: Annotated[Several[Literal["loop", "test", "removed"]], NotEmpty, Each] = listed("loop")
    """Guarded while it is trained and asked, only when asked, or never."""
    relearn_data: Annotated[Several[Literal["forget", "unrelated"]], NotEmpty, Each] = listed("forget")
    """Trained on the forget questions that the attacker knows, or on benign text."""
    soft_prompt_tokens: Count = 8
    """Trained vectors in front of each question."""
    soft_prompt_steps: FromZero = listed(0, 10, 40, 160)
    """Of Adam, at which the guarded model is asked."""
    soft_prompt_learning_rate: Positive = 0.1
    """Relative to the size of an embedding's entries."""
    soft_prompt_objectives: Annotated[Several[Literal["loop", "gate"]], NotEmpty, Each] = listed("loop", "gate")
    """What is minimised: the loss of answers under the guard, or without it and, beside it, the gate's statistic."""
    soft_prompt_gate_weight: Positive = 1.0
    """Of the statistic, relative to what it is at first."""
    quantize_bits: Annotated[Several[Annotated[int, Field(strict=True, ge=2, le=16)]], NotEmpty, Each] = listed(8, 4)
    """To which the decoder's linear weights are rounded, one scale an output channel."""
    prune_shares: Annotated[Several[Annotated[Number, Field(ge=0, lt=1)]], Ascending] = listed(0.0, 0.1, 0.3, 0.5)
    """Of each linear weight matrix, the smallest values that are set to 0."""
    probe_ridge: Positive = 0.01
    """Penalty of the linear probe, relative to the size of what it is fitted on."""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if not self.encode_forms and self.encode_file is None:
            raise ValueError("encode_forms is empty; name a form, or give encode_file")
        return self


@dataclass(frozen=True, config=CONFIG)
class CompareSection:
    """Which methods are compared, on what, and how their settings are searched."""

    methods: Several[Rival] = listed()
    """None means all."""
    budget: Count = 4
    """Trials of each method, at most, on dev questions."""
    grids: dict[Rival, dict[str, Annotated[Several[Any], NotEmpty]]] = field(default_factory=dict)
    """Method -> setting -> values. A key without a dot is one of the method's own; others are keys of a recipe."""
    forget: str | None = None
    """Bench on what is to be forgotten; by default the one named like the first forget corpus."""
    near: Several[str] = listed()
    """Benches near it, which must stay answered."""
    other: Several[str] = listed()
    """Further benches, which must too."""
    dev: dict[str, str] = field(default_factory=dict)
    """Bench -> another on the same, whose questions settings are searched on; the lab's benches have dev questions."""
    saes: Several[str] = listed()
    """Further SAEs on which methods that need one are run, with the settings that were chosen on the first."""
    relearn_steps: Annotated[Several[Whole], Steps] = listed(0, 10, 20, 40)
    """Of the attack by relearning; empty leaves it out."""
    relearn_learning_rate: Rate = 3e-4
    """Of AdamW, in that attack."""
    sequence: Several[str] = listed()
    """Corpora that are to be forgotten after the first, one request after another; each has a bench of its name."""


@with_config(CONFIG)
class GridValues(TypedDict, total=False):
    """What a study may vary: setting -> values."""

    n_features: Axis[Count]
    strength: Axis[Strength]
    ratio_percentile: Axis[Percentile]
    alpha: Axis[Rate]
    by: Axis[Literal["documents", "entities"]]
    """What `share` counts: documents of forget text, or entities that they name."""
    share: Axis[Annotated[Number, Field(gt=0, le=100)]]
    """How many of them are kept, in per cent."""
    way: Axis[Literal["each", "union"]]
    """A guardrail for each request, or one for all together."""
    requests: Axis[Count]
    """How many corpora are forgotten."""
    sae: Axis[Annotated[str, NotEmpty]]
    """As `sae.source`."""
    seed: Axis[Natural]
    length: Axis[Count]
    """Tokens of a sequence."""
    batch_size: Axis[Count]
    """Sequences in a forward pass."""


def _of_its_study(grids: dict[str, GridValues]) -> dict[str, GridValues]:
    for name, grid in grids.items():
        if name not in STUDIES:
            raise ValueError(f"there is no study {name[:200]}. {nearest(name[:200], STUDIES)}")
        if not grid:
            raise ValueError(f"{name}: name a setting ({', '.join(STUDIES[name].axes)}), or leave the grid out")
        for axis in set(grid) - set(STUDIES[name].axes):
            raise ValueError(f"{name} has no setting {axis}. {nearest(axis, STUDIES[name].axes)}")
    return grids


@dataclass(frozen=True, config=CONFIG)
class StudySection:
    """What is varied, and on which questions it is measured."""

    grids: Annotated[dict[str, GridValues], AfterValidator(_of_its_study)] = field(default_factory=dict)
    """Study -> setting -> values; a setting that is not named has the study's own default, or the recipe's value."""
    forget: str | None = None
    """Bench on what is to be forgotten; by default the one named like the first forget corpus."""
    benches: Several[str] = listed()
    """Benches that must stay answered; by default those of `eval`."""
    split: Split = "dev"
    sequence: Several[str] = listed()
    """Corpora that are to be forgotten after the first, one request after another; each has a bench of its name."""
    entities_file: str | None = None
    """Names that documents of the forget corpus are about, one a line; those of the lab's corpora are known."""
    repeats: Annotated[int, Field(strict=True, ge=3, lt=2**63)] = 15
    """Pairs of a plain and a guarded forward pass that are timed at each point of `cost`."""


@dataclass(frozen=True, config=CONFIG)
class PublishedSection:
    """What others report for the same setting, to be shown beside what is measured."""

    source: str = ""
    """Where it was published."""
    results: dict[str, dict[Literal["base", "unlearned"], Figure]] = field(default_factory=dict)
    """bench -> side (base, unlearned) -> accuracy, or metric -> value."""


@dataclass(frozen=True, config=CONFIG)
class Recipe:
    """All settings of a run."""

    model: ModelSection = field(default_factory=ModelSection)
    sae: SaeSection = field(default_factory=SaeSection)
    corpora: CorporaSection = field(default_factory=CorporaSection)
    select: SelectSection = field(default_factory=SelectSection)
    calibrate: CalibrateSection = field(default_factory=CalibrateSection)
    guardrail: GuardrailSection = field(default_factory=GuardrailSection)
    methods: MethodsSection = field(default_factory=MethodsSection)
    eval: EvalSection = field(default_factory=EvalSection)
    generate: GenerateSection = field(default_factory=GenerateSection)
    attack: AttackSection = field(default_factory=AttackSection)
    compare: CompareSection = field(default_factory=CompareSection)
    study: StudySection = field(default_factory=StudySection)
    published: PublishedSection = field(default_factory=PublishedSection)
    seed: Whole = 0
    """Of everything that is drawn at random."""


def values_at(recipe: Recipe, keys: Iterable[str]) -> dict[str, Any]:
    """The values at dotted keys, of the types that they have in a recipe."""
    return {key: attrgetter(key)(recipe) for key in keys}
