"""Guardrails at many settings from what one pass over the text has found.

The statistics of select serve every number of features and every percentile. What the gate sees in retain text is
computed once for all settings at which it watches the same features, and serves every alpha. Another strength only
changes what features are set to.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from dsg_cli.attacks.target import Outcome, outcomes, requests_of
from dsg_cli.data.batches import TokenBatch
from dsg_cli.data.corpora import Corpus
from dsg_cli.data.tokens import Piece, Request, special_ids
from dsg_cli.errors import DsgError
from dsg_cli.evals.benches import Question
from dsg_cli.guardrail.calibration import (
    calibrated_threshold,
    check_finite,
    gate_inputs,
    gate_statistics,
    make_guardrail,
)
from dsg_cli.guardrail.guarded import guarded, last_decisions
from dsg_cli.guardrail.runtime.gates import DETECTING_FORMS
from dsg_cli.guardrail.runtime.guardrail import GuardrailModule
from dsg_cli.guardrail.runtime.slice import SliceSpec
from dsg_cli.guardrail.selection import scores_of, select_features
from dsg_cli.inference.scoring import Score, score
from dsg_cli.intervals import wilson
from dsg_cli.job import Job, Report, silent
from dsg_cli.models.language_model import LoadedModel, context_length
from dsg_cli.models.sae import SaeSource
from dsg_cli.models.sae_slice import slice_sae
from dsg_cli.settings import CalibrateSection, parse_strength
from dsg_cli.workspace.artifacts import FeatureSet
from dsg_cli.workspace.checkpoints import Checkpoint
from dsg_cli.workspace.results import Json

Statistics = list[tuple[str, float]]
"""Corpus and statistic of each piece."""


@dataclass(frozen=True)
class Ground:
    """What guardrails are made on."""

    name: str
    """Another for every other ground."""
    loaded: LoadedModel
    """The whole model."""
    sae: SaeSource
    features: FeatureSet
    tensors: Mapping[str, Tensor]
    """Statistics of every feature of the SAE."""
    bos: int | None
    pieces: Mapping[str, Sequence[Piece]]
    """`calibrate` sets thresholds, `fresh` measures them: retain text."""


@dataclass(frozen=True)
class Wanted:
    """The settings of one guardrail."""

    n_features: int
    ratio_percentile: float
    alpha: float
    strength: str

    def at(self, point: Json) -> Wanted:
        """With the values that a point of a grid has for them."""
        return replace(self, **{one.name: point[one.name] for one in fields(self) if one.name in point})


@dataclass(frozen=True)
class Guard:
    """A guardrail, and what is known of its gate."""

    module: GuardrailModule
    watches: str
    """What its gate watches: of two that watch the same the statistics are the same."""
    n_fresh: int
    n_false: int
    """Fresh pieces of retain text on which it opens."""

    @property
    def threshold(self) -> float:
        return self.module.gate.threshold


class Guards:
    """All guardrails on one ground.

    Args:
        ground: Model, SAE, statistics and retain text.
        settings: The gate; its alpha does not matter.
        checkpoint: Where passes over retain text are kept.
        report: Progress.
    """

    def __init__(
        self,
        ground: Ground,
        settings: CalibrateSection,
        *,
        checkpoint: Checkpoint | None = None,
        report: Report = silent,
    ) -> None:
        self.ground, self.settings = ground, settings
        self.checkpoint, self.report = checkpoint or Checkpoint(), report
        self.inputs = gate_inputs(settings, ground.features, ground.tensors, where="What select found")
        self.n_passes = 0
        """Over retain text, by which thresholds were set."""
        self._chosen: dict[tuple[int, float], list[int]] = {}
        self._slices: dict[tuple[int, ...], tuple[SliceSpec, dict[str, Tensor]]] = {}
        self._seen: dict[str, dict[str, Statistics]] = {}
        self._others: dict[str, Statistics] = {}

    def prepare(self, wanted: Sequence[Wanted]) -> None:
        """See retain text with the gates of all these settings in one pass; those that cannot be made are left out."""
        missing: dict[str, list[int]] = {}
        for one in wanted:
            try:
                indices = self.indices(one)
            except DsgError:  # It is said where that guardrail is made.
                continue
            if (name := self._watches(indices)) not in self._seen:
                missing[name] = indices
        if missing:
            self._see(missing)

    def make(self, wanted: Wanted) -> Guard:
        """The guardrail of these settings."""
        self.prepare([wanted])
        indices = self.indices(wanted)
        watches = self._watches(indices)
        threshold = self.threshold(wanted, self._seen[watches]["calibrate"])
        fresh = [statistic for _, statistic in self._seen[watches]["fresh"]]
        strength = parse_strength(wanted.strength, self.ground.features.median_residual_norm)
        module = self._module(indices, threshold=threshold, strength=strength)
        # By which those that act together are told apart; a digest of its tensors is for guardrails in files.
        module.key = f"{self.ground.name} {wanted}"
        return Guard(module, watches, len(fresh), sum(statistic > threshold for statistic in fresh))

    def threshold(self, wanted: Wanted, statistics: Statistics) -> float:
        """The threshold that statistics of retain text set."""
        return calibrated_threshold(replace(self.settings, alpha=wanted.alpha), statistics)

    def indices(self, wanted: Wanted) -> list[int]:
        """The features that are clamped, in rank order."""
        key = (wanted.n_features, wanted.ratio_percentile)
        if key not in self._chosen:
            scores = scores_of(self.ground.features.score, self.ground.tensors)
            chosen = select_features(*scores, n_features=key[0], ratio_percentile=key[1])
            self._chosen[key] = [feature.index for feature in chosen.features]
        return self._chosen[key]

    def statistics(self, wanted: Wanted, pieces: Sequence[Piece], *, what: str) -> Statistics:
        """What the gate of these settings sees in other pieces, which `what` names."""
        indices = self.indices(wanted)
        name = f"{what} of {self._watches(indices)}"
        if name not in self._others:
            (self._others[name],) = self._statistics([self._module(indices)], pieces, what, name)
        return self._others[name]

    def _watches(self, indices: Sequence[int]) -> str:
        if self.settings.gate in DETECTING_FORMS:
            return self.ground.name
        return f"{self.ground.name} {' '.join(map(str, sorted(indices)))}"

    def _module(self, indices: Sequence[int], **values: float) -> GuardrailModule:
        ground, key = self.ground, tuple(indices)
        if key not in self._slices:
            self._slices[key] = slice_sae(ground.sae, indices, self.inputs.detectors, self.inputs.weights)
        return make_guardrail(self.inputs, ground.loaded, ground.sae, self._slices[key], **values)

    def _see(self, missing: Mapping[str, list[int]]) -> None:
        modules = [self._module(indices) for indices in missing.values()]
        names = list(missing)
        self.n_passes += 1
        found = {
            part: self._statistics(modules, self.ground.pieces[part], part, f"{part} of {names!r}")
            for part in ("calibrate", "fresh")
        }
        for i, name in enumerate(names):
            self._seen[name] = {part: of_gates[i] for part, of_gates in found.items()}

    def _statistics(
        self, modules: Sequence[GuardrailModule], pieces: Sequence[Piece], what: str, name: str
    ) -> list[Statistics]:
        """Of each gate, from one pass."""

        def progress(_name: str, n_done: int, n_total: int) -> None:
            self.report(f"{what} pieces, tokens", n_done, n_total)

        job = Job(checkpoint=self.checkpoint, progress=progress, name=name)
        found = gate_statistics(self.ground.loaded, modules, pieces, job)
        check_finite([value for _, _, several in found for value in several])
        return [[(pieces[i].corpus, several[g]) for i, _, several in found] for g in range(len(modules))]


class Asker:
    """Questions of several benches and what the base model answers.

    Args:
        loaded: The model, whole.
        questions: By bench.
        bos: Token that every sequence begins with.
        batch_size: Sequences in a batch.
        report: Progress.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        questions: Mapping[str, Sequence[Question]],
        *,
        bos: int | None,
        batch_size: int,
        report: Report = silent,
    ) -> None:
        self.loaded, self.questions = loaded, questions
        self.batch_size, self.report = batch_size, report
        self.max_length = context_length(loaded.model.config)
        self.n_asked = 0
        """Requests that went through the whole model."""
        of_bench = {bench: requests_of(loaded.tokenizer, several, bos=bos) for bench, several in questions.items()}
        self._requests = [request for several in of_bench.values() for request in several]
        self._n_requests = {bench: len(several) for bench, several in of_bench.items()}
        self._inputs = list(dict.fromkeys(request.inputs(self.max_length) for request in self._requests))
        self._seen: dict[str, dict[tuple[int, ...], float]] = {}
        """What a gate watches -> what it sees of each input."""
        self._base = self._scored(self._requests, ())

    def base(self) -> dict[str, list[Outcome]]:
        """What the model answers without any guardrail, by bench."""
        return self._outcomes(self._base, [False] * len(self._base))

    def under(self, guards: Sequence[Guard]) -> dict[str, list[Outcome]]:
        """What it answers under guardrails that act together, by bench."""
        seen = [(guard, self._statistics(guard)) for guard in guards]
        is_open = {
            row: any(not statistics[row] <= guard.module.gate.threshold for guard, statistics in seen)
            for row in self._inputs
        }
        opened = [i for i, request in enumerate(self._requests) if is_open[request.inputs(self.max_length)]]
        found = self._scored([self._requests[i] for i in opened], guards)
        scores, decided = list(self._base), [False] * len(self._base)
        for i, one in zip(opened, found, strict=True):
            scores[i], decided[i] = one, bool(one.note)
        return self._outcomes(scores, decided)

    def _statistics(self, guard: Guard) -> dict[tuple[int, ...], float]:
        if guard.watches not in self._seen:
            pieces = [Piece(str(i), "", list(row)) for i, row in enumerate(self._inputs)]
            job = Job(progress=self.report, name="questions")
            found = gate_statistics(self.loaded, [guard.module], pieces, job)
            check_finite([statistic for _, _, (statistic,) in found])
            self._seen[guard.watches] = {self._inputs[i]: statistic for i, _, (statistic,) in found}
        return self._seen[guard.watches]

    def _scored(self, requests: Sequence[Request], guards: Sequence[Guard]) -> list[Score]:
        """Scores, noting of each whether a gate opened."""
        modules, model = [guard.module for guard in guards], self.loaded.model
        self.n_asked += len(requests)

        def note(_batch: TokenBatch) -> list[bool]:
            return [is_gated for _, is_gated, _ in last_decisions(modules)]

        # It is the model that the guardrails were made on a moment ago.
        with guarded(model, modules, allow_mismatch=True):
            return score(
                model,
                requests,
                pad=self.loaded.tokenizer.pad_token_id or 0,
                special=special_ids(self.loaded.tokenizer),
                batch_size=self.batch_size,
                max_length=self.max_length,
                device=str(model.device),
                note=note if modules else None,
                what="asking",
                report=self.report,
            )

    def _outcomes(self, scores: Sequence[Score], decided: Sequence[bool]) -> dict[str, list[Outcome]]:
        found: dict[str, list[Outcome]] = {}
        start = 0
        for bench, questions in self.questions.items():
            own = slice(start, start + self._n_requests[bench])
            found[bench] = outcomes(questions, scores[own], decided[own])
            start = own.stop
        return found


MEASURES = ("bench", "metric", "value", "low", "high", "n", "gate_rate", "gate_low", "gate_high", "error")
"""Columns after those of the settings. `low` and `high` are a 95 % interval: Wilson's of shares, of medians one by
order statistics, which assumes nothing of how values are distributed."""


def row_of(point: Json, metric: str, *, bench: str = "", value: float | None = None, **measured: object) -> Json:
    """One row; measures that are not given are null."""
    return {**point, **dict.fromkeys(MEASURES), "bench": bench, "metric": metric, "value": value, "error": ""} | (
        measured
    )


def failed_row(point: Json, error: str, *, metric: str = "") -> Json:
    """The row of a point, or of one of its measures, that could not be had."""
    return row_of(point, metric, error=error)


def rate_row(point: Json, metric: str, n_of: int, n: int, *, bench: str = "") -> Json:
    """A share of n."""
    low, high = wilson(n_of, n)
    return row_of(point, metric, bench=bench, value=n_of / n if n else None, low=low, high=high, n=n)


def accuracy_row(point: Json, bench: str, found: Sequence[Outcome], *, metric: str = "acc") -> Json:
    """Accuracy on questions, with the share of them that was gated."""
    made = rate_row(point, metric, sum(one.is_right for one in found), len(found), bench=bench)
    n_gated = sum(one.is_gated for one in found)
    low, high = wilson(n_gated, len(found))
    return made | {"gate_rate": n_gated / len(found) if found else None, "gate_low": low, "gate_high": high}


def accuracy_rows(point: Json, found: Mapping[str, Sequence[Outcome]]) -> list[Json]:
    """The same of every bench."""
    return [accuracy_row(point, bench, several) for bench, several in found.items()]


def median_row(point: Json, metric: str, values: Sequence[float]) -> Json:
    """The median of values, and its interval."""
    low, high = median_interval(values)
    return row_of(point, metric, value=statistics.median(values), low=low, high=high, n=len(values))


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % interval of the median: the narrowest pair of order statistics, alike from both ends, that has it.

    Of fewer than six values no pair has; it is then the smallest and the largest.
    """
    from scipy.stats import binom

    ordered, n = sorted(values), len(values)
    k = 0
    while 2 * (k + 2) <= n and 2 * binom.cdf(k + 1, n, 0.5) <= 0.05:
        k += 1
    # The median lies below the (k+1)-th smallest value with a chance of P(at most k of n lie below the median).
    return ordered[k], ordered[n - 1 - k]


def csv_text(columns: Sequence[str], rows: Sequence[Json]) -> str:
    """Rows as CSV: setting columns, then measures; numbers as they are, nothing where a row has none."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns, *MEASURES], lineterminator="\n", extrasaction="raise")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@dataclass(frozen=True)
class Rig:
    """All that a study measures with."""

    wanted: Wanted
    """The recipe's own settings, for what a grid does not vary."""
    guards_at: Callable[[Mapping[str, Any]], Guards]
    """Guardrails where a recipe has these values at dotted keys."""
    guards_on: Callable[[Sequence[Corpus]], Guards]
    """Guardrails made with other forget text."""
    asker: Callable[[Guards], Asker]
    """Questions that begin as the text did on which they were made."""
    pieces: Callable[[str, int, bool], list[Piece]]
    """Pieces of so many tokens: of `calibrate` or `fresh` retain text or of `forget` text; packed, or each from one
    document."""
    forget: Sequence[Corpus]
    retain: Sequence[str]
    """Retain corpora by name, with weights."""
    names: Sequence[str]
    """Entities that forget text is about; empty where none are known."""
    requests: Sequence[str]
    """Corpora that are to be forgotten one after another, the first one first."""
    forget_bench: str
    repeats: int
    seed: int


def guarded_rows(point: Json, rig: Rig, guards: Guards) -> list[Json]:
    """The guardrail of a point on every bench, its threshold and its false positives."""
    guard = guards.make(rig.wanted.at(point))
    return [*accuracy_rows(point, rig.asker(guards).under([guard])), *gate_rows(point, guard)]


def gate_rows(point: Json, guard: Guard) -> list[Json]:
    """What is known of a gate from retain text."""
    return [
        rate_row(point, "false_positive_rate", guard.n_false, guard.n_fresh),
        row_of(point, "threshold", value=guard.threshold),
    ]
