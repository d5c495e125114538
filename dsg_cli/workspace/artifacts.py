"""What a stage writes, as pydantic classes: a header (where it came from), and the bodies of the chain; their JSON.

An artifact is one JSON object, header and body side by side, with a digest of itself; tensors and rows lie beside it.
store.py reads and writes the files, results.py holds the bodies that say what was measured, body.py what all have in
common.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError

from dsg_cli.errors import DsgError
from dsg_cli.guardrail.runtime.spec import CalibratedGate, Gate
from dsg_cli.workspace.body import Body, Empty, Finite, Json, Number, Part, Shape, Whole
from dsg_cli.workspace.files import parse_json
from dsg_cli.workspace.results import AttackReport, Comparison, EvalReport, Inspection, StudyReport


class ModelIdentity(Part):
    """Which model, and proof that it is that one."""

    source: str
    architecture: str
    n_layers: Whole
    width: Whole
    last_layer: Whole
    """The fingerprint covers layers 0..last_layer."""
    fingerprint: str


class SaeIdentity(Part):
    """Which sparse autoencoder, and where in the model it reads."""

    source: str
    architecture: str
    hook: str
    width: Whole
    n_features: Whole
    prepend_bos: bool
    config_sha256: str
    sha256: str
    """Digest of the weights file."""
    hook_out: str = ""
    """Where a transcoder's output belongs; empty for an SAE, which writes where it reads."""
    revision: str = ""
    """Commit of the repository that a release was read from; empty for others, whose source names it."""


class InputArtifact(Part):
    """An artifact that this one was computed from."""

    id: str
    sha256: str
    is_elsewhere: bool = False
    """It did not lie in the same workspace; what is called so there is another one."""


class GitState(Part):
    """The checkout that the package runs from."""

    commit: str
    dirty: bool


class Header(Part):
    """Provenance: what ran, on what, from what."""

    kind: str
    schema_number: Whole = Field(alias="schema")
    id: str
    created: str
    """UTC time, ISO 8601."""
    dsg_version: str
    git: Annotated[Json, Shape(GitState | Empty)]
    """Commit and changes of the checkout that the package runs from; empty for an installed package."""
    packages: dict[str, str]
    device: str
    dtype: str
    seed: Whole
    settings: Json
    """Resolved settings of the stage."""
    model: ModelIdentity
    sae: SaeIdentity | None
    inputs: list[InputArtifact]
    files: dict[str, str] = {}
    """Side files and their sha256."""
    seconds: Finite = 0.0
    n_tokens: Whole = 0
    peak_memory_mb: Finite = 0.0
    notes: list[str] = []
    """What a person should know before trusting it."""
    trust_remote_code: bool = False
    """Python files that came with the model were run."""


class _Corpus(Part):
    name: str
    sha256: str
    documents: Whole = 0
    revision: str = ""
    weight: Number = 0


class _SelectCorpora(Part):
    forget: list[_Corpus]
    retain: list[_Corpus]
    limit: Whole | None


class _CalibrateCorpora(Part):
    retain: list[_Corpus]
    forget: list[_Corpus] = []
    lengths: Annotated[list[Whole], Field(min_length=2, max_length=2)]


class _TrainCorpora(Part):
    forget: list[_Corpus]
    retain: list[_Corpus]
    train: list[_Corpus] = []


class _WrapCorpora(Part):
    forget: list[str] | list[_Corpus] = []
    retain: list[str] | list[_Corpus] = []


class _ProbeFeature(Part):
    index: Whole
    weight: Number


class _PathPoint(Part):
    n_features: Whole
    balanced_accuracy: Number


class _Probe(Part):
    features: list[_ProbeFeature]
    bias: Number
    clip: Number
    path: list[_PathPoint]


class _Ranked(Part):
    index: Whole
    score: Number
    description: str = ""


class _Described(Part):
    query: str
    ranker: str
    source: str
    sha256: str
    n_matched: Whole = 0
    ranking: list[_Ranked]


class _Rate(Part):
    what: str
    is_forget: bool
    n: Whole
    rate: Number
    low: Number
    high: Number


class _Slice(Part):
    model_config = ConfigDict(extra="forbid")

    activation: Literal["threshold", "gated", "topk", "abstopk"]
    normalization: Literal["none", "layer_norm", "constant_norm_rescale"] = "none"
    is_rescaled_back: bool = False
    k: Whole = 0


class _StrengthTrial(Part):
    strength: Number
    setting: str
    acc: Number
    gate_rate: Number


class _Effect(Part):
    n_rows: Whole
    gate_rate: Number
    changed_rate: Number
    edit: Number


class _Trained(Part):
    n_parameters: Whole
    n_changed: Whole
    modules: list[str]
    corpora: list[str] = []


class _Losses(Part):
    model_config = ConfigDict(extra="allow")

    __pydantic_extra__: dict[str, Number] = Field(init=False)
    step: Whole
    loss: Number


class _TrainingCost(Part):
    forward_passes: Whole
    backward_passes: Whole
    forward_tokens: Whole
    backward_tokens: Whole


class Feature(Part):
    """One selected feature; forget score and ratio are null if it was picked without forget text."""

    index: Whole
    forget_score: Finite | None
    retain_score: Finite
    ratio: Finite | None


class FeatureSet(Body):
    """Body of `features-NNN`; its tensors hold the statistics of every feature of the SAE, shape [F]."""

    kind = "features"
    schema_number = 3
    made_by = "dsg select"
    next_command = "dsg calibrate"
    settings_shape = _SelectCorpora

    features: list[Feature]
    """In rank order."""
    score: str
    ratio_cut: Finite | None
    forget_cut: Finite | None
    """Smallest ratio and forget score that passed; null where features were picked by description or by hand."""
    percentiles_over: str | None
    """`all` features, or the `live` ones where nearly all are dead."""
    n_live: Whole
    n_passed: Whole
    """Features that passed the filters, before the best were taken."""
    forget_tokens: Whole
    retain_tokens: Whole
    median_residual_norm: Finite
    """Of retain tokens at the hook; the unit `r` of a strength."""
    probe: Annotated[Json, Shape(_Probe | Empty)] = {}
    """A sparse probe of a token (guardrail/probe.py); empty where none was fitted."""
    described: Annotated[Json, Shape(_Described | Empty)] = {}
    """Of features picked by description."""


class Threshold(Body):
    """Body of `threshold-NNN`; one row a calibration piece beside it."""

    kind = "threshold"
    schema_number = 3
    made_by = "dsg calibrate"
    next_command = "dsg apply"
    settings_shape = _CalibrateCorpora

    threshold: Finite
    gate: CalibratedGate
    alpha: Finite
    n_calibration: Whole
    """Pieces that set the threshold."""
    n_fresh: Whole
    """Pieces, of other documents, on which the false-positive rate was measured."""
    n_documents: Whole
    """Documents that the calibration pieces were cut from; pieces of one document are not independent."""
    false_positive_rate: Finite | None
    """Null if there was no fresh piece to measure it on."""
    low: Finite
    high: Finite
    """95 % Clopper-Pearson interval, as if pieces were independent."""
    features: list[Whole]
    """Clamped when the gate fires."""
    detectors: list[Whole] = []
    """Watched by the gate; empty where it watches the clamped features."""
    weights: list[Finite] = []
    """Of the detectors in the token score; empty where each has 1."""
    bias: Finite = 0.0
    clip: Finite = 0.0
    """Of the token score, see runtime/gates.py."""
    window: Whole = 0
    """Counted tokens in a window, or in the shortest prefix of `causal-mean`; 0 for `mean` and `cusum`."""
    guarantee: Literal["each", "pooled"] = "pooled"
    """Whether alpha holds for each retain corpus by itself, or for all of them together."""
    percentile: Finite | None = None
    """The plain percentile of all pieces, which the paper takes; without a guarantee for few of them."""
    rates: Annotated[list[Json], Shape(list[_Rate])] = []
    """Share gated of fresh text of each kind."""
    special_ids: list[Whole]
    """Tokens that are never counted: BOS, EOS and pad."""
    bos: Whole | None
    """Token that every sequence began with."""
    median_residual_norm: Finite
    forget: list[str]
    retain: list[str]
    """Names of the corpora of select."""


class Guardrail(Body):
    """Body of `guardrail-NNN`; its tensors (runtime/slice.py) are all of the SAE that later steps read."""

    kind = "guardrail"
    schema_number = 5
    made_by = "dsg apply"
    next_command = "dsg eval"

    indices: list[Whole]
    """Features that are clamped, the first columns of the tensors."""
    detectors: list[Whole] = []
    """Features that the gate watches, with the weights in `detect`; empty where it watches the clamped ones."""
    bias: Finite = 0.0
    clip: Finite = 0.0
    gate: Gate
    window: Whole = 0
    threshold: Finite
    strength: Finite
    """c: every selected feature is set to -c."""
    strength_setting: str
    median_residual_norm: Finite
    hook: str
    """Where the features are computed."""
    hook_out: str
    """Where they are clamped."""
    activation: str
    """Architecture of the SAE."""
    slice: Annotated[Json, Shape(_Slice)] = {"activation": "threshold"}
    """How activations follow from the tensors: a SliceSpec."""
    special_ids: list[Whole]
    bos: Whole | None
    """Token that every sequence began with in selection and calibration."""
    forget: list[str]
    """Names of the forget corpora, or of what it was tried on if there were none: attack finds its bench by them."""
    retain: list[str]
    strength_trials: Annotated[list[Json], Shape(list[_StrengthTrial])] = []
    """Of `--strength auto`, on the questions that it was chosen on."""
    effect: Annotated[Json, Shape(_Effect | Empty)] = {}
    """What it did on forget text when it was made; empty if there was none, and in schemas before 3."""
    method: str = "dsg"
    clamp: Literal["all", "each"] = "all"
    coefficients: list[Finite] = []
    above: list[Finite] = []
    """Which token is active, and what is set to what there: as in runtime/spec.py."""

    @classmethod
    def migrate(cls, data: Json) -> Json:
        """In schema 1 features were clamped where they are computed."""
        return data if data["schema"] > 1 else {**data, "hook_out": data["hook"]}


class ModelWeights(Body):
    """Body of `model-NNN`; the folder of that name beside it holds the weights, as transformers or PEFT read them."""

    kind = "model"
    made_by = "dsg apply --method"
    next_command = "dsg eval"
    settings_shape = _TrainCorpora

    method: str
    form: Literal["whole", "adapter"]
    """All weights, or a LoRA adapter of the model in the header, which a reader loads first."""
    result: ModelIdentity
    """The changed model; the header's is the one that it was made from."""
    trained: Annotated[Json, Shape(_Trained)]
    """What was free to change, and what did."""
    losses: Annotated[list[Json], Shape(list[_Losses])]
    """With each term of the loss; of a method without steps, none."""
    diverged_at: Whole | None
    """The step at which a loss was not finite any more; the weights are those of the last one that was checked."""
    cost: Annotated[Json, Shape(_TrainingCost)]
    features: list[Whole]
    """Of the SAE that guided it, in rank order."""
    special_ids: list[Whole]
    bos: Whole | None
    forget: list[str]
    retain: list[str]


class Wrapper(Body):
    """Body of `wrapper-NNN`: what stands between whoever asks and the model, whose weights and layers stay as they are.

    A classifier's weights lie beside it: `weight` [D], `bias` [].
    """

    kind = "wrapper"
    made_by = "dsg apply --method"
    next_command = "dsg eval"
    settings_shape = _WrapCorpora

    method: str
    rule: Literal["prefix", "keywords", "classifier"]
    side: Literal["input", "output"]
    text: str
    """Of a prefix. It is the method itself; examples that it shows are in it."""
    keywords: list[str]
    layer: Whole | None
    """Of a classifier: it reads the residual stream after this decoder layer."""
    threshold: Finite
    """A prompt, or an answer, whose statistic exceeds it is refused."""
    refusal: str
    rates: Annotated[list[Json], Shape(list[_Rate])]
    """Share refused of fresh text of each corpus."""
    special_ids: list[Whole]
    bos: Whole | None
    forget: list[str]
    retain: list[str]


KINDS: dict[str, type[Body]] = {
    body.kind: body
    for body in (
        FeatureSet,
        Threshold,
        Guardrail,
        ModelWeights,
        Wrapper,
        EvalReport,
        AttackReport,
        Comparison,
        StudyReport,
        Inspection,
    )
}

BodyT = TypeVar("BodyT", bound=Body)


def to_json(header: Header, body: Body) -> Json:
    """Header and body as one JSON object."""
    return {**header.model_dump(), **body.model_dump()}


def artifact_digest(data: Json) -> str:
    """Digest of an artifact's JSON object without the digest itself."""
    content = {key: value for key, value in data.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def artifact_text(data: Json) -> str:
    """How an artifact's JSON object is written: the one way, so that every byte of a file is vouched for."""
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def read_document(text: str, *, where: str, is_whole: bool = False) -> Json:
    """An artifact's JSON object, verified against its own digest.

    Args:
        text: What was written.
        where: The file, for messages.
        is_whole: It is the whole file, of which every byte counts, white space too.
    """
    try:
        data: Json = parse_json(text)
        schema, known = int(data["schema"]), KINDS[data["kind"]].schema_number
        digest = artifact_digest(data)
        is_as_written = not is_whole or text == artifact_text(data)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DsgError(f"{where} is not an artifact of dsg, or is damaged.") from error
    if schema > known:
        raise DsgError(f"{where} has schema {schema}; this version reads up to {known}.", "Update dsg-cli.")
    if data.get("sha256") != digest or not is_as_written:
        raise DsgError(f"{where} was altered after it was written: its digest does not match.", "Make it again.")
    return data


def parse_document(data: Json, *, where: str) -> tuple[Header, Body]:
    """Header and body of an artifact's JSON object, in the newest schema of its kind."""
    try:
        kind = KINDS[data["kind"]]
        data = kind.migrate(data)
        header = Header.model_validate(data)
        kind.settings_shape.model_validate(header.settings)
        return header, kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        above = ["settings"] if error.title == kind.settings_shape.__name__ else []
        name = ".".join(map(str, (*above, *first["loc"])))[:200]
        raise DsgError(f"{where} is not an artifact of dsg: {name}: {first['msg'][:200]}.") from error
    except (AttributeError, LookupError, TypeError, RecursionError) as error:
        raise DsgError(f"{where} is not an artifact of dsg, or is damaged.") from error
