"""Everything that a stage writes down, as frozen dataclasses of plain JSON values.

An artifact is a header (where it came from), a body (what was found) and, beside the JSON file, tensors and rows.
A file's JSON object is header and body side by side; workspace.py reads and writes it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from dsg_cli.workspace.results import AttackReport, Comparison, EvalReport, Inspection, Json, StudyReport


@dataclass(frozen=True)
class ModelIdentity:
    """Which model, and proof that it is that one."""

    source: str
    architecture: str
    n_layers: int
    width: int
    last_layer: int
    """The fingerprint covers layers 0..last_layer."""
    fingerprint: str


@dataclass(frozen=True)
class SaeIdentity:
    """Which sparse autoencoder, and where in the model it reads."""

    source: str
    architecture: str
    hook: str
    width: int
    n_features: int
    prepend_bos: bool
    config_sha256: str
    sha256: str
    """Digest of the weights file."""
    hook_out: str = ""
    """Where a transcoder's output belongs; empty for an SAE, which writes where it reads."""
    revision: str = ""
    """Commit of the repository that a release was read from; empty for others, whose source names it."""


@dataclass(frozen=True)
class InputArtifact:
    """An artifact that this one was computed from."""

    id: str
    sha256: str
    is_elsewhere: bool = False
    """It did not lie in the same workspace; what is called so there is another one."""


@dataclass(frozen=True)
class Header:
    """Provenance: what ran, on what, from what."""

    kind: str
    schema: int
    id: str
    created: str
    """UTC time, ISO 8601."""
    dsg_version: str
    git: Json
    """Commit and changes of the checkout that the package runs from; empty for an installed package."""
    packages: dict[str, str]
    device: str
    dtype: str
    seed: int
    settings: Json
    """Resolved settings of the stage."""
    model: ModelIdentity
    sae: SaeIdentity | None
    inputs: list[InputArtifact]
    files: dict[str, str] = field(default_factory=dict)
    """Side files and their sha256."""
    seconds: float = 0.0
    n_tokens: int = 0
    peak_memory_mb: float = 0.0
    notes: list[str] = field(default_factory=list)
    """What a person should know before trusting it."""
    trust_remote_code: bool = False
    """Python files that came with the model were run."""


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


ADDED: dict[tuple[str, int], Json] = {
    ("features", 2): {"probe": {}},
    ("features", 3): {"described": {}},
    ("threshold", 2): {"detectors": [], "window": 0},
    ("threshold", 3): {"weights": [], "bias": 0.0, "clip": 0.0, "guarantee": "pooled", "percentile": None, "rates": []},
    ("guardrail", 2): {"detectors": [], "window": 0, "slice": {"activation": "threshold"}},
    ("guardrail", 3): {"effect": {}},
    ("guardrail", 4): {"bias": 0.0, "clip": 0.0, "strength_trials": []},
    ("guardrail", 5): {"method": "dsg", "clamp": "all", "coefficients": [], "above": []},
    ("eval", 2): {"question_ids": {}, "base_from": {}},
    ("eval", 3): {"composition": []},
    ("eval", 4): {"asked": {}, "reference": {}, "refused": {}},
    ("attack", 2): {"expected": []},
    ("attack", 3): {"composition": []},
}
"""Kind and schema -> fields that it has and earlier ones have not, and what they would hold."""


def migrate(data: Json) -> Json:
    """An artifact's JSON object in the newest schema of its kind."""
    kind, schema = data["kind"], data["schema"]
    for later in range(schema + 1, SCHEMAS[kind] + 1):
        data = {**data, **ADDED.get((kind, later), {})}
    if schema == 1 and kind == "guardrail":
        data["hook_out"] = data["hook"]
    if schema == 1 and kind == "attack":
        curve = [{"variant": "", **point} for point in data["curve"]]
        before = {side: curve[0][side] for side in ("guarded", "unguarded")}
        data = {**data, "curve": curve, "before": before, "summary": _later_summary(data, before)}
    return data


def _later_summary(data: Json, before: Json) -> Json:
    """The summary of an attack of schema 1 as schema 2 has it."""
    n_points = len(data["curve"])
    base, begun = (before[side]["forget_acc"] for side in ("unguarded", "guarded"))
    of_base = {"base_acc": base, "n_points": n_points, "n_measurable": n_points}
    of_base |= {"evades_above": (base + begun) / 2, "evaded_at": {}}
    return {**of_base, "worst_variant": "", "gate_rate_at_worst": None, **data["summary"]}
