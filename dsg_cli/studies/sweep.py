"""Guardrails at many settings, and what the model answers under them, from what one pass over the text has computed.

The statistics of select serve every number of features and every percentile. What the gate sees in retain text is
computed once for all settings at which it watches the same features, and serves every alpha. Another strength only
changes what features are set to. The base model answers all questions once; a guarded one those that its gate opens on.
"""

from __future__ import annotations

import csv
import io
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from dsg_cli.data.corpora import Corpus
from dsg_cli.data.tokens import Piece, Request, draw_pieces
from dsg_cli.errors import DsgError
from dsg_cli.evals.questions import Outcome, Question, outcomes, requests_of
from dsg_cli.guardrail.calibration import (
    GateInputs,
    calibrated_threshold,
    check_finite,
    gate_statistics,
    make_guardrail,
)
from dsg_cli.guardrail.runtime.gates import DETECTING_FORMS
from dsg_cli.guardrail.runtime.guardrail import GuardrailModule
from dsg_cli.guardrail.selection import scores_of, select_features
from dsg_cli.inference.scoring import GuardedModel, Score
from dsg_cli.intervals import median_interval, wilson
from dsg_cli.job import Job
from dsg_cli.models.language_model import LoadedModel, context_length
from dsg_cli.models.sae import SaeSource
from dsg_cli.models.sae_slice import slice_sae
from dsg_cli.settings import CalibrateSection, Recipe, parse_strength, values_at
from dsg_cli.studies import AXES, OF_A_GUARDRAIL
from dsg_cli.workspace.artifacts import FeatureSet
from dsg_cli.workspace.body import Json

T = TypeVar("T")

Statistics = list[tuple[str, float]]
"""Corpus and gate statistic of each calibration piece."""


@dataclass(frozen=True)
class SweepBase:
    """SAE, features and retain text that guardrails of a sweep are built on."""

    key: str
    """Unique for each combination of SAE, corpora and seed."""
    sae: SaeSource
    features: FeatureSet
    tensors: Mapping[str, Tensor]
    """Statistics of every feature of the SAE."""
    bos: int | None
    pieces: Mapping[str, Sequence[Piece]]
    """`calibrate` sets thresholds, `fresh` measures them: retain text."""
    gate: CalibrateSection
    """Its alpha does not matter."""
    watched: GateInputs
    """By the gate, beside the clamped features."""


@dataclass(frozen=True)
class SweptGuardrail:
    """A guardrail of a sweep, and what is known of its gate."""

    module: GuardrailModule
    base: SweepBase
    watches: str
    """What its gate watches: of two that watch the same the statistics are the same."""
    n_fresh: int
    n_false: int
    """Fresh pieces of retain text on which it opens."""

    @property
    def threshold(self) -> float:
        return self.module.gate.threshold


@dataclass
class Sweep:
    """Guardrails at any point of a grid, and answers under them; nothing is computed twice, and nothing written."""

    loaded: LoadedModel
    """The whole model."""
    base_at: Callable[[Mapping[str, Any]], SweepBase]
    """The base where a recipe has these values at dotted keys; each is made once."""
    base_on: Callable[[Sequence[Corpus]], SweepBase]
    """The base with other forget text; each is made once."""
    recipe: Recipe
    """Says what a grid does not vary."""
    questions: Mapping[str, Sequence[Question]]
    """By bench."""
    forget_bench: str
    forget: Sequence[Corpus]
    retain: Sequence[Corpus]
    """What thresholds are set on."""
    entities: Sequence[str]
    """Names that forget text is about; empty where none are known."""
    job: Job
    """Its checkpoint keeps passes over retain text."""
    n_gate_passes: int = 0
    """Over retain text, by which thresholds were set."""
    n_asked: int = 0
    """Requests that went through the whole model."""
    _cache: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def guardrail(self, point: Json, base: SweepBase | None = None) -> SweptGuardrail:
        """The guardrail of a point of the grid; on the recipe's own base, if no other is given."""
        base = base or self.base_at({})
        self.prepare([point], base)
        settings, indices = self._settings(point), self._indices(point, base)
        watches = self._watches(indices, base)
        threshold = self.threshold(point, self._cache["seen", watches, "calibrate"], base)
        fresh = [statistic for _, statistic in self._cache["seen", watches, "fresh"]]
        strength = parse_strength(settings["strength"], base.features.median_residual_norm)
        module = self._module(indices, base, threshold=threshold, strength=strength)
        # By which those that act together are told apart; a digest of its tensors is for guardrails in files.
        module.key = f"{base.key} {settings}"
        return SweptGuardrail(module, base, watches, len(fresh), sum(statistic > threshold for statistic in fresh))

    def prepare(self, points: Sequence[Json], base: SweepBase | None = None) -> None:
        """See retain text with the gates of all these points in one pass; those that cannot be made are left out."""
        base = base or self.base_at({})
        unseen: dict[str, list[int]] = {}
        for point in points:
            try:
                indices = self._indices(point, base)
            except DsgError:  # It is said where that guardrail is made.
                continue
            if ("seen", watches := self._watches(indices, base), "fresh") not in self._cache:
                unseen[watches] = indices
        if not unseen:
            return
        self.n_gate_passes += 1
        modules = [self._module(indices, base) for indices in unseen.values()]
        for part in ("calibrate", "fresh"):
            of_gates = self._see(modules, base.pieces[part], part, f"{part} of {list(unseen)!r}")
            self._cache |= {("seen", watches, part): seen for watches, seen in zip(unseen, of_gates, strict=True)}

    def threshold(self, point: Json, seen: Statistics, base: SweepBase) -> float:
        return calibrated_threshold(replace(base.gate, alpha=self._settings(point)["alpha"]), seen)

    def statistics(self, point: Json, part: str, length: int) -> Statistics:
        """What the gate of a point sees in pieces of so many tokens, on the recipe's own base."""
        base, pieces = self.base_at({}), self.pieces(part, length, is_packed=False)
        indices, what = self._indices(point, base), f"{part}, {length} tokens"
        watches = self._watches(indices, base)

        def see() -> Statistics:
            return self._see([self._module(indices, base)], pieces, what, f"{what} of {watches}")[0] if pieces else []

        return self._once(("seen", watches, part, length), see)

    def pieces(self, part: str, length: int, *, is_packed: bool) -> list[Piece]:
        """Pieces of so many tokens, BOS not counted, of `calibrate` or `fresh` retain text or of `forget` text.

        What a user says in a chat has its own length, and is none.
        """
        base, corpora = self.base_at({}), self.forget if part == "forget" else self.retain
        draw = partial(
            draw_pieces,
            self.loaded.tokenizer,
            [replace(corpus, weight=None) for corpus in corpora if not corpus.is_chat],
            "calibrate" if part == "calibrate" else "fresh",
            bos=base.bos,
            lengths=[length],
            is_packed=is_packed or base.gate.rows == "packed",
            at_most=base.gate.max_pieces,
            seed=self.recipe.seed,
        )
        return self._once(("pieces", part, length, is_packed), draw)

    def accuracy(self, guardrails: Sequence[SweptGuardrail], bos: int | None) -> dict[str, list[Outcome]]:
        """Outcome of every question by bench, under guardrails that act together or, without any, of the base model.

        Every sequence begins with `bos`, as the text did on which they were made.
        """
        by_bench = self._once(("requests", bos), lambda: self._requests(bos))
        requests = [request for of_bench in by_bench.values() for request in of_bench]
        scores = list(self._once(("base", bos), lambda: self._score(requests, ())))
        if guardrails:
            max_length = context_length(self.loaded.model.config)
            inputs = [request.inputs(max_length) for request in requests]
            seen = [(self._see_questions(guardrail, inputs, bos), guardrail.threshold) for guardrail in guardrails]
            opened = [
                i for i, row in enumerate(inputs) if any(not known[row] <= threshold for known, threshold in seen)
            ]
            for i, answer in zip(opened, self._score([requests[i] for i in opened], guardrails), strict=True):
                scores[i] = answer
        rest = iter(scores)
        return {
            bench: outcomes(questions, list(itertools.islice(rest, len(by_bench[bench]))))
            for bench, questions in self.questions.items()
        }

    def _requests(self, bos: int | None) -> dict[str, list[Request]]:
        tokenizer = self.loaded.tokenizer
        return {bench: requests_of(tokenizer, of_bench, bos=bos) for bench, of_bench in self.questions.items()}

    def _once(self, key: tuple[Any, ...], compute: Callable[[], T]) -> T:
        if key not in self._cache:
            self._cache[key] = compute()
        value: T = self._cache[key]
        return value

    def _settings(self, point: Json) -> Json:
        defaults = values_at(self.recipe, [AXES[name].key for name in OF_A_GUARDRAIL])
        return {name: point.get(name, defaults[AXES[name].key]) for name in OF_A_GUARDRAIL}

    def _indices(self, point: Json, base: SweepBase) -> list[int]:
        settings = {name: self._settings(point)[name] for name in ("n_features", "ratio_percentile")}

        def choose() -> list[int]:
            selection = select_features(*scores_of(base.features.score, base.tensors), **settings)
            return [feature.index for feature in selection.features]

        return self._once(("indices", base.key, *settings.values()), choose)

    def _watches(self, indices: Sequence[int], base: SweepBase) -> str:
        if base.gate.gate in DETECTING_FORMS:
            return base.key
        return f"{base.key} {' '.join(map(str, sorted(indices)))}"

    def _module(self, indices: Sequence[int], base: SweepBase, **values: float) -> GuardrailModule:
        cut = partial(slice_sae, base.sae, indices, base.watched.detectors, base.watched.weights)
        sae_slice = self._once(("slice", base.key, *indices), cut)
        return make_guardrail(base.watched, self.loaded, base.sae, sae_slice, **values)

    def _see(
        self, modules: Sequence[GuardrailModule], pieces: Sequence[Piece], what: str, name: str
    ) -> list[Statistics]:
        """Statistics of each gate, from one pass; `name` is that of the pass in the checkpoint."""

        def progress(_name: str, n_done: int, n_total: int) -> None:
            self.job.progress(f"{what} pieces, tokens", n_done, n_total)

        rows = gate_statistics(self.loaded, modules, pieces, replace(self.job, progress=progress, name=name))
        check_finite([value for _, _, values in rows for value in values])
        return [[(pieces[i].corpus, values[g]) for i, _, values in rows] for g in range(len(modules))]

    def _see_questions(
        self, guardrail: SweptGuardrail, inputs: Sequence[tuple[int, ...]], bos: int | None
    ) -> dict[tuple[int, ...], float]:
        def see() -> dict[tuple[int, ...], float]:
            rows = list(dict.fromkeys(inputs))
            pieces = [Piece(str(i), "", list(row)) for i, row in enumerate(rows)]
            job = Job(progress=self.job.progress, name="questions")
            statistics = gate_statistics(self.loaded, [guardrail.module], pieces, job)
            check_finite([statistic for _, _, (statistic,) in statistics])
            return {rows[i]: statistic for i, _, (statistic,) in statistics}

        return self._once(("questions", guardrail.watches, bos), see)

    def _score(self, requests: Sequence[Request], guardrails: Sequence[SweptGuardrail]) -> list[Score]:
        self.n_asked += len(requests)
        model = GuardedModel(
            self.loaded.model,
            self.loaded.tokenizer,
            guardrails=[guardrail.module for guardrail in guardrails],
            batch_size=self.recipe.eval.batch_size,
        )
        return model.loglikelihoods(requests, Job(progress=self.job.progress, name="asking"))


MEASURES = ("bench", "metric", "value", "low", "high", "n", "gate_rate", "gate_low", "gate_high", "error")
"""Columns after those of the settings. `low` and `high` are a 95 % interval: Wilson's of shares, of medians one by
order statistics, which assumes nothing of how values are distributed."""


def row_of(point: Json, metric: str, *, bench: str = "", value: float | None = None, **measured: object) -> Json:
    """One row; measures that are not given are null."""
    return {**point, **dict.fromkeys(MEASURES), "bench": bench, "metric": metric, "value": value, "error": ""} | (
        measured
    )


def rate_row(point: Json, metric: str, n_of: int, n: int, *, bench: str = "") -> Json:
    """A share of n."""
    low, high = wilson(n_of, n)
    return row_of(point, metric, bench=bench, value=n_of / n if n else None, low=low, high=high, n=n)


def accuracy_row(point: Json, bench: str, answers: Sequence[Outcome], *, metric: str = "acc") -> Json:
    """Accuracy on questions, with the share of them that was gated."""
    n = len(answers)
    n_right, n_gated = sum(answer.is_right for answer in answers), sum(answer.is_gated for answer in answers)
    low, high = wilson(n_gated, n)
    row = rate_row(point, metric, n_right, n, bench=bench)
    return row | {"gate_rate": n_gated / n if n else None, "gate_low": low, "gate_high": high}


def accuracy_rows(point: Json, answers: Mapping[str, Sequence[Outcome]]) -> list[Json]:
    """Accuracy on every bench."""
    return [accuracy_row(point, bench, of_bench) for bench, of_bench in answers.items()]


def median_row(point: Json, metric: str, values: Sequence[float]) -> Json:
    """The median of values, and its interval."""
    low, high = median_interval(values)
    return row_of(point, metric, value=statistics.median(values), low=low, high=high, n=len(values))


def csv_text(columns: Sequence[str], rows: Sequence[Json]) -> str:
    """Rows as CSV: setting columns, then measures; numbers as they are, nothing where a row has none."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns, *MEASURES], lineterminator="\n", extrasaction="raise")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def guardrail_rows(point: Json, sweep: Sweep, base: SweepBase) -> list[Json]:
    """The guardrail of a point on every bench, its threshold and its false positives."""
    guardrail = sweep.guardrail(point, base)
    return [*accuracy_rows(point, sweep.accuracy([guardrail], base.bos)), *gate_rows(point, guardrail)]


def gate_rows(point: Json, guardrail: SweptGuardrail) -> list[Json]:
    """What is known of a gate from retain text."""
    return [
        rate_row(point, "false_positive_rate", guardrail.n_false, guardrail.n_fresh),
        row_of(point, "threshold", value=guardrail.threshold),
    ]
