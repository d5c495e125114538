"""Artifacts as models: what all have in common, and the bodies that say what was measured.

A field of an artifact is a plain value, a list of them, or a JSON object. What lies in an object stays the object that
it was, with the order of its keys, for readers take any metric out of it by name; the `Shape` of such a field says what
it must look like, and is checked whenever an artifact is made or read. Nothing is converted: a string is no number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import core_schema

Json = dict[str, Any]

BOUND = 2**63

Whole = Annotated[int, Field(ge=-BOUND, lt=BOUND)]

Number = Annotated[float, Field(gt=-BOUND, lt=BOUND, allow_inf_nan=False)]

Finite = Annotated[float, Field(allow_inf_nan=False)]

Empty = Annotated[Json, Field(max_length=0)]


class Part(BaseModel):
    """An artifact's header, body, or JSON object in one of them; where a field has a default, it may be missing.

    Fields that it does not know are ignored: an earlier version reads past what a later one adds.
    """

    model_config = ConfigDict(strict=True, frozen=True, serialize_by_alias=True, defer_build=True)

    def replace(self, **changes: Any) -> Self:
        """A copy with other values, which are not checked."""
        return self.model_copy(update=changes)


@dataclass(frozen=True)
class Shape:
    """Marks a field of JSON that is checked as if it were of a type, and kept as it is."""

    type: Any

    def __get_pydantic_core_schema__(self, _source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        def checked(value: Any, check: core_schema.ValidatorFunctionWrapHandler) -> Any:
            check(value)
            return value

        return core_schema.no_info_wrap_validator_function(
            checked, handler.generate_schema(self.type), serialization=core_schema.simple_ser_schema("any")
        )


class Metrics(Part):
    """Values by the name of the metric; null where it could not be computed."""

    model_config = ConfigDict(extra="allow")

    __pydantic_extra__: dict[str, Number | None] = Field(init=False)
    acc: Number | None = None
    acc_low: Number = 0
    acc_high: Number = 0


class BaseMetrics(Metrics):
    """Of the base model: with the number of questions that count, and of those that were asked."""

    n: Whole
    n_asked: Whole = 0


class BenchResult(Part):
    """Metrics of both models on one bench."""

    base: BaseMetrics
    unlearned: Metrics


class GateRate(Part):
    """Share of the questions of a bench of which a choice was gated."""

    rate: Number


class Condition(Part):
    """A condition of `--expect`, with what it was held against."""

    expect: str
    value: Number | None
    met: bool


class Ingredient(Part):
    """One of the artifacts that unlearn a model together."""

    id: str
    kind: str
    method: str


Expected = Annotated[list[Json], Shape(list[Condition])]
"""[{expect, value, bound, met}]; evaluations of 0.1 have no bound."""

Composition = Annotated[list[Json], Shape(list[Ingredient])]
"""What unlearned the model, in the order in which it acts: [{id, kind, method}]"""


class Body(Part):
    """What an artifact says, but for where it came from."""

    kind: ClassVar[str]
    schema_number: ClassVar[int] = 1
    made_by: ClassVar[str]
    next_command: ClassVar[str] = "dsg report"
    settings_shape: ClassVar[type[Part]] = Part
    """Of `settings` in the header."""

    @classmethod
    def migrate(cls, data: Json) -> Json:
        """An artifact's JSON object in the newest schema, where defaults of fields do not suffice."""
        return data


class Benches(Part):
    """Settings of an evaluation."""

    benches: list[str]


class EvalReport(Body):
    """Body of `eval-NNN`; one row a question beside it."""

    kind = "eval"
    schema_number = 4
    made_by = "dsg eval"
    next_command = "dsg attack"
    settings_shape = Benches

    split: str
    results: Annotated[dict[str, Json], Shape(dict[str, BenchResult])]
    """bench -> side (base, unlearned) -> metric, metric_stderr, n."""
    gate: Annotated[dict[str, Json], Shape(dict[str, GateRate])]
    """bench -> rate of questions with a gated choice, number of questions."""
    expected: Expected
    question_ids: dict[str, list[str]] = {}
    """bench -> the questions that the base model knows; of benches of the paper's protocol."""
    base_from: dict[str, Whole] = {}
    """Earlier evaluation -> answers of the base model that were taken from it."""
    composition: Composition = []
    asked: dict[str, str] = {}
    """Bench on free text -> digest of all that was asked: only evaluations that asked the same can be compared."""
    reference: Json = {}
    """A model that never saw what is forgotten: {source, digest, scores: {bench: ...}}; empty without one."""
    refused: dict[str, Json] = {}
    """Bench -> metric that could not be computed -> why."""


class Side(Part):
    """What a model answers at one point of an attack."""

    forget_acc: Number
    forget_low: Number = 0
    forget_high: Number = 0
    n: Whole = 0
    utility_acc: Number = 0


class UnlearnedSide(Side):
    """The same of the unlearned model."""

    gate_rate: Number = 0


class Sides(Part):
    """Both models under the same attack."""

    unlearned: UnlearnedSide
    base: Side


class Point(Sides):
    """One point of the curve of an attack."""

    x: Number | str
    variant: str


class AttackSummary(Part):
    """Where most came back; nulls if the base model answers nowhere on the curve."""

    base_acc: Number
    evades_above: Number
    evaded_at: dict[str, Number | str]
    n_points: Whole
    n_measurable: Whole
    gate_rate_at_worst: Number | None
    forget_acc_before: Number
    forget_acc_worst: Number | None
    worst_x: Number | str | None
    worst_variant: str
    unguarded_at_worst: Number | None


class RetainDigests(Part):
    """Settings of an attack."""

    retain: dict[str, str] = {}


class AttackReport(Body):
    """Body of `attack-NNN`."""

    kind = "attack"
    schema_number = 4
    made_by = "dsg attack"
    settings_shape = RetainDigests

    attack: str
    threat_model: str
    bench: str
    before: Annotated[Json, Shape(Sides)]
    """{unlearned: {forget_acc, ...}, base: {forget_acc, ...}} without any attack."""
    curve: Annotated[list[Json], Shape(list[Point])]
    """[{x, variant, unlearned: {forget_acc, forget_low, forget_high, n, gate_rate, ...}, base: {...}}]"""
    summary: Annotated[Json, Shape(AttackSummary)]
    expected: Expected = []
    composition: Composition = []

    @classmethod
    def migrate(cls, data: Json) -> Json:
        """Schema 1 had no variants and a shorter summary; to schema 3 the sides were `guarded` and `unguarded`."""
        if data["schema"] == 1:
            data = _with_variants(data)
        if data["schema"] < 4:
            curve = [_with_later_sides(point) for point in data["curve"]]
            data = {**data, "before": _with_later_sides(data["before"]), "curve": curve}
        return data


def _with_variants(data: Json) -> Json:
    curve = [{"variant": "", **point} for point in data["curve"]]
    before = {side: curve[0][side] for side in ("guarded", "unguarded")}
    base, begun = (before[side]["forget_acc"] for side in ("unguarded", "guarded"))
    summary = {"base_acc": base, "n_points": len(curve), "n_measurable": len(curve), "worst_variant": ""}
    summary |= {"evades_above": (base + begun) / 2, "evaded_at": {}, "gate_rate_at_worst": None}
    return {**data, "curve": curve, "before": before, "summary": {**summary, **data["summary"]}}


def _with_later_sides(sides: Json) -> Json:
    later = {"guarded": "unlearned", "unguarded": "base"}
    return {later.get(key, key): value for key, value in sides.items()}


class ComparedBenches(Part):
    """Names of benches by what they are for."""

    forget: str
    near: list[str]
    other: list[str]


class ComparedBase(Part):
    """Accuracies of the model that no method has changed."""

    dev: dict[str, Number]
    test: dict[str, Metrics]


class Relearned(Part):
    """Accuracies at one point of the attack `relearn`."""

    x: Whole
    guarded: Number
    unguarded: Number


class Cost(Part):
    """What a method took."""

    forward_tokens: Number
    backward_tokens: Number
    seconds: Number
    peak_memory_mb: Number
    bytes: Number


class ComparedRow(Part):
    """A method, with an SAE, on test questions."""

    method: str
    sae: str
    artifacts: list[str]
    values: Json
    results: dict[str, Metrics]
    gate: dict[str, Number]
    relearned: Relearned | Empty
    cost: Cost | Empty
    n_features: Whole
    error: str


class Trial(Part):
    """A setting of a method, on dev questions."""

    method: str
    values: Json
    dev: dict[str, Number]
    forget: Number | None
    utility: Number | None
    score: Number | None
    seconds: Number
    is_chosen: bool
    error: str


class RequestResult(Part):
    """Accuracies after one more request."""

    request: str
    artifacts: list[str]
    results: dict[str, Number]


class RequestSequence(Part):
    """Requests one after another."""

    method: str
    error: str
    curve: list[RequestResult]


class Comparison(Body):
    """Body of `compare-NNN`: methods side by side."""

    kind = "compare"
    made_by = "dsg compare"

    benches: Annotated[Json, Shape(ComparedBenches)]
    chance: Finite
    """Accuracy on forget questions without any knowledge."""
    criterion: str
    """By which settings were chosen, on dev questions."""
    base: Annotated[Json, Shape(ComparedBase)]
    """{dev: {bench: acc}, test: {bench: {acc, acc_low, acc_high, n}}} of the model that no method has changed."""
    rows: Annotated[list[Json], Shape(list[ComparedRow])]
    """{method, sae, artifacts, eval, attack, values, results, gate, relearned, cost, n_features, error}"""
    trials: Annotated[list[Json], Shape(list[Trial])]
    """{method, values, dev: {bench: acc}, forget, utility, forgetting, score, seconds, is_chosen, error}: the data of a
    scatter of forget accuracy against utility."""
    sequences: Annotated[list[Json], Shape(list[RequestSequence])]
    """{method, curve: [{request, artifacts, results: {bench: acc}}], error}: requests one after another."""


class StudyBenches(Part):
    """Names of benches by what they are for; of a study that asks nothing, empty lists."""

    forget: list[str]
    other: list[str]


class StudyBase(Part):
    """A bench's accuracy without any guardrail."""

    acc: Number
    low: Number
    high: Number
    n: Whole


class StudyRow(Part):
    """A point and a measure; settings of the point, and what it turned out to be, are further keys."""

    model_config = ConfigDict(extra="allow")

    __pydantic_extra__: dict[str, Number | str | bool | None] = Field(init=False)
    bench: str
    metric: str
    value: Number | None
    low: Number | None
    high: Number | None
    gate_rate: Number | None
    gate_low: Number | None
    gate_high: Number | None
    n: Whole | None
    error: str


class StudyCost(Part):
    """What a study took."""

    n_points: Whole
    n_failed: Whole


class StudyReport(Body):
    """Body of `study-NNN`; the same rows lie beside it as CSV."""

    kind = "study"
    made_by = "dsg study"

    study: str
    split: str
    """Of the lab's questions: `dev` to choose by, or `test`."""
    grid: Annotated[Json, Shape(dict[str, list[Number | str]])]
    """Setting -> values; points are all their combinations."""
    benches: Annotated[Json, Shape(StudyBenches)]
    chance: Finite
    """Accuracy on forget questions without any knowledge."""
    base: Annotated[Json, Shape(dict[str, StudyBase])]
    columns: list[str]
    """Of the table, those of settings and what points turned out to be; those of what was measured follow."""
    rows: Annotated[list[Json], Shape(list[StudyRow])]
    """{<column>, ..., bench, metric, value, low, high, n, gate_rate, gate_low, gate_high, error}. Intervals are 95 %:
    Wilson's of shares, by order statistics of medians. A point that failed has one row, which says why."""
    computed: Annotated[Json, Shape(StudyCost)]
    """{n_points, n_failed, text_passes, gate_passes, asked, n_requests}: what it took. Passes over a corpus but for
    those of the features it began with, passes over retain text by which gates were calibrated, requests that went
    through the whole model, and how many requests all questions of all benches are."""


class InspectedGroup(Part):
    """Text that was read."""

    name: str
    role: Literal["forget", "near", "retain"]
    n_documents: Whole
    n_tokens: Whole


class TokenValue(Part):
    """A token by the logit lens."""

    token: str
    value: Number


class Neighbour(Part):
    """Another feature whose decoder row points the same way."""

    index: Whole
    cosine: Number
    is_selected: bool


class InspectedFeature(Part):
    """A feature; what is not known of it is null or empty."""

    index: Whole
    roles: list[Literal["clamped", "watched"]]
    weight: Number | None
    """In the gate's score."""
    forget_score: Number | None
    retain_score: Number | None
    ratio: Number | None
    rates: dict[str, Number]
    """group -> share of tokens on which it is active."""
    means: dict[str, Number]
    """group -> mean over all tokens."""
    promoted: list[TokenValue]
    """By the logit lens on its decoder row."""
    suppressed: list[TokenValue]
    nearest: list[Neighbour]
    words: list[str]
    """Characteristic of its strongest contexts; only with `--samples`."""
    description: str | None
    """Neuronpedia's, if asked for."""
    warnings: list[str]


class Overlap(Part):
    """An earlier guardrail on the same SAE."""

    id: str
    n_features: Whole
    shared: list[Whole]


class Inspection(Body):
    """Body of `inspect-NNN`: what the features of a selection or a guardrail are about.

    Beside it one row a feature, group and context: {feature, group, document, position, peak, activations, at}, and
    with `--samples` `tokens`, the text of each. `document` is its number among those of the corpus that were drawn,
    `position` that of the peak among its tokens, BOS included; `at` says which of the activations is the peak.
    """

    kind = "inspect"
    made_by = "dsg inspect"

    inspected: str
    """Id of the features or the guardrail."""
    groups: Annotated[list[Json], Shape(list[InspectedGroup])]
    features: Annotated[list[Json], Shape(list[InspectedFeature])]
    overlap: Annotated[list[Json], Shape(list[Overlap])]
