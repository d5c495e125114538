"""Bodies of the artifacts that say what was measured: evaluations, attacks, comparisons, studies, inspections."""

from __future__ import annotations

from dataclasses import dataclass

from dsg_cli.provenance import Json


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
