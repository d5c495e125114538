"""What a gate reads, what it sees in held-out retain text, and the threshold that follows, with its guarantee."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsg_cli.data.batches import TokenBatch, batches
from dsg_cli.data.tokens import Piece, special_ids
from dsg_cli.errors import DsgError
from dsg_cli.guardrail.runtime.gates import DETECTING_FORMS, FORMS
from dsg_cli.guardrail.runtime.guardrail import GuardrailModule
from dsg_cli.guardrail.runtime.slice import SliceSpec
from dsg_cli.guardrail.runtime.spec import GuardrailSpec
from dsg_cli.guardrail.selection import scores_of, select_features
from dsg_cli.job import PLAIN_JOB, Job
from dsg_cli.models.language_model import LoadedModel
from dsg_cli.models.residuals import OomSplitter, read_residual
from dsg_cli.models.sae import SaeSource
from dsg_cli.settings import CalibrateSection
from dsg_cli.workspace.artifacts import FeatureSet
from dsg_cli.workspace.checkpoints import State
from dsg_cli.workspace.files import at_safe_points


def percentile_threshold(statistics: Sequence[float], alpha: float) -> float:
    """The plain (1 - alpha)-quantile, interpolated, as the paper takes it: it promises nothing where n is small."""
    if not statistics:
        raise DsgError("There is no piece of retain text to set a threshold on.", "Give more retain text.")
    return float(torch.quantile(torch.tensor(sorted(statistics), dtype=torch.float64), 1 - alpha))


def conformal_threshold(statistics: Sequence[float], alpha: float, *, what: str = "retain text") -> float:
    """The smallest threshold that a further statistic, drawn like these, exceeds with probability at most `alpha`.

    The ceil((n + 1)(1 - alpha))-th smallest of n (split conformal prediction), whatever their distribution; the plain
    percentile promises this only for large n. It assumes that statistics are exchangeable: where many pieces come
    from few documents, it holds for further pieces of such documents and less surely for new ones.
    """
    if not 0 < alpha < 1:
        raise DsgError(f"alpha is {alpha:g}; it must lie between 0 and 1.")
    n = len(statistics)
    # The product is rounded first: in floating point (n + 1)(1 - alpha) may exceed an integer by an ulp.
    rank = math.ceil(round((n + 1) * (1 - alpha), 9))
    if rank > n:
        raise DsgError(
            f"{n} pieces of {what} cannot set a threshold at alpha {alpha:g}; "
            f"at least {pieces_needed(alpha)} are needed.",
            "Give more of it, a larger --alpha, or take all retain text together (--set calibrate.guarantee=pooled).",
        )
    return sorted(statistics)[rank - 1]


def threshold_of(
    statistics: Sequence[tuple[str, float]], alpha: float, *, is_each: bool, is_conformal: bool = True
) -> float:
    """A threshold from the statistics of several corpora.

    Statistics are pairs of corpus and value. `is_each` has the rate hold for each corpus, which takes the largest of
    their thresholds, instead of for all pieces together, where text near the forgotten domain may have most of the
    false positives. Without `is_conformal` it is the plain percentile.
    """
    groups: dict[str, list[float]] = {} if statistics else {"retain text": []}
    for corpus, statistic in statistics:
        groups.setdefault(corpus if is_each else "retain text", []).append(statistic)
    if not is_conformal:
        return max(percentile_threshold(values, alpha) for values in groups.values())
    return max(conformal_threshold(values, alpha, what=name) for name, values in groups.items())


def pieces_needed(alpha: float) -> int:
    """The fewest pieces that can set a threshold."""
    return math.ceil(round(1 / alpha, 9)) - 1


def calibrated_threshold(settings: CalibrateSection, statistics: Sequence[tuple[str, float]]) -> float:
    """The threshold that pieces of retain text (corpus, statistic) set, unless the settings give one."""
    if settings.threshold is not None:
        return settings.threshold
    is_each, is_conformal = settings.guarantee == "each", settings.quantile == "conformal"
    threshold = threshold_of(statistics, settings.alpha, is_each=is_each, is_conformal=is_conformal)
    if FORMS[settings.gate][0] == "active" and threshold >= 1:
        raise DsgError(
            f"The gate could never fire: at alpha {settings.alpha:g} its threshold is {threshold:g}, the largest "
            "value that the statistic can take.",
            "The features fire on retain text too: raise --ratio-percentile or lower -n in select, or raise --alpha.",
        )
    return threshold


CUSUM_CLIP = 16.0  # Drifts that one token may add.


@dataclass(frozen=True)
class GateInputs:
    """What a gate reads: its settings, and the features that it watches beside the clamped ones."""

    settings: CalibrateSection
    detectors: list[int]  # Empty where it watches the clamped features themselves.
    weights: list[float]  # Weights of the detectors in the token score; empty where all are 1.
    bias: float = 0.0
    clip: float = 0.0


def feasible_gate(settings: CalibrateSection, features: FeatureSet) -> tuple[CalibrateSection, list[str]]:
    """The settings with the gate that features allow, and notes on what it has to do without.

    A probe is fitted on forget text, and detectors are chosen by it. For features that were picked without any,
    `window` watches the selected features themselves, each with weight 1, and takes the place of `probe`.
    """
    if features.forget_tokens or settings.gate in ("mean", "causal-mean"):
        return settings, []
    if settings.gate == "cusum":
        raise DsgError(
            "The drift of the gate cusum lies half-way between retain and forget text, and no forget text was read.",
            "Take --gate window, or select with --forget.",
        )
    instead = ", in the place of the probe, which forget text is needed for" if settings.gate == "probe" else ""
    note = f"The gate is window{instead}. It watches the selected features themselves: no text says which tell most."
    return dataclasses.replace(settings, gate="window"), [note]


def gate_inputs(
    settings: CalibrateSection, features: FeatureSet, tensors: Mapping[str, Tensor], *, where: str
) -> GateInputs:
    """What the gate of these settings reads.

    `tensors` are the statistics beside the features; `where` is what messages call them.
    """
    if settings.gate == "probe":
        probe = features.probe
        if not probe:
            raise DsgError(f"{where} has no probe.", "Run dsg select again, or calibrate with --gate window.")
        indices, weights = ([feature[key] for feature in probe["features"]] for key in ("index", "weight"))
        return GateInputs(settings, indices, weights, probe["bias"], probe["clip"])
    if settings.gate not in DETECTING_FORMS:
        return GateInputs(settings, [], [])
    detectors = _detectors(settings, features, tensors)
    if settings.gate == "window":
        return GateInputs(settings, detectors, [])
    # Half-way between what a token of retain text and one of forget text has on average.
    drift = float(sum(tensors[f"{role}_mean"][detectors].sum() for role in ("forget", "retain"))) / 2
    return GateInputs(settings, detectors, [1 / drift] * len(detectors), clip=CUSUM_CLIP)


def _detectors(settings: CalibrateSection, features: FeatureSet, tensors: Mapping[str, Tensor]) -> list[int]:
    """Features to watch: more exclusive ones than those to clamp, from the same statistics; without any, the same."""
    if not features.forget_tokens:
        return [feature.index for feature in features.features]
    try:
        selection = select_features(
            *scores_of(features.score, tensors),
            n_features=settings.n_detectors,
            ratio_percentile=settings.detector_percentile,
        )
    except DsgError as error:
        raise DsgError(
            f"Choosing the detectors of the gate `{settings.gate}`: {error.message}",
            "Lower calibrate.detector_percentile or calibrate.n_detectors (--set), or take another --gate.",
        ) from error
    return [feature.index for feature in selection.features]


def make_guardrail(
    inputs: GateInputs,
    loaded: LoadedModel,
    sae: SaeSource,
    sae_slice: tuple[SliceSpec, dict[str, Tensor]],
    *,
    threshold: float = 0.0,
    strength: float = 0.0,
) -> GuardrailModule:
    """A guardrail that is in no artifact: what watches at run time is what sets its threshold, and what is swept.

    `sae_slice` is what `slice_sae` cuts out of the SAE: the same for every threshold and strength c.
    """
    slice_spec, tensors = sae_slice
    spec = GuardrailSpec(
        gate=inputs.settings.gate,
        threshold=threshold,
        window=inputs.settings.window,
        strength=strength,
        read=sae.site.name,
        write=sae.write.name,
        slice=dataclasses.asdict(slice_spec),
        special_ids=list(special_ids(loaded.tokenizer)),
        model={},
        bias=inputs.bias,
        clip=inputs.clip,
    )
    return GuardrailModule(spec, tensors).to(loaded.model.device)


def check_finite(statistics: Sequence[float]) -> None:
    """Refuse statistics of a model that is broken."""
    if not all(map(math.isfinite, statistics)):
        raise DsgError("On a piece of text an activation is not finite.", "Check the weights, or try --dtype float32.")


@torch.inference_mode()
def gate_statistics(
    loaded: LoadedModel, gates: Sequence[GuardrailModule], pieces: Sequence[Piece], job: Job = PLAIN_JOB
) -> list[tuple[int, int, list[float]]]:
    """What gates see in pieces of text, from one pass of the model up to where they read.

    All gates, from `make_guardrail`, read at the same place; each of the job's workers gets the statistics of all:
    number of the piece, its counted tokens, and the statistic of each gate, in the order of batches.
    """
    kept = job.kept() or {"n_batches": 0, "found": []}
    n_batches: int = kept["n_batches"]
    rows: list[list[Any]] = kept["found"]  # [number of the batch, of the piece, counted tokens, statistic, ...]
    n_tokens, total = 0, sum(len(piece.ids) for piece in pieces)
    split_on_oom = OomSplitter()

    def watch(batch: TokenBatch) -> Tensor:
        resid_BLD = read_residual(loaded.model, gates[0].read, batch.ids_BL, batch.mask_BL)
        return torch.stack([gate.watch(resid_BLD, batch.counted_BL).statistic_BL.amax(-1) for gate in gates], -1)

    def state() -> State:
        return {"n_batches": n_batches, "found": rows}

    ids, device = [piece.ids for piece in pieces], str(loaded.model.device)
    with at_safe_points():
        for number, whole in enumerate(batches(ids, loaded.tokenizer, device=device)):
            n_tokens += int(whole.mask_BL.sum())
            if not job.workers.owns(number) or number < n_batches:
                continue
            for batch, statistic_BG in split_on_oom(whole, watch):
                lengths = batch.counted_BL.sum(-1).tolist()
                for i, length, statistics in zip(batch.index, lengths, statistic_BG.tolist(), strict=True):
                    rows.append([number, i, length, *statistics])
            n_batches = number + 1
            job.progress(f"{job.name} pieces, tokens", n_tokens, total)
            job.reached(state)
    job.keep(state())
    rows = sorted((row for of_worker in job.workers.gathered(rows) for row in of_worker), key=lambda row: row[0])
    return [(i, length, statistics) for _, i, length, *statistics in rows]
