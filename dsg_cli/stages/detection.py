"""What a gate watches, from the features that select wrote: shared by calibration and by studies of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dsg_cli.artifacts import FeatureSet
from dsg_cli.errors import DsgError
from dsg_cli.model import LoadedModel
from dsg_cli.runtime.gates import DETECTING_FORMS
from dsg_cli.runtime.guardrail import GuardrailModule
from dsg_cli.runtime.spec import GuardrailSpec
from dsg_cli.sae import SaeSource
from dsg_cli.selection import select_features
from dsg_cli.settings import CalibrateSection
from dsg_cli.slicing import detector_weights, slice_sae
from dsg_cli.tokens import special_ids
from dsg_cli.workspace import Stored, Workspace

CUSUM_CLIP = 16.0
"""Drifts that one token may add."""


@dataclass(frozen=True)
class Detection:
    """What a gate watches, beside the clamped features."""

    detectors: list[int]
    weights: list[float]
    bias: float = 0.0
    clip: float = 0.0


def detection_of(settings: CalibrateSection, workspace: Workspace, features: Stored) -> Detection:
    """What the gate watches.

    Raises:
        DsgError: The features have no probe, or too few of them can be detectors.
    """
    if settings.gate == "probe":
        probe = features.body_as(FeatureSet).probe
        if not probe:
            raise DsgError(f"{features.id} has no probe.", "Run dsg select again, or calibrate with --gate window.")
        watched = probe["features"]
        indices, weights = ([one[key] for one in watched] for key in ("index", "weight"))
        return Detection(indices, weights, probe["bias"], probe["clip"])
    if settings.gate not in DETECTING_FORMS:
        return Detection([], [])
    tensors = workspace.tensors(features)
    detectors = _detectors(settings, features, tensors)
    if settings.gate == "window":
        return Detection(detectors, [])
    # Half-way between what a token of retain text and one of forget text has on average.
    drift = float(sum(tensors[f"{role}_mean"][detectors].sum() for role in ("forget", "retain"))) / 2
    return Detection(detectors, [1 / drift] * len(detectors), clip=CUSUM_CLIP)


def _detectors(settings: CalibrateSection, features: Stored, tensors: dict[str, Tensor]) -> list[int]:
    """Features to watch: more exclusive ones than those to clamp, from the same statistics."""
    name = "mean_square" if features.body_as(FeatureSet).score == "mean-square" else "mean"
    scores = [tensors[f"{role}_{name}"] for role in ("forget", "retain")]
    if name == "mean":
        scores = [score.square() for score in scores]
    try:
        chosen = select_features(
            *scores,
            n_features=settings.n_detectors,
            ratio_percentile=settings.detector_percentile,
        )
    except DsgError as error:
        raise DsgError(
            f"Choosing the detectors of the gate `{settings.gate}`: {error.message}",
            "Lower calibrate.detector_percentile or calibrate.n_detectors (--set), or take another --gate.",
        ) from error
    return [feature.index for feature in chosen.features]


def watching(
    settings: CalibrateSection, loaded: LoadedModel, sae: SaeSource, indices: Sequence[int], detection: Detection
) -> GuardrailModule:
    """A guardrail without threshold or strength: what watches at run time also watches here."""
    slice_spec, tensors = slice_sae(sae, indices, detection.detectors)
    tensors["detect"] = detector_weights(indices, detection.detectors, detection.weights)
    spec = GuardrailSpec(
        gate=settings.gate,
        threshold=0.0,
        window=settings.window,
        strength=0.0,
        read=sae.site.name,
        write=sae.write.name,
        slice=dataclasses.asdict(slice_spec),
        special_ids=list(special_ids(loaded.tokenizer)),
        model={},
        bias=detection.bias,
        clip=detection.clip,
    )
    return GuardrailModule(spec, tensors).to(loaded.model.device)
