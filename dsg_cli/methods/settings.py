"""What each method can be told, with the defaults of its paper where it has any. No torch here.

`methods.npo.beta` in a recipe, or with `--set`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

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
