"""Bodies of artifacts that say what was measured, as pydantic classes; artifacts.py holds the others."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from dsg_cli.workspace.body import Body, Empty, Finite, Json, Number, Part, Shape, Whole


class _Metrics(Part):
    model_config = ConfigDict(extra="allow")

    __pydantic_extra__: dict[str, Number | None] = Field(init=False)
    acc: Number | None = None
    acc_low: Number = 0
    acc_high: Number = 0


class _BaseMetrics(_Metrics):
    n: Whole
    n_asked: Whole = 0


class _BenchResult(Part):
    base: _BaseMetrics
    unlearned: _Metrics


class _GateRate(Part):
    rate: Number


class _Condition(Part):
    expect: str
    value: Number | None
    met: bool


class _Ingredient(Part):
    id: str
    kind: str
    method: str


Expected = Annotated[list[Json], Shape(list[_Condition])]
"""Also `bound`, but in evaluations of 0.1."""

Composition = Annotated[list[Json], Shape(list[_Ingredient])]
"""What unlearned the model, in the order in which it acts."""


class _Benches(Part):
    benches: list[str]


class EvalReport(Body):
    """Body of `eval-NNN`; one row a question beside it."""

    kind = "eval"
    schema_number = 4
    made_by = "dsg eval"
    next_command = "dsg attack"
    settings_shape = _Benches

    split: str
    results: Annotated[dict[str, Json], Shape(dict[str, _BenchResult])]
    """bench -> side (base, unlearned) -> metric, metric_stderr, n."""
    gate: Annotated[dict[str, Json], Shape(dict[str, _GateRate])]
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


class _Side(Part):
    forget_acc: Number
    forget_low: Number = 0
    forget_high: Number = 0
    n: Whole = 0
    utility_acc: Number = 0


class _UnlearnedSide(_Side):
    gate_rate: Number = 0


class _Sides(Part):
    unlearned: _UnlearnedSide
    base: _Side


class _Point(_Sides):
    x: Number | str
    variant: str


class _AttackSummary(Part):
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


class _RetainDigests(Part):
    retain: dict[str, str] = {}


class AttackReport(Body):
    """Body of `attack-NNN`."""

    kind = "attack"
    schema_number = 4
    made_by = "dsg attack"
    settings_shape = _RetainDigests

    attack: str
    threat_model: str
    bench: str
    before: Annotated[Json, Shape(_Sides)]
    """Without any attack."""
    curve: Annotated[list[Json], Shape(list[_Point])]
    summary: Annotated[Json, Shape(_AttackSummary)]
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


class _ComparedBenches(Part):
    forget: str
    near: list[str]
    other: list[str]


class _ComparedBase(Part):
    dev: dict[str, Number]
    test: dict[str, _Metrics]


class _Relearned(Part):
    x: Whole
    guarded: Number
    unguarded: Number


class _Cost(Part):
    forward_tokens: Number
    backward_tokens: Number
    seconds: Number
    peak_memory_mb: Number
    bytes: Number


class _ComparedRow(Part):
    method: str
    sae: str
    artifacts: list[str]
    values: Json
    results: dict[str, _Metrics]
    gate: dict[str, Number]
    relearned: _Relearned | Empty
    cost: _Cost | Empty
    n_features: Whole
    error: str


class _Trial(Part):
    method: str
    values: Json
    dev: dict[str, Number]
    forget: Number | None
    utility: Number | None
    score: Number | None
    seconds: Number
    is_chosen: bool
    error: str


class _RequestResult(Part):
    request: str
    artifacts: list[str]
    results: dict[str, Number]


class _RequestSequence(Part):
    method: str
    error: str
    curve: list[_RequestResult]


class Comparison(Body):
    """Body of `compare-NNN`: methods side by side."""

    kind = "compare"
    made_by = "dsg compare"

    benches: Annotated[Json, Shape(_ComparedBenches)]
    chance: Finite
    """Accuracy on forget questions without any knowledge."""
    criterion: str
    """By which settings were chosen, on dev questions."""
    base: Annotated[Json, Shape(_ComparedBase)]
    """Of the model that no method has changed."""
    rows: Annotated[list[Json], Shape(list[_ComparedRow])]
    """Also `eval` and `attack`, the artifacts that it was measured by."""
    trials: Annotated[list[Json], Shape(list[_Trial])]
    """The data of a scatter of forget accuracy against utility."""
    sequences: Annotated[list[Json], Shape(list[_RequestSequence])]
    """Requests one after another."""


class _StudyBenches(Part):
    forget: list[str]
    other: list[str]


class _StudyBase(Part):
    acc: Number
    low: Number
    high: Number
    n: Whole


class _StudyRow(Part):
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


class _StudyCost(Part):
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
    benches: Annotated[Json, Shape(_StudyBenches)]
    chance: Finite
    """Accuracy on forget questions without any knowledge."""
    base: Annotated[Json, Shape(dict[str, _StudyBase])]
    columns: list[str]
    """Of the table, those of settings and what points turned out to be; those of what was measured follow."""
    rows: Annotated[list[Json], Shape(list[_StudyRow])]
    """Intervals are 95 %: Wilson's of shares, by order statistics of medians. A point that failed has one row, which
    says why."""
    computed: Annotated[Json, Shape(_StudyCost)]
    """What it took; also `text_passes` over a corpus but for those of the features it began with, `gate_passes` over
    retain text by which gates were calibrated, requests that were `asked` of the whole model, and `n_requests` that all
    questions of all benches are."""


class _InspectedGroup(Part):
    name: str
    role: Literal["forget", "near", "retain"]
    n_documents: Whole
    n_tokens: Whole


class _TokenValue(Part):
    token: str
    value: Number


class _Neighbour(Part):
    index: Whole
    cosine: Number
    is_selected: bool


class _InspectedFeature(Part):
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
    promoted: list[_TokenValue]
    """By the logit lens on its decoder row."""
    suppressed: list[_TokenValue]
    nearest: list[_Neighbour]
    words: list[str]
    """Characteristic of its strongest contexts; only with `--samples`."""
    description: str | None
    """Neuronpedia's, if asked for."""
    warnings: list[str]


class _Overlap(Part):
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
    groups: Annotated[list[Json], Shape(list[_InspectedGroup])]
    features: Annotated[list[Json], Shape(list[_InspectedFeature])]
    overlap: Annotated[list[Json], Shape(list[_Overlap])]
