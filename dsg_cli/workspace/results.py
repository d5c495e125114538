"""Bodies of the artifacts that say what was measured: evaluations, attacks, comparisons, studies, inspections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True)
class EvalReport:
    """Body of `eval-NNN`; one row a question beside it."""

    split: str
    results: dict[str, Json]
    """bench -> side (base, unlearned) -> metric, metric_stderr, n."""
    gate: dict[str, Json]
    """bench -> rate of questions with a gated choice, number of questions."""
    expected: list[Json]
    """[{expect, value, bound, met}]; evaluations of 0.1 have no bound."""
    question_ids: dict[str, list[str]]
    """bench -> the questions that the base model knows; of benches of the paper's protocol."""
    base_from: dict[str, int]
    """Earlier evaluation -> answers of the base model that were taken from it."""
    composition: list[Json]
    """What unlearned the model, in the order in which it acts: [{id, kind, method}]"""
    asked: dict[str, str]
    """Bench on free text -> digest of all that was asked: only evaluations that asked the same can be compared."""
    reference: Json
    """A model that never saw what is forgotten: {source, digest, scores: {bench: ...}}; empty without one."""
    refused: dict[str, Json]
    """Bench -> metric that could not be computed -> why."""


@dataclass(frozen=True)
class AttackReport:
    """Body of `attack-NNN`."""

    attack: str
    threat_model: str
    bench: str
    before: Json
    """{guarded: {forget_acc, ...}, unguarded: {forget_acc, ...}} without any attack."""
    curve: list[Json]
    """[{x, variant, guarded: {forget_acc, forget_low, forget_high, n, gate_rate, ...}, unguarded: {...}}]"""
    summary: Json
    """Where most came back; nulls if the unguarded model answers nowhere on the curve."""
    expected: list[Json]
    """[{expect, value, bound, met}]"""
    composition: list[Json]
    """As in an evaluation."""


@dataclass(frozen=True)
class Comparison:
    """Body of `compare-NNN`: methods side by side."""

    benches: Json
    """{forget: bench, near: [bench], other: [bench]}"""
    chance: float
    """Accuracy on forget questions without any knowledge."""
    criterion: str
    """By which settings were chosen, on dev questions."""
    base: Json
    """{dev: {bench: acc}, test: {bench: {acc, acc_low, acc_high, n}}} of the model that no method has changed."""
    rows: list[Json]
    """One a method and SAE, on test questions: {method, sae, artifacts, eval, attack, values, results, gate, relearned,
    cost, n_features, error}"""
    trials: list[Json]
    """{method, values, dev: {bench: acc}, forget, utility, forgetting, score, seconds, is_chosen, error}: the data of a
    scatter of forget accuracy against utility."""
    sequences: list[Json]
    """{method, curve: [{request, artifacts, results: {bench: acc}}], error}: requests one after another."""


@dataclass(frozen=True)
class StudyReport:
    """Body of `study-NNN`; the same rows lie beside it as CSV."""

    study: str
    split: str
    """Of the lab's questions: `dev` to choose by, or `test`."""
    grid: Json
    """Setting -> values; points are all their combinations."""
    benches: Json
    """{forget: [bench], other: [bench]}; of a study that asks nothing, empty lists."""
    chance: float
    """Accuracy on forget questions without any knowledge."""
    base: Json
    """{bench: {acc, low, high, n}} of the model without any guardrail."""
    columns: list[str]
    """Of the table, those of settings and what points turned out to be; those of what was measured follow."""
    rows: list[Json]
    """One a point and measure: {<column>, ..., bench, metric, value, low, high, n, gate_rate, gate_low, gate_high,
    error}. Intervals are 95 %: Wilson's of shares, by order statistics of medians. A point that failed has one row,
    which says why."""
    computed: Json
    """{n_points, n_failed, text_passes, gate_passes, asked, n_requests}: what it took. Passes over a corpus but for
    those of the features it began with, passes over retain text by which gates were calibrated, requests that went
    through the whole model, and how many requests all questions of all benches are."""


@dataclass(frozen=True)
class Inspection:
    """Body of `inspect-NNN`: what the features of a selection or a guardrail are about.

    Beside it one row a feature, group and context: {feature, group, document, position, peak, activations, at}, and
    with `--samples` `tokens`, the text of each. `document` is its number among those of the corpus that were drawn,
    `position` that of the peak among its tokens, BOS included; `at` says which of the activations is the peak.
    """

    inspected: str
    """Id of the features or the guardrail."""
    groups: list[Json]
    """What was read: [{name, role, n_documents, n_tokens}]; role: forget, near or retain."""
    features: list[Json]
    """[{index, roles, weight, forget_score, retain_score, ratio, rates, means, promoted, suppressed, nearest, words,
    description, warnings}]. roles: `clamped`, `watched`. weight: in the gate's score, or null. rates and means:
    group -> share of tokens on which it is active, and its mean over all tokens. promoted and suppressed:
    [{token, value}] by the logit lens on its decoder row. nearest: [{index, cosine, is_selected}] by decoder rows.
    words: characteristic of its strongest contexts (describing.py), only with `--samples`. description: Neuronpedia's,
    if asked for. What is not known is null or empty."""
    overlap: list[Json]
    """Earlier guardrails on the same SAE: [{id, n_features, shared: [index]}]"""


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2**63


def _is_none(value: Any) -> bool:
    return value is None


def _is_empty(value: Any) -> bool:
    return bool(value == {})


def _is_pair(value: Any) -> bool:
    return fits(value, [int]) and len(value) == 2


def _is_slice(value: Any) -> bool:
    """A `SliceSpec`, which the runtime makes of it."""
    return fits(value, _SLICE) and all(key in _SLICE or f"{key}?" in _SLICE for key in value)


NUMBER = _is_number

OR_NONE, OR_EMPTY = _is_none, _is_empty

_SLICE = {
    "activation": ("threshold", "gated", "topk", "abstopk"),
    "normalization?": ("none", "layer_norm", "constant_norm_rescale"),
    "is_rescaled_back?": bool,
    "k?": int,
}

_CORPORA = [{"name": str, "sha256": str, "documents?": int, "revision?": str, "weight?": NUMBER}]

_ACCURACY = {"acc?": (NUMBER, OR_NONE), "acc_low?": NUMBER, "acc_high?": NUMBER}

_METRICS = {**_ACCURACY, "*": (NUMBER, OR_NONE)}

_SIDE = {"forget_acc": NUMBER, "forget_low?": NUMBER, "forget_high?": NUMBER, "n?": int, "utility_acc?": NUMBER}

_GUARDED = {**_SIDE, "gate_rate?": NUMBER}

_POINT = {"x": (NUMBER, str), "variant": str, "guarded": _GUARDED, "unguarded": _SIDE}

_EXPECTED = {"expect": str, "value": (NUMBER, OR_NONE), "met": bool}

_PROBE = {
    "features": [{"index": int, "weight": NUMBER}],
    "bias": NUMBER,
    "clip": NUMBER,
    "path": [{"n_features": int, "balanced_accuracy": NUMBER}],
}

_DESCRIBED = {
    **dict.fromkeys(("query", "ranker", "source", "sha256"), str),
    "n_matched?": int,
    "ranking": [{"index": int, "score": NUMBER, "description?": str}],
}

_RATES = [{"what": str, "is_forget": bool, "n": int, "rate": NUMBER, "low": NUMBER, "high": NUMBER}]

_COMPOSITION = [{"id": str, "kind": str, "method": str}]

_ROW = {
    "method": str,
    "sae": str,
    "artifacts": [str],
    "values": dict,
    "results": {"*": _ACCURACY},
    "gate": {"*": NUMBER},
    "relearned": ({"x": int, "guarded": NUMBER, "unguarded": NUMBER}, OR_EMPTY),
    "cost": (
        dict.fromkeys(("forward_tokens", "backward_tokens", "seconds", "peak_memory_mb", "bytes"), NUMBER),
        OR_EMPTY,
    ),
    "n_features": int,
    "error": str,
}

_TRIAL = {
    "method": str,
    "values": dict,
    "dev": {"*": NUMBER},
    "forget": (NUMBER, OR_NONE),
    "utility": (NUMBER, OR_NONE),
    "score": (NUMBER, OR_NONE),
    "seconds": NUMBER,
    "is_chosen": bool,
    "error": str,
}

_STUDY_ROW = {
    "bench": str,
    "metric": str,
    **dict.fromkeys(("value", "low", "high", "gate_rate", "gate_low", "gate_high"), (NUMBER, OR_NONE)),
    "n": (int, OR_NONE),
    "error": str,
    "*": (NUMBER, str, bool, OR_NONE),
}

_TOKENS = [{"token": str, "value": NUMBER}]

_INSPECTED = {
    "index": int,
    "roles": [("clamped", "watched")],
    **dict.fromkeys(("weight", "forget_score", "retain_score", "ratio"), (NUMBER, OR_NONE)),
    "rates": {"*": NUMBER},
    "means": {"*": NUMBER},
    "promoted": _TOKENS,
    "suppressed": _TOKENS,
    "nearest": [{"index": int, "cosine": NUMBER, "is_selected": bool}],
    "words": [str],
    "description": (str, OR_NONE),
    "warnings": [str],
}

GIT = ({"commit": str, "dirty": bool}, OR_EMPTY)

SETTINGS: dict[str, Any] = {
    "features": {"forget": _CORPORA, "retain": _CORPORA, "limit": (int, OR_NONE)},
    "threshold": {"retain": _CORPORA, "forget?": _CORPORA, "lengths": _is_pair},
    "guardrail": {},
    "model": {"forget": _CORPORA, "retain": _CORPORA, "train?": _CORPORA},
    "wrapper": {"forget?": ([str], _CORPORA), "retain?": ([str], _CORPORA)},
    "eval": {"benches": [str]},
    "attack": {"retain?": {"*": str}},
    "compare": {},
    "study": {},
    "inspect": {},
}

BODY: dict[str, Any] = {
    "features": {"probe": (_PROBE, OR_EMPTY), "described": (_DESCRIBED, OR_EMPTY)},
    "threshold": {"rates": _RATES},
    "guardrail": {
        "strength_trials": [{"strength": NUMBER, "setting": str, "acc": NUMBER, "gate_rate": NUMBER}],
        "slice": _is_slice,
        "effect": ({"n_rows": int, "gate_rate": NUMBER, "changed_rate": NUMBER, "edit": NUMBER}, OR_EMPTY),
    },
    "model": {
        "trained": {"n_parameters": int, "n_changed": int, "modules": [str], "corpora?": [str]},
        "losses": [{"step": int, "loss": NUMBER, "*": NUMBER}],
        "cost": dict.fromkeys(("forward_passes", "backward_passes", "forward_tokens", "backward_tokens"), int),
    },
    "wrapper": {"rates": _RATES},
    "eval": {
        "composition": _COMPOSITION,
        "results": {"*": {"base": {**_METRICS, "n": int, "n_asked?": int}, "unlearned": _METRICS}},
        "gate": {"*": {"rate": NUMBER}},
        "expected": [_EXPECTED],
    },
    "attack": {
        "composition": _COMPOSITION,
        "before": {"guarded": _GUARDED, "unguarded": _SIDE},
        "curve": [_POINT],
        "summary": {
            "base_acc": NUMBER,
            "evades_above": NUMBER,
            "evaded_at": {"*": (NUMBER, str)},
            "n_points": int,
            "n_measurable": int,
            "gate_rate_at_worst": (NUMBER, OR_NONE),
            "forget_acc_before": NUMBER,
            "forget_acc_worst": (NUMBER, OR_NONE),
            "worst_x": (NUMBER, str, OR_NONE),
            "worst_variant": str,
            "unguarded_at_worst": (NUMBER, OR_NONE),
        },
        "expected": [_EXPECTED],
    },
    "compare": {
        "benches": {"forget": str, "near": [str], "other": [str]},
        "base": {"dev": {"*": NUMBER}, "test": {"*": _ACCURACY}},
        "rows": [_ROW],
        "trials": [_TRIAL],
        "sequences": [
            {"method": str, "error": str, "curve": [{"request": str, "artifacts": [str], "results": {"*": NUMBER}}]}
        ],
    },
    "study": {
        "grid": {"*": [(NUMBER, str)]},
        "benches": {"forget": [str], "other": [str]},
        "base": {"*": {"acc": NUMBER, "low": NUMBER, "high": NUMBER, "n": int}},
        "rows": [_STUDY_ROW],
        "computed": {"n_points": int, "n_failed": int},
    },
    "inspect": {
        "groups": [{"name": str, "role": ("forget", "near", "retain"), "n_documents": int, "n_tokens": int}],
        "features": [_INSPECTED],
        "overlap": [{"id": str, "n_features": int, "shared": [int]}],
    },
}
"""By kind of artifact."""


def misfits(kind: str, data: Mapping[str, Any]) -> list[str]:
    """Fields of an artifact's JSON object that do not have their shape."""
    shapes = {"git": GIT, "settings": SETTINGS[kind], **BODY[kind]}
    return [name for name, shape in shapes.items() if not fits(data.get(name), shape)]


def fits(value: Any, shape: Any) -> bool:
    """Whether a value has a shape."""
    if isinstance(shape, tuple):
        return any(fits(value, one) for one in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(item, shape[0]) for item in value)
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(_has(value, key, inner) for key, inner in shape.items())
    if isinstance(shape, str):
        return bool(value == shape)
    if shape is int:
        return type(value) is int and NUMBER(value)
    return type(value) is shape if isinstance(shape, type) else bool(shape(value))


def _has(value: dict[str, Any], key: str, shape: Any) -> bool:
    if key == "*":
        return all(fits(item, shape) for item in value.values())
    name = key.removesuffix("?")
    return fits(value[name], shape) if name in value else name != key
