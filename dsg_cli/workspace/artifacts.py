"""Everything that a stage writes down, as frozen dataclasses of plain JSON values.

An artifact is a header (where it came from), a body (what was found) and, beside the JSON file, tensors and rows.
A file's JSON object is header and body side by side; workspace.py reads and writes it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from dsg_cli.measured import AttackReport, Comparison, EvalReport, Inspection, StudyReport
from dsg_cli.provenance import Header, InputArtifact, Json, ModelIdentity, SaeIdentity

__all__ = [
    "KINDS",
    "MADE_BY",
    "NEXT_COMMAND",
    "SCHEMAS",
    "AttackReport",
    "Body",
    "BodyT",
    "CalibratedGate",
    "Comparison",
    "EvalReport",
    "Feature",
    "FeatureSet",
    "Gate",
    "Guardrail",
    "Header",
    "InputArtifact",
    "Inspection",
    "Json",
    "ModelIdentity",
    "ModelWeights",
    "SaeIdentity",
    "StudyReport",
    "Threshold",
    "Wrapper",
    "to_json",
]

CalibratedGate = Literal["mean", "causal-mean", "window", "cusum", "probe"]
Gate = Literal[CalibratedGate, "token"]
"""Gate forms, see runtime/gates.py; `token`, which is none, has no threshold to be calibrated."""


@dataclass(frozen=True)
class Feature:
    """One selected feature; forget score and ratio are null if it was picked without forget text."""

    index: int
    forget_score: float | None
    retain_score: float
    ratio: float | None


@dataclass(frozen=True)
class FeatureSet:
    """Body of `features-NNN`; its tensors hold the statistics of every feature of the SAE, shape [F]."""

    features: list[Feature]
    """In rank order."""
    score: str
    ratio_cut: float | None
    forget_cut: float | None
    """Smallest ratio and forget score that passed; null where features were picked by description or by hand."""
    percentiles_over: str | None
    """`all` features, or the `live` ones where nearly all are dead."""
    n_live: int
    n_passed: int
    """Features that passed the filters, before the best were taken."""
    forget_tokens: int
    retain_tokens: int
    median_residual_norm: float
    """Of retain tokens at the hook; the unit `r` of a strength."""
    probe: Json
    """A sparse probe of a token (probe.py): `features: [{index, weight}]`, `bias`, ...; empty where none was fitted."""
    described: Json
    """Of features picked by description: {query, ranker, source, sha256, n_matched, ranking: [{index, score}]}."""


@dataclass(frozen=True)
class Threshold:
    """Body of `threshold-NNN`; one row a calibration piece beside it."""

    threshold: float
    gate: CalibratedGate
    alpha: float
    n_calibration: int
    """Pieces that set the threshold."""
    n_fresh: int
    """Pieces, of other documents, on which the false-positive rate was measured."""
    n_documents: int
    """Documents that the calibration pieces were cut from; pieces of one document are not independent."""
    false_positive_rate: float | None
    """Null if there was no fresh piece to measure it on."""
    low: float
    high: float
    """95 % Clopper-Pearson interval, as if pieces were independent."""
    features: list[int]
    """Clamped when the gate fires."""
    detectors: list[int]
    """Watched by the gate; empty where it watches the clamped features."""
    weights: list[float]
    """Of the detectors in the token score; empty where each has 1."""
    bias: float
    clip: float
    """Of the token score, see runtime/gates.py."""
    window: int
    """Counted tokens in a window, or in the shortest prefix of `causal-mean`; 0 for `mean` and `cusum`."""
    guarantee: Literal["each", "pooled"]
    """Whether alpha holds for each retain corpus by itself, or for all of them together."""
    percentile: float | None
    """The plain percentile of all pieces, which the paper takes; without a guarantee for few of them."""
    rates: list[Json]
    """Share gated of fresh text of each kind: [{what, is_forget, n, rate, low, high}]"""
    special_ids: list[int]
    """Tokens that are never counted: BOS, EOS and pad."""
    bos: int | None
    """Token that every sequence began with."""
    median_residual_norm: float
    forget: list[str]
    retain: list[str]
    """Names of the corpora of select."""


@dataclass(frozen=True)
class Guardrail:
    """Body of `guardrail-NNN`; its tensors (runtime/slices.py) are all of the SAE that later steps read."""

    indices: list[int]
    """Features that are clamped, the first columns of the tensors."""
    detectors: list[int]
    """Features that the gate watches, with the weights in `detect`; empty where it watches the clamped ones."""
    bias: float
    clip: float
    gate: Gate
    window: int
    threshold: float
    strength: float
    """The c of METHOD: every selected feature is set to -c."""
    strength_setting: str
    median_residual_norm: float
    hook: str
    """Where the features are computed."""
    hook_out: str
    """Where they are clamped."""
    activation: str
    """Architecture of the SAE."""
    slice: Json
    """How activations follow from the tensors: a SliceSpec."""
    special_ids: list[int]
    bos: int | None
    """Token that every sequence began with in selection and calibration."""
    forget: list[str]
    """Names of the forget corpora, or of what it was tried on if there were none: attack finds its bench by them."""
    retain: list[str]
    strength_trials: list[Json]
    """Of `--strength auto`: [{strength, setting, acc, gate_rate}] on the questions that it was chosen on."""
    effect: Json
    """What it did on forget text when it was made (effect.py); empty if there was none, and in schemas before 3."""
    method: str
    clamp: Literal["all", "each"]
    coefficients: list[float]
    above: list[float]
    """Which token is hot, and what is set to what there: as in runtime/spec.py."""


@dataclass(frozen=True)
class ModelWeights:
    """Body of `model-NNN`; the folder of that name beside it holds the weights, as transformers or PEFT read them."""

    method: str
    form: Literal["whole", "adapter"]
    """All weights, or a LoRA adapter of the model in the header, which a reader loads first."""
    result: ModelIdentity
    """The changed model; the header's is the one that it was made from."""
    trained: Json
    """{n_parameters, n_changed, modules}: what was free to change, and what did."""
    losses: list[Json]
    """[{step, loss, <term>, ...}]; of a method without steps, none."""
    diverged_at: int | None
    """The step at which a loss was not finite any more; the weights are those of the last one that was checked."""
    cost: Json
    """{forward_passes, backward_passes, forward_tokens, backward_tokens}"""
    features: list[int]
    """Of the SAE that guided it, in rank order."""
    special_ids: list[int]
    bos: int | None
    forget: list[str]
    retain: list[str]


@dataclass(frozen=True)
class Wrapper:
    """Body of `wrapper-NNN`: what stands between whoever asks and the model, whose weights and layers stay as they are.

    A classifier's weights lie beside it: `weight` [D], `bias` [].
    """

    method: str
    rule: Literal["prefix", "keywords", "classifier"]
    side: Literal["input", "output"]
    text: str
    """Of a prefix. It is the method itself; examples that it shows are in it."""
    keywords: list[str]
    layer: int | None
    """Of a classifier: it reads the residual stream after this decoder layer."""
    threshold: float
    """A prompt, or an answer, whose statistic exceeds it is refused."""
    refusal: str
    rates: list[Json]
    """Share refused of fresh text of each corpus: [{what, is_forget, n, rate, low, high}]"""
    special_ids: list[int]
    bos: int | None
    forget: list[str]
    retain: list[str]


Body = (
    Comparison
    | FeatureSet
    | Threshold
    | Guardrail
    | Inspection
    | ModelWeights
    | Wrapper
    | EvalReport
    | AttackReport
    | StudyReport
)
BodyT = TypeVar(
    "BodyT",
    Comparison,
    FeatureSet,
    Threshold,
    Guardrail,
    Inspection,
    ModelWeights,
    Wrapper,
    EvalReport,
    AttackReport,
    StudyReport,
)

KINDS: dict[str, type[Any]] = {
    "features": FeatureSet,
    "threshold": Threshold,
    "guardrail": Guardrail,
    "model": ModelWeights,
    "wrapper": Wrapper,
    "eval": EvalReport,
    "attack": AttackReport,
    "compare": Comparison,
    "study": StudyReport,
    "inspect": Inspection,
}
SCHEMAS: dict[str, int] = {
    "features": 3,
    "threshold": 3,
    "guardrail": 5,
    "model": 1,
    "wrapper": 1,
    "eval": 4,
    "attack": 3,
    "compare": 1,
    "study": 1,
    "inspect": 1,
}
MADE_BY = {
    "features": "dsg select",
    "threshold": "dsg calibrate",
    "guardrail": "dsg apply",
    "model": "dsg apply --method",
    "wrapper": "dsg apply --method",
    "eval": "dsg eval",
    "attack": "dsg attack",
    "compare": "dsg compare",
    "study": "dsg study",
    "inspect": "dsg inspect",
}
NEXT_COMMAND = {
    "features": "dsg calibrate",
    "threshold": "dsg apply",
    "guardrail": "dsg eval",
    "model": "dsg eval",
    "wrapper": "dsg eval",
    "eval": "dsg attack",
    "attack": "dsg report",
    "compare": "dsg report",
    "study": "dsg report",
    "inspect": "dsg report",
}


def to_json(header: Header, body: Body) -> Json:
    """Header and body as one JSON object."""
    return {**dataclasses.asdict(header), **dataclasses.asdict(body)}
