"""Every setting of a run, its type and its default: one frozen dataclass a YAML section of a recipe. No torch here."""

from __future__ import annotations

import dataclasses
import math
import re
import reprlib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dsg_cli.errors import DsgError, nearest


@dataclass(frozen=True)
class CompareSection:
    """Which methods are compared, on what, and how their settings are searched."""

    methods: list[str] = field(default_factory=list)
    """None means all."""
    budget: int = 4
    """Trials of each method, at most, on dev questions."""
    grids: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    """Method -> setting -> values. A key without a dot is one of the method's own; others are keys of a recipe."""
    forget: str | None = None
    """Bench on what is to be forgotten; by default the one named like the first forget corpus."""
    near: list[str] = field(default_factory=list)
    """Benches near it, which must stay answered."""
    other: list[str] = field(default_factory=list)
    """Further benches, which must too."""
    dev: dict[str, str] = field(default_factory=dict)
    """Bench -> another on the same, whose questions settings are searched on; the lab's benches have dev questions."""
    saes: list[str] = field(default_factory=list)
    """Further SAEs on which methods that need one are run, with the settings that were chosen on the first."""
    relearn_steps: list[int] = field(default_factory=lambda: [0, 10, 20, 40])
    """Of the attack by relearning; empty leaves it out."""
    relearn_learning_rate: float = 3e-4
    sequence: list[str] = field(default_factory=list)
    """Corpora that are to be forgotten after the first, one request after another; each has a bench of its name."""


RetainLoss = Literal["none", "nll", "kl"]
"""On retain text: nothing, the negative log-likelihood, or the divergence from the model as it was."""


@dataclass(frozen=True)
class Training:
    """What every method that trains weights by gradient steps can be told."""

    steps: int = 60
    """Of the optimiser, AdamW."""
    learning_rate: float = 1e-5
    warmup_steps: int = 0
    """Over which the learning rate rises to its value; then it stays there."""
    batch_size: int = 8
    """Sequences of forget text, and as many of retain text, in a forward pass."""
    accumulation: int = 4
    """Forward passes whose gradients are added up for one step."""
    max_tokens: int = 512
    """Longer documents are cut to rows of so many tokens."""
    weight_decay: float = 0.01
    max_gradient_norm: float = 1.0
    mixed_precision: Literal["none", "bfloat16"] = "none"
    """Of the forward passes; weights and their updates are float32."""
    trained: Literal["all", "mlp", "mlp-out"] = "all"
    """Every weight, those of MLPs, or only the matrices by which MLPs write to the residual stream."""
    layers: list[int] | None = None
    """Decoder layers whose weights are trained; null leaves it to the method, which mostly means all."""
    lora: bool = False
    """Train low-rank adapters in place of the weights (PEFT), and write them alone."""
    lora_rank: int = 8
    lora_alpha: float = 16.0
    """The product of the two thin matrices is multiplied with alpha / rank."""
    lora_targets: list[str] = field(default_factory=list)
    """Ends of names of linear layers, such as `q_proj`; none means every linear layer that would be trained."""
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of a whole model's weights in its file. In bfloat16 small updates are rounded away."""


@dataclass(frozen=True)
class GradientAscent(Training):
    """L = -NLL(forget)."""


@dataclass(frozen=True)
class GradDiff(Training):
    """L = -w NLL(forget) + a R(retain)."""

    forget_weight: float = 1.0
    retain_loss: RetainLoss = "nll"
    retain_weight: float = 1.0


@dataclass(frozen=True)
class Npo(Training):
    """L = w (2 / b) mean log(1 + (p / p_ref)^b) + a R(retain), with p the probability of a forget sequence."""

    beta: float = 0.1
    forget_weight: float = 1.0
    retain_loss: RetainLoss = "nll"
    retain_weight: float = 1.0


@dataclass(frozen=True)
class SimNpo(Training):
    """L = -w (2 / b) mean log sigmoid(b NLL per token - g) + a R(retain); defaults as commonly used for TOFU."""

    beta: float = 4.5
    gamma: float = 0.0
    forget_weight: float = 0.125
    retain_loss: RetainLoss = "nll"
    retain_weight: float = 1.0


@dataclass(frozen=True)
class Rmu(Training):
    """L = MSE(h(forget), c u) + a MSE(h(retain), h_frozen(retain)) at layer l, with u a random unit vector."""

    steps: int = 150
    learning_rate: float = 5e-5
    batch_size: int = 4
    accumulation: int = 1
    trained: Literal["all", "mlp", "mlp-out"] = "mlp-out"
    """The paper says `mlp`; its code trains the matrices by which they write."""
    layer: int | None = None
    """l; null takes it about a fifth of the way up, as the paper has it (7 of 32). Layers l - 2 to l are trained."""
    coefficient: float = 6.5
    """c, as the paper has it for Zephyr 7B; how large it must be depends on the norms at that layer."""
    retain_weight: float = 1200.0
    """a."""


@dataclass(frozen=True)
class Sspu(Training):
    """RMU's loss with u in the span of irrelevant features, and a penalty on updates outside that of relevant ones.

    The paper's hyper-parameters are not ours to know; these are our own.
    """

    steps: int = 150
    learning_rate: float = 5e-5
    batch_size: int = 4
    accumulation: int = 1
    trained: Literal["all", "mlp", "mlp-out"] = "mlp-out"
    n_relevant: int = 20
    """Features of highest rank in select, whose decoder rows span U_rel."""
    n_irrelevant: int = 20
    """Live features of the lowest importance ratio, whose decoder rows span U_irr."""
    coefficient: float = 6.5
    retain_weight: float = 1200.0
    subspace_weight: float = 1.0
    """Of the squared norm of the update outside span(U_rel)."""


@dataclass(frozen=True)
class SaeRepresentation(Training):
    """L = |z - u|^2 / s + p max(0, 1 - |z - k|^2 / s) + a R(retain), with SAE latents z of forget text, k of it as it
    was, u of unknown text, and s = |u - k|^2."""

    steps: int = 150
    learning_rate: float = 5e-5
    batch_size: int = 4
    accumulation: int = 1
    push_weight: float = 0.1
    """p."""
    retain_loss: RetainLoss = "kl"
    retain_weight: float = 1.0
    unknown_file: str | None = None
    """Texts about made-up entities (a file of prompts); by default forget text with its names recombined."""


@dataclass(frozen=True)
class Scrub(Training):
    """Max steps: L = -KL(teacher || student) on forget text; min steps: a KL + g NLL on retain text, in turns."""

    max_steps: int = 1
    """Of each turn."""
    min_steps: int = 1
    last_max_step: int | None = None
    """Steps after this one are min steps; null takes two thirds of all, so that the end repairs."""
    temperature: float = 2.0
    kl_weight: float = 0.5
    nll_weight: float = 1.0


@dataclass(frozen=True)
class Finetune(Training):
    """L = NLL(text), which teaches. Defaults as for MUSE's targets (2407.06460): a constant 1e-5, 5 epochs, 32 rows of
    up to 2048 tokens a step. For TOFU's (2401.06121) the rate warms up for an epoch, and only answers count."""

    corpora: list[str] = field(default_factory=list)
    """What is trained on: every document, whatever its part. Each row counts alike, unless a corpus has a weight."""
    limit: int | None = None
    """At most so many documents of each, drawn at random, in the place of corpora.limit."""
    epochs: float = 5.0
    steps: int = 0
    """Of the optimiser; 0 takes as many as the epochs need."""
    max_tokens: int = 2048
    rows: Literal["documents", "packed"] = "documents"
    """`packed` joins the documents of a corpus, EOS between them, and cuts the whole into rows of max_tokens."""
    answer_after: str | None = None
    """Where a document holds this text, such as `Answer:`, only what comes after it counts in the loss."""


@dataclass(frozen=True)
class Ssd:
    """Where F_forget > a F_retain: w <- w min(l F_retain / F_forget, 1), F the diagonal of the Fisher information."""

    alpha: float = 10.0
    dampening: float = 1.0
    """l."""
    n_rows: int = 256
    """Of forget and of retain text, one backward pass each."""
    max_tokens: int = 512
    save_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class StaticClamp:
    """Wherever a selected feature is active, it is set to minus `strength`; there is no gate."""

    n_features: int = 20
    max_retain_rate: float = 0.01
    """Features active on a larger share of retain tokens are dropped; the others rank by that of forget tokens."""
    strength: str = "20"
    """A number, or a multiple of the median residual norm such as `2r`."""
    steering_file: str | None = None
    """Features and coefficients from a steering CSV (methods/steering.py) in place of the above."""


@dataclass(frozen=True)
class ConditionalClamp:
    """Wherever a selected feature exceeds `above`, it is set to minus `strength`."""

    n_features: int = 5
    max_retain_rate: float = 0.01
    above: float = 0.0
    strength: str = "300"
    steering_file: str | None = None


@dataclass(frozen=True)
class RefusalClamp:
    """Wherever any selected feature exceeds `above`, a refusal feature is set to `coefficient`."""

    n_features: int = 5
    max_retain_rate: float = 0.01
    above: float = 0.05
    refusal_feature: int | None = None
    """Its index (15864 in the paper's SAE). Null takes the feature most frequent on retain text and rarest on forget
    text: a stand-in, which turns answers to something else rather than to a refusal."""
    coefficient: str = "300"
    """A number, or a multiple of the median residual norm such as `4r`."""
    clamps_features: bool = False
    """Also set the selected features to minus that."""
    steering_file: str | None = None


@dataclass(frozen=True)
class Prompt:
    """A text in front of every prompt."""

    text: str = (
        "You have never learned anything about {topic}. If you are asked about it, say that you do not know. "
        "Answer everything else as usual."
    )
    """`{topic}` stands for the names of the forget corpora, or for `topic`."""
    topic: str | None = None


@dataclass(frozen=True)
class Filter:
    """A rule that refuses."""

    rule: Literal["classifier", "keywords"] = "classifier"
    alpha: float = 0.03
    """Promised rate of false positives on text like that of each retain corpus, at the lengths of calibrate."""
    layer: int | None = None
    """Of the classifier, which reads the residual stream after it; null takes the middle of the model."""
    ridge: float = 1.0
    """Inverse of the strength of the classifier's L2 penalty."""
    n_keywords: int = 50
    """Words that tell forget text from retain text."""
    keywords_file: str | None = None
    """Words of your own, one a line, in their place."""
    refusal: str = "I cannot help with that."


@dataclass(frozen=True)
class InputFilter(Filter):
    """Refuses prompts."""


@dataclass(frozen=True)
class OutputFilter(Filter):
    """Refuses answers, which it reads together with their prompts if it is a classifier."""


@dataclass(frozen=True)
class InContext:
    """Questions in front of every prompt: with wrong answers on what is to be forgotten, right ones on the rest."""

    n_forget: int = 4
    n_retain: int = 4
    forget_bench: str | None = None
    """Where from; by default the lab's bench named like the forget corpus, whose dev questions are taken."""
    retain_benches: list[str] = field(default_factory=list)
    """By default the lab's benches named like the retain corpora."""


@dataclass(frozen=True)
class MethodsSection:
    """Settings of every method but `dsg`, whose own are those of select, calibrate and guardrail."""

    static_clamp: StaticClamp = StaticClamp()
    conditional_clamp: ConditionalClamp = ConditionalClamp()
    refusal_clamp: RefusalClamp = RefusalClamp()
    sspu: Sspu = Sspu()
    sae_representation: SaeRepresentation = SaeRepresentation()
    prompt: Prompt = Prompt()
    input_filter: InputFilter = InputFilter()
    output_filter: OutputFilter = OutputFilter()
    in_context: InContext = InContext()
    gradient_ascent: GradientAscent = GradientAscent()
    grad_diff: GradDiff = GradDiff()
    npo: Npo = Npo()
    simnpo: SimNpo = SimNpo()
    rmu: Rmu = Rmu()
    scrub: Scrub = Scrub()
    ssd: Ssd = Ssd()
    finetune: Finetune = field(default_factory=Finetune)


WHOLE_NUMBERS = range(-(2**63), 2**63)
"""What fits where numbers go: into tensors, and seeds."""


def build_section(cls: type[Any], data: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    """A dataclass from a mapping, nested sections included; what is wrong is appended to `problems`.

    Args:
        cls: The dataclass.
        data: Keys and values as YAML or the command line gave them.
        prefix: Of the keys' dotted names, for messages.
        problems: One sentence a problem.
    """
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in data.items():
        name = f"{prefix}{key}" if isinstance(key, str) else f"{prefix}{shown(key)}"
        if key not in hints:
            problems.append(f"unknown key {name[:200]}. {nearest(name.removeprefix(prefix)[:200], hints)}")
        elif dataclasses.is_dataclass(hints[key]):
            if isinstance(value, Mapping):
                values[key] = build_section(typing.cast(type, hints[key]), value, f"{name}.", problems)
            else:
                problems.append(f"{name} must be a section (key: value), not {shown(value)}.")
        else:
            found = _convert(hints[key], value)
            if found is _WRONG:
                problems.append(f"{name} must be {_describe(hints[key])}, not {shown(value)}.")
            else:
                values[key] = found
    required = [field.name for field in dataclasses.fields(cls) if _is_required(field)]
    problems += [f"{prefix}{name} is missing." for name in required if name not in data]
    return cls(**values) if all(name in values for name in required) else None


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


_WRONG = object()


def _convert(hint: Any, value: Any) -> Any:
    """The value as its field's type, or `_WRONG`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return next((v for v in (_convert(a, value) for a in arguments) if v is not _WRONG), _WRONG)
    if origin is Literal:
        return value if value in arguments else _WRONG
    if origin is list:
        items = [_convert(arguments[0], item) for item in (value if isinstance(value, list | tuple) else [value])]
        return _WRONG if any(item is _WRONG for item in items) else items
    if origin is dict:
        if not isinstance(value, Mapping):
            return _WRONG
        inner = {_convert(str, key): _convert(arguments[1], item) for key, item in value.items()}
        return _WRONG if any(item is _WRONG for item in (*inner, *inner.values())) else inner
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        problems: list[str] = []
        made = build_section(hint, value, "", problems) if isinstance(value, Mapping) else None  # type: ignore[arg-type]
        return _WRONG if problems or made is None else made
    if isinstance(value, int) and value not in WHOLE_NUMBERS:
        return _WRONG
    if hint is types.NoneType:
        return None if value is None else _WRONG
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads 1e-5, without a dot, as text.
        try:
            return float(value)
        except ValueError:
            return _WRONG
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value if type(value) is hint else _WRONG


def shown(value: Any) -> str:
    """A value for a message, shortened; of a number with thousands of digits, that it is one."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 3, 200, 200
    try:
        return short.repr(value)
    except ValueError:
        return "a number with too many digits"


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or dataclasses.is_dataclass(hint) or (origin is dict and arguments[1] is Any):
        return "a mapping"
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is list:
        return f"a list of {_describe(arguments[0])}"
    if origin is dict:
        return f"a mapping of names to {_describe(arguments[1])}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(argument) for argument in arguments)
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}[hint]


@dataclass(frozen=True)
class StudySection:
    """What is varied, and on which questions it is measured."""

    grids: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    """Study -> setting -> values; a setting that is not named has the study's own default, or the recipe's value."""
    forget: str | None = None
    """Bench on what is to be forgotten; by default the one named like the first forget corpus."""
    benches: list[str] = field(default_factory=list)
    """Benches that must stay answered; by default those of `eval`."""
    split: Literal["dev", "test"] = "dev"
    """Of the lab's benches: `dev` to choose by, `test` to report once the choice is made."""
    sequence: list[str] = field(default_factory=list)
    """Corpora that are to be forgotten after the first, one request after another; each has a bench of its name."""
    entities_file: str | None = None
    """Names that documents of the forget corpus are about, one a line; those of the lab's corpora are known."""
    repeats: int = 15
    """Pairs of a plain and a guarded forward pass that are timed at each point of `cost`."""


@dataclass(frozen=True)
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
    trust_remote_code: bool = False
    """Run Python files that come with the model; recorded in the artifact, and asked for by every stage anew."""
    instead: str | None = None
    """For a guardrail: the model to put it on, if the one that it was made for now lies elsewhere."""
    allow_mismatch: bool = False
    """Put a guardrail on another model than the one it was made for, such as a fine-tuned one; reports say so."""


@dataclass(frozen=True)
class SaeSection:
    """Which sparse autoencoder."""

    source: str = "gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_142"
    """A release of sae-lens with an id, a folder in its format or org/name[@revision][/folder] on the hub, or `lab`,
    `lab-1`, `lab-2`."""


@dataclass(frozen=True)
class CorporaSection:
    """What is to be forgotten and what retained: names (`dsg ls corpora`), files or folders, each with `=WEIGHT`."""

    forget: list[str] = field(default_factory=list)
    retain: list[str] = field(default_factory=list)
    limit: int | None = 4096
    """At most so many documents of each corpus, drawn at random."""


@dataclass(frozen=True)
class SelectSection:
    """Which features."""

    n_features: int = 20
    ratio_percentile: float = 95.0
    score: Literal["mean-square", "squared-mean"] = "mean-square"
    """`mean-square` is the paper's Fisher diagonal, `squared-mean` what its code computes."""
    seq_len: int = 1024
    """Longer documents are read in rows of so many tokens."""
    max_rows: int = 1024
    """At most so many times seq_len tokens of forget text, and as many of retain text."""
    rows: Literal["documents", "packed"] = "documents"
    """`packed` joins documents with EOS and cuts them into full rows, as the paper does."""
    probe_features: int = 8
    """Features of the probe that the gate `probe` watches; 0 fits none."""
    probe_candidates: int = 300
    """Features from which they are taken."""
    probe_tokens: int = 60_000
    """Sampled to fit it, about: half of them of forget text, and of each retain corpus as many, unless weighted."""
    probe_ridge: float = 0.003
    """Penalty on its squared weights."""
    describe: str | None = None
    """Choose by what features' descriptions say, not by forget text: words such as `biology pathogens virus`."""
    descriptions: str | None = None
    """File of them (descriptions.py); by default those of Neuronpedia, if it has them for the SAE."""
    embedding: str | None = None
    """Rank by this embedding model (a folder or org/name), not by BM25 (ranking.py)."""
    max_retain_rate: float | None = 0.01
    """Described features that are active on a larger share of retain tokens are dropped; null drops none."""
    features: list[int] = field(default_factory=list)
    """Take these, and choose none."""
    samples: bool = False
    """Keep the descriptions in the artifact; those made by `dsg describe` hold words of corpora."""


@dataclass(frozen=True)
class CalibrateSection:
    """When the gate fires."""

    gate: Literal["probe", "window", "cusum", "causal-mean", "mean"] = "probe"
    """All but `mean`, the paper's, decide while text is written; `dsg_cli/runtime/gates.py` defines them."""
    window: int = 4
    """Counted tokens in a window, and in the shortest prefix of `causal-mean`."""
    n_detectors: int = 5
    """Features that `window` and `cusum` watch, chosen like those of select but at `detector_percentile`."""
    detector_percentile: float = 98.0
    alpha: float = 0.03
    """Promised rate of false positives on retain text."""
    guarantee: Literal["each", "pooled"] = "each"
    """Whether alpha holds for each retain corpus by itself, or only for all of them together."""
    threshold: float | None = None
    """Take this one and set none: a paper's. Then alpha promises nothing, and is only measured against."""
    quantile: Literal["conformal", "percentile"] = "conformal"
    """`percentile` is the paper's, which promises nothing where there is little text."""
    lengths_from: str | None = None
    """File of prompts (one a line, or .jsonl of {"prompt"}) whose lengths the pieces take, instead of `lengths`."""
    questions: list[str] = field(default_factory=list)
    """Benches whose dev questions the gate is tried on too; by default the lab's one on what is forgotten."""
    lengths: list[int] = field(default_factory=lambda: [8, 128])
    """Retain text is cut to pieces of random lengths from the first to the second, in counted tokens."""
    rows: Literal["documents", "packed"] = "documents"
    """`packed` joins documents with EOS before it cuts; with lengths 1024:1024 the paper's rows."""
    max_pieces: int = 4096
    """At most so many pieces of each of the two parts, about."""
    retain: list[str] = field(default_factory=list)
    """Other retain corpora than the ones of select."""


@dataclass(frozen=True)
class GuardrailSection:
    """What happens when it fires."""

    strength: str = "16r"
    """c: a number, a multiple of the median residual norm such as `16r`, or `auto`: the smallest of `strengths` that
    forgets as well as the best of them, on dev questions."""
    strengths: list[str] = field(default_factory=lambda: ["1r", "2r", "4r", "8r", "16r", "32r"])
    tuning_bench: str | None = None
    """Questions on which `auto` chooses, never those that are reported; by default the lab's dev questions."""
    allow_ineffective: bool = False
    """Go on with a guardrail whose gate never fires, or whose edit changes nothing, on what it should forget."""


@dataclass(frozen=True)
class EvalSection:
    """What is measured."""

    benches: list[str] = field(default_factory=list)
    split: Literal["dev", "test"] = "test"
    """Of the lab's benches."""
    include_path: str | None = None
    """Folder with lm-eval tasks of your own."""
    batch_size: int = 32
    limit: int | None = None
    expect: list[str] = field(default_factory=list)
    """Conditions such as `lab-hexes<=0.30`, `lab-near>=0.99*base` or `lab-near.gate<=0.05` (expect.py)."""
    samples: bool = False
    """Keep question texts in the rows."""
    num_fewshot: int | None = None
    """Examples in front of each question of lm-eval's tasks; null leaves it to the task."""
    apply_chat_template: bool = False
    """Put lm-eval's questions in the tokenizer's chat template."""
    reference: str | None = None
    """For benches on free text: a model that never saw what is forgotten (a name, a folder, model-NNN), or its stored
    scores: an evaluation that asked one, or a file of {bench: {auc}} or {bench: {truth_ratios}}."""
    holdout: list[str] = field(default_factory=list)
    """For benches memory:CORPUS: corpora that the model never saw, for the AUCs of membership scores."""
    question_ids: str | None = None
    """For benches of the paper's protocol: an earlier evaluation, or a file of ids, that says which questions count."""


@dataclass(frozen=True)
class GenerateSection:
    """What is written."""

    side: Literal["both", "base", "guarded"] = "both"
    max_new_tokens: int = 64
    temperature: float = 0.0
    """0 takes the likeliest token."""
    chat: bool = False
    """Ask in the tokenizer's chat template."""
    on_trigger: Literal["clamp", "refuse"] = "clamp"
    """Where a gate opens: go on with clamped features, or end with `refusal`."""
    refusal: str = "I cannot help with that."


@dataclass(frozen=True)
class AttackSection:
    """How it is attacked."""

    kinds: list[str] = field(default_factory=list)
    bench: str | None = None
    """Questions on the forgotten knowledge; by default the bench named like the forget corpus."""
    utility_bench: str | None = None
    """Questions that must stay answered, shown beside the attack."""
    known_questions: int = 16
    """Forget questions whose answers the attacker knows; others are asked. For attacks that learn from examples."""
    expect: list[str] = field(default_factory=list)
    """Conditions such as `dilution<=0.35` on the accuracy that an attack brings back at most (expect.py)."""
    dilution_lengths: list[int] = field(default_factory=lambda: [0, 4, 16, 48, 128, 512])
    """Benign tokens put around each question."""
    dilution_places: list[Literal["before", "after", "around"]] = field(
        default_factory=lambda: ["before", "after", "around"]
    )
    """Where they are put; `after` the question is still before the words that ask for the answer."""
    split_parts: list[int] = field(default_factory=lambda: [1, 2, 3, 4])
    """Parts that each question is asked in: turns of a chat, or with benign text between them."""
    split_filler_tokens: int = 16
    """Benign tokens between two parts, for a model without a chat template."""
    paraphrase_benches: list[str] = field(default_factory=list)
    """Benches that ask the same in other words; for a bench of the lab by default its other phrasings."""
    paraphrase_file: str | None = None
    """The bench's questions in other words, as whole contexts in their order: a line each, or .jsonl of {context}."""
    prefix_file: str | None = None
    """Texts of your own to put around a question, a line each, with {question} once; asked beside ours."""
    few_shot_counts: list[int] = field(default_factory=lambda: [0, 1, 4, 16])
    """Known questions with their answers in front of each question; at most `known_questions`."""
    encode_forms: list[Literal["spaced", "leetspeak", "rot13", "base64", "uppercase", "reversed"]] = field(
        default_factory=lambda: ["spaced", "leetspeak", "rot13", "base64", "uppercase", "reversed"]
    )
    """How the letters or words of each question are changed."""
    encode_file: str | None = None
    """The bench's questions in another language or code, written like `paraphrase_file`."""
    suffix_tokens: int = 8
    """Searched tokens, the same around every question."""
    suffix_steps: list[int] = field(default_factory=lambda: [0, 5, 10, 20])
    """Exchanges of one token after which the guarded model is asked."""
    suffix_candidates: int = 64
    """Exchanges that are tried in each step, on all questions that the attacker knows."""
    suffix_gate_weight: float = 1.0
    """Of the gate's statistic, relative to what it is at first, beside the loss of answers: for what is proposed."""
    suffix_places: list[Literal["after", "before"]] = field(default_factory=lambda: ["after", "before"])
    """After each question (before the words with which all end), or before it."""
    relearn_steps: list[int] = field(default_factory=lambda: [0, 5, 10, 20, 40])
    """Optimiser steps at which the fine-tuned model is asked."""
    relearn_learning_rates: list[float] = field(default_factory=lambda: [1e-4, 3e-4, 1e-3])
    """Of AdamW, ascending; a training each."""
    relearn_parameters: list[Literal["all", "lora", "above"]] = field(default_factory=lambda: ["all"])
    """What is trained: all weights, low-rank adapters on every linear layer, or only the layers above the hook."""
    relearn_rank: int = 8
    """Of the adapters."""
    relearn_frozen_below: bool = False
    """Protected fine-tuning, a defence: whatever the guardrail's hook depends on is frozen."""
    relearn_guard: list[Literal["loop", "test", "removed"]] = field(default_factory=lambda: ["loop"])
    """Guarded while it is trained and asked, only when asked, or never."""
    relearn_data: list[Literal["forget", "unrelated"]] = field(default_factory=lambda: ["forget"])
    """Trained on the forget questions that the attacker knows, or on benign text."""
    soft_prompt_tokens: int = 8
    """Trained vectors in front of each question."""
    soft_prompt_steps: list[int] = field(default_factory=lambda: [0, 10, 40, 160])
    """Of Adam, at which the guarded model is asked."""
    soft_prompt_learning_rate: float = 0.1
    """Relative to the size of an embedding's entries."""
    soft_prompt_objectives: list[Literal["loop", "gate"]] = field(default_factory=lambda: ["loop", "gate"])
    """What is minimised: the loss of answers under the guard, or without it and, beside it, the gate's statistic."""
    soft_prompt_gate_weight: float = 1.0
    """Of the statistic, relative to what it is at first."""
    quantize_bits: list[int] = field(default_factory=lambda: [8, 4])
    """To which the decoder's linear weights are rounded, one scale an output channel."""
    prune_shares: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.3, 0.5])
    """Of each linear weight matrix, the smallest values that are set to 0."""
    probe_ridge: float = 0.01
    """Penalty of the linear probe, relative to the size of what it is fitted on."""


@dataclass(frozen=True)
class PublishedSection:
    """What others report for the same setting, to be shown beside what is measured."""

    source: str = ""
    """Where it was published."""
    results: dict[str, dict[str, float | dict[str, float]]] = field(default_factory=dict)
    """bench -> side (base, unlearned) -> accuracy, or metric -> value."""


@dataclass(frozen=True)
class Recipe:
    """All settings of a run."""

    model: ModelSection = ModelSection()
    sae: SaeSection = SaeSection()
    corpora: CorporaSection = CorporaSection()
    select: SelectSection = SelectSection()
    calibrate: CalibrateSection = CalibrateSection()
    guardrail: GuardrailSection = GuardrailSection()
    methods: MethodsSection = field(default_factory=MethodsSection)
    eval: EvalSection = EvalSection()
    generate: GenerateSection = GenerateSection()
    attack: AttackSection = AttackSection()
    compare: CompareSection = field(default_factory=CompareSection)
    study: StudySection = field(default_factory=StudySection)
    published: PublishedSection = PublishedSection()
    seed: int = 0


def select_checks(select: SelectSection) -> tuple[tuple[bool, str], ...]:
    """Claims about the settings, each with what to say if it does not hold."""
    rate = select.max_retain_rate
    return (
        (select.n_features >= 1, f"select.n_features is {select.n_features}; take at least 1."),
        (
            0 <= select.ratio_percentile < 100,
            f"select.ratio_percentile is {select.ratio_percentile:g}; it must be at least 0 and below 100.",
        ),
        (select.max_rows >= 1, f"select.max_rows is {select.max_rows}; take at least 1."),
        (select.seq_len >= 2, f"select.seq_len is {select.seq_len}; it must be at least 2."),
        (select.probe_features >= 0, f"select.probe_features is {select.probe_features}; 0 fits no probe."),
        (
            select.probe_candidates >= max(select.probe_features, 1),
            f"select.probe_candidates is {select.probe_candidates}; give at least as many as select.probe_features.",
        ),
        (select.probe_tokens >= 100, f"select.probe_tokens is {select.probe_tokens}; take at least 100."),
        (
            0 < select.probe_ridge < math.inf,
            f"select.probe_ridge is {select.probe_ridge:g}; it must be a positive number.",
        ),
        (rate is None or 0 <= rate <= 1, f"select.max_retain_rate is {rate}; give a share from 0 to 1, or null."),
        (
            min(select.features, default=0) >= 0 and len(set(select.features)) == len(select.features),
            f"select.features is {select.features[:20]}; give different whole numbers from 0.",
        ),
        (
            select.describe is None or not select.features,
            "select.describe and select.features both say which features to take; leave one out.",
        ),
        (
            select.describe is not None or (select.descriptions is None and select.embedding is None),
            "select.descriptions and select.embedding are for select.describe, which is not given.",
        ),
    )


LARGEST_STRENGTH = 1e6
"""Beyond this a clamped residual loses its meaning, and float32 soon its range."""

HINT = "Give --strength 500, a multiple of the median residual norm such as --strength 16r, or --strength auto."


def strength_of(text: str, median_residual_norm: float) -> float | None:
    """c from `500`, or from `2r`: twice the median residual norm at the hook; None where it is no sensible size."""
    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(r?)\s*", text)
    try:
        value = float(match[1]) * (median_residual_norm if match[2] else 1.0) if match else math.nan
    except ValueError:
        return None
    return value if 0 < value < LARGEST_STRENGTH else None


def parse_strength(
    text: str,
    median_residual_norm: float,
    *,
    hint: str = HINT,
) -> float:
    """The same, where it must be one."""
    value = strength_of(text, median_residual_norm)
    if value is None:
        raise DsgError(f"The strength {text!r} is not a positive number of sensible size.", hint)
    return value


Check = tuple[bool, str]
"""Whether a setting is fine, and what is wrong with it if it is not."""


def clamp_checks(section: MethodsSection) -> tuple[Check, ...]:
    """Whether each setting is fine, and what to say if it is not."""
    static, conditional, refusal = section.static_clamp, section.conditional_clamp, section.refusal_clamp
    latent = refusal.refusal_feature
    return (
        *_selection("methods.static_clamp", static),
        *_selection("methods.conditional_clamp", conditional),
        *_selection("methods.refusal_clamp", refusal),
        _above("methods.conditional_clamp", conditional.above),
        _above("methods.refusal_clamp", refusal.above),
        _strength("methods.static_clamp.strength", static.strength),
        _strength("methods.conditional_clamp.strength", conditional.strength),
        _strength("methods.refusal_clamp.coefficient", refusal.coefficient),
        (latent is None or latent >= 0, f"methods.refusal_clamp.refusal_feature is {latent}; it must be at least 0."),
    )


def _selection(section: str, settings: StaticClamp | ConditionalClamp | RefusalClamp) -> tuple[Check, ...]:
    n_features, largest = settings.n_features, settings.max_retain_rate
    return (
        (n_features >= 1, f"{section}.n_features is {n_features}; take at least 1."),
        (0 <= largest <= 1, f"{section}.max_retain_rate is {largest:g}; it must lie between 0 and 1."),
    )


def _above(section: str, above: float) -> Check:
    words = f"{section}.above is {above:g}; it must be an activation: at least 0, below {LARGEST_STRENGTH:g}."
    return 0 <= above < LARGEST_STRENGTH, words


def _strength(name: str, text: str) -> Check:
    words = f"{name} is {text[:200]!r}; give a positive number, or a multiple of the median residual norm such as 2r."
    return strength_of(text, 1.0) is not None, words


def wrapper_checks(section: MethodsSection) -> tuple[tuple[bool, str], ...]:
    """Whether each setting is fine, and what to say if it is not."""
    shown = section.in_context
    return (
        (bool(section.prompt.text.strip()), "methods.prompt.text is empty; write what the model is told."),
        (shown.n_forget >= 1, f"methods.in_context.n_forget is {shown.n_forget}; take at least 1."),
        (shown.n_retain >= 0, f"methods.in_context.n_retain is {shown.n_retain}; it must be at least 0."),
        *(
            check
            for name, one in (("input_filter", section.input_filter), ("output_filter", section.output_filter))
            for check in (
                (0 < one.alpha < 1, f"methods.{name}.alpha is {one.alpha:g}; it must lie between 0 and 1."),
                (
                    0 < one.ridge < math.inf,
                    f"methods.{name}.ridge is {one.ridge:g}; it must be a positive number.",
                ),
                (one.n_keywords >= 1, f"methods.{name}.n_keywords is {one.n_keywords}; take at least 1."),
                (
                    one.layer is None or one.layer >= 0,
                    f"methods.{name}.layer is {one.layer}; layers count from 0.",
                ),
                (bool(one.refusal.strip()), f"methods.{name}.refusal is empty; write what is answered."),
                (
                    one.keywords_file is None or one.rule == "keywords",
                    f"methods.{name}.keywords_file is given; set methods.{name}.rule=keywords, or leave it out.",
                ),
            )
        ),
    )


TrainingCheck = tuple[bool, str]

AT_LEAST_1 = ("steps", "batch_size", "accumulation", "lora_rank", "n_relevant", "n_irrelevant", "n_rows", "max_steps")

POSITIVE = ("epochs", "learning_rate", "max_gradient_norm", "lora_alpha", "beta", "temperature", "alpha", "coefficient")

NOT_NEGATIVE = (
    "warmup_steps",
    "weight_decay",
    "forget_weight",
    "retain_weight",
    "subspace_weight",
    "push_weight",
    "kl_weight",
    "nll_weight",
    "dampening",
    "min_steps",
    "gamma",
    "last_max_step",
    "layer",
)


def training_checks(section: MethodsSection) -> tuple[TrainingCheck, ...]:
    """Whether each number of each method that changes weights is in its range, and what to say if not."""
    trained = {
        field.name: getattr(section, field.name)
        for field in dataclasses.fields(section)
        if isinstance(getattr(section, field.name), Training | Ssd)
    }
    return tuple(check for name, settings in trained.items() for check in _of(f"methods.{name}", settings))


def _of(prefix: str, settings: Any) -> Iterator[TrainingCheck]:
    values = dataclasses.asdict(settings)
    for name, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if name == "steps" and isinstance(settings, Finetune):
            yield value >= 0, f"{prefix}.steps is {value}; 0 takes as many as the epochs need."
        elif name in AT_LEAST_1:
            yield value >= 1, f"{prefix}.{name} is {value}; take at least 1."
        elif name in POSITIVE:
            yield 0 < value < math.inf, f"{prefix}.{name} is {value:g}; it must be a positive number."
        elif name in NOT_NEGATIVE and is_number:
            yield 0 <= value < math.inf, f"{prefix}.{name} is {value:g}; it must not be negative."
    yield values["max_tokens"] >= 2, f"{prefix}.max_tokens is {values['max_tokens']}; it must be at least 2."
    layers = values.get("layers")
    yield layers is None or bool(layers), f"{prefix}.layers is empty; leave it out to train all."
    if isinstance(settings, Finetune):
        is_either = settings.rows == "documents" or settings.answer_after is None
        yield is_either, f"{prefix}.answer_after needs {prefix}.rows=documents; packed rows count whole."
        yield settings.answer_after != "", f"{prefix}.answer_after is empty; leave it out to count whole documents."
