"""Every setting of a run, its type and its default: one frozen dataclass a YAML section of a recipe. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dsg_cli.methods.comparison import CompareSection
from dsg_cli.methods.settings import MethodsSection
from dsg_cli.studies.settings import StudySection


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
