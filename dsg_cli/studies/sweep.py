"""Guardrails at many settings from what one pass over the text has found.

The statistics of select serve every number of features and every percentile. What the gate sees in retain text is
computed once for all settings at which it watches the same features, and serves every alpha. Another strength only
changes what features are set to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from torch import Tensor

from dsg_cli.artifacts import FeatureSet, Json
from dsg_cli.checkpoints import Checkpoint
from dsg_cli.detection import (
    Detection,
    Sliced,
    check_finite,
    detection_of,
    gate_statistics,
    module_of,
    sliced,
    threshold_at,
)
from dsg_cli.errors import DsgError
from dsg_cli.guardrail import GuardrailModule
from dsg_cli.model import LoadedModel
from dsg_cli.pieces import Piece
from dsg_cli.progress import Report, silent
from dsg_cli.runtime.gates import DETECTING_FORMS
from dsg_cli.sae import SaeSource
from dsg_cli.selection import scores_of, select_features
from dsg_cli.settings import CalibrateSection
from dsg_cli.strength import parse_strength

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

    Raises:
        DsgError: The gate has nothing to watch.
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
        self.detection: Detection = detection_of(settings, ground.features, ground.tensors, made="What select found")
        self.n_passes = 0
        """Over retain text, by which thresholds were set."""
        self._chosen: dict[tuple[int, float], list[int]] = {}
        self._sliced: dict[tuple[int, ...], Sliced] = {}
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
        """The guardrail of these settings.

        Raises:
            DsgError: Too few features pass, too little text for such an alpha, or a gate that could never fire.
        """
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
        """The threshold that statistics of retain text set.

        Raises:
            DsgError: Too little text for such an alpha, or a gate that could never fire.
        """
        return threshold_at(replace(self.settings, alpha=wanted.alpha), statistics)

    def indices(self, wanted: Wanted) -> list[int]:
        """The features that are clamped, in rank order.

        Raises:
            DsgError: Too few pass.
        """
        key = (wanted.n_features, wanted.ratio_percentile)
        if key not in self._chosen:
            scores = scores_of(self.ground.features.score, self.ground.tensors)
            chosen = select_features(*scores, n_features=key[0], ratio_percentile=key[1])
            self._chosen[key] = [feature.index for feature in chosen.features]
        return self._chosen[key]

    def statistics(self, wanted: Wanted, pieces: Sequence[Piece], *, what: str) -> Statistics:
        """What the gate of these settings sees in other pieces, which `what` names.

        Raises:
            DsgError: Too few features pass, or an activation is not finite.
        """
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
        if key not in self._sliced:
            self._sliced[key] = sliced(ground.sae, indices, self.detection)
        return module_of(self.settings, ground.loaded, ground.sae, self._sliced[key], self.detection, **values)

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
        found = gate_statistics(
            self.ground.loaded,
            modules,
            pieces,
            what=what,
            name=name,
            checkpoint=self.checkpoint,
            report=self.report,
        )
        check_finite([value for _, _, several in found for value in several])
        return [[(pieces[i].corpus, several[g]) for i, _, several in found] for g in range(len(modules))]
