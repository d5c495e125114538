"""`dsg calibrate`: from which gate statistic on does a text count as being about the forgotten knowledge?

Reads the `calibrate` part of the retain corpora, which selection never saw, in pieces of the lengths that prompts
have; sets the threshold so that a share `alpha` of them exceeds it; measures on the `fresh` part what it promises;
writes threshold-NNN.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsg_cli.artifacts import FeatureSet, Header, Json, Threshold
from dsg_cli.calibration import clopper_pearson, conformal_threshold
from dsg_cli.checkpoints import Checkpoint, State
from dsg_cli.corpora import Corpus, Part, check_disjoint, check_named, load_corpora
from dsg_cli.errors import DsgError
from dsg_cli.fitting import Fitting
from dsg_cli.guardrail import GuardrailModule
from dsg_cli.interruption import at_safe_points
from dsg_cli.model import LoadedModel, context_length
from dsg_cli.pieces import draw_pieces
from dsg_cli.prompting import check_chat
from dsg_cli.recipe import Recipe
from dsg_cli.residuals import read_residual
from dsg_cli.runtime.guardrail import GuardrailSpec
from dsg_cli.sae import SaeSource
from dsg_cli.selection import select_features
from dsg_cli.settings import CalibrateSection
from dsg_cli.slicing import detector_weights, slice_sae
from dsg_cli.stages.chain import chain_sae, load_chain_model, settle
from dsg_cli.stages.provenance import Clock, new_header
from dsg_cli.stages.session import QUIET, Session
from dsg_cli.tokens import TokenBatch, batches, bos_to_prepend, special_ids
from dsg_cli.workspace import Stored, Workspace

PARTS: tuple[Part, ...] = ("calibrate", "fresh")
"""What sets the threshold, and what it is measured on."""


def run(recipe: Recipe, workspace: Workspace, *, source: str | None = None, session: Session = QUIET) -> Stored:
    """Set the threshold of the newest features, or of those named, and write it.

    Raises:
        DsgError: Anything the user can mend.
    """
    clock = Clock()
    source = session.named(workspace, "features", source)
    with session.workers.in_turn():
        made = _prepared(recipe, workspace, source)
    if (stored := session.existing(workspace, made.header)) is not None:
        return stored
    with session.checkpoint(workspace, made.header) as checkpoint:
        rows: list[Json] = []
        for part in PARTS:
            rows += _statistics(made, part, recipe, session, checkpoint)
        body = _threshold(made, recipe.calibrate, rows)
        rows = [{**row, "gated": row["statistic"] > body.threshold} for row in rows]
        n_tokens = sum(row["length"] for row in rows)
        return session.write(
            workspace, lambda: workspace.write(clock.close(made.header, n_tokens=n_tokens), body, rows=rows)
        )


@dataclass(frozen=True)
class _Prepared:
    """All that the pass needs."""

    features: Stored
    retain: list[Corpus]
    loaded: LoadedModel
    gate: GuardrailModule
    indices: list[int]
    detectors: list[int]
    bos: int | None
    lengths: tuple[int, int]
    header: Header


def _prepared(recipe: Recipe, workspace: Workspace, source: str | None) -> _Prepared:
    """Everything checked and read.

    Raises:
        DsgError: Anything the user can mend.
    """
    settings = recipe.calibrate
    features = workspace.find("features", source)
    workspace.check_writable()
    recipe = settle(recipe, features.header)
    selected = features.header.settings
    names = settings.retain or [_spelled(corpus) for corpus in selected["retain"]]
    check_named(names, role="retain")
    check_disjoint([corpus["name"] for corpus in selected["forget"]], names)
    retain = load_corpora(
        names,
        role="retain",
        limit=recipe.corpora.limit,
        seed=recipe.seed,
        revisions={corpus["name"]: corpus.get("revision") for corpus in selected["retain"]},
    )
    assert features.header.sae is not None
    sae = chain_sae(features.header.sae, features.id)
    loaded = load_chain_model(features.header, recipe, cut=True)
    header = new_header(
        "threshold",
        recipe,
        settings={
            **dataclasses.asdict(settings),
            "retain": [corpus.described() for corpus in retain],
            "limit": recipe.corpora.limit,
            # What apply tries the guardrail on, wherever the features lie by then.
            "forget": selected["forget"],
            "forget_limit": selected["limit"],
            "forget_seed": features.header.seed,
        },
        model=features.header.model,
        sae=features.header.sae,
        inputs=[features],
    )
    bos = bos_to_prepend(loaded.tokenizer, sae.identity.prepend_bos)
    shortest, longest = settings.lengths
    room = context_length(loaded.model.config) - (bos is not None)
    if shortest > room:
        raise DsgError(f"Pieces of {shortest} tokens do not fit: the model reads {room}.", "Lower --lengths.")
    indices = [feature.index for feature in features.body_as(FeatureSet).features]
    detectors = _detectors(recipe, workspace, features) if settings.gate == "window" else []
    gate = _gate(recipe, loaded, sae, indices, detectors)
    check_chat(loaded.tokenizer, retain)
    lengths = (shortest, min(longest, room))
    return _Prepared(features, retain, loaded, gate, indices, detectors, bos, lengths, header)


def _threshold(made: _Prepared, settings: CalibrateSection, rows: Sequence[Json]) -> Threshold:
    """The threshold that the calibration pieces set, and what the fresh ones say of it.

    Raises:
        DsgError: A statistic is not finite, or the gate could never fire.
    """
    selected, of_features = made.features.header.settings, made.features.body_as(FeatureSet)
    calibration = [row["statistic"] for row in rows if row["part"] == "calibrate"]
    fresh = [row["statistic"] for row in rows if row["part"] == "fresh"]
    threshold = conformal_threshold(calibration, settings.alpha)
    if not all(math.isfinite(value) for value in (threshold, *calibration, *fresh)):
        raise DsgError("On retain text an activation is not finite.", "Check the weights, or try --dtype float32.")
    if settings.gate != "window" and threshold >= 1:
        raise DsgError(
            f"The gate could never fire: at alpha {settings.alpha:g} its threshold is {threshold:g}, the largest "
            "value that the statistic can take.",
            "The features fire on retain text too: raise --ratio-percentile or lower -n in select, or raise --alpha.",
        )
    n_false = sum(statistic > threshold for statistic in fresh)
    low, high = clopper_pearson(n_false, len(fresh))
    return Threshold(
        threshold=threshold,
        gate=settings.gate,
        alpha=settings.alpha,
        n_calibration=len(calibration),
        n_fresh=len(fresh),
        n_documents=len({row["id"].rsplit("/", 1)[0] for row in rows if row["part"] == "calibrate"}),
        false_positive_rate=n_false / len(fresh) if fresh else None,
        low=low,
        high=high,
        features=made.indices,
        detectors=made.detectors,
        window=0 if settings.gate == "mean" else settings.window,
        special_ids=list(special_ids(made.loaded.tokenizer)),
        bos=made.bos,
        median_residual_norm=of_features.median_residual_norm,
        forget=[corpus["name"] for corpus in selected["forget"]],
        retain=[corpus["name"] for corpus in selected["retain"]],
    )


def _detectors(recipe: Recipe, workspace: Workspace, features: Stored) -> list[int]:
    """The features that a `window` gate watches: more exclusive ones than those to clamp, from the same statistics."""
    tensors = workspace.tensors(features)
    name = "mean_square" if features.body_as(FeatureSet).score == "mean-square" else "mean"
    scores = [tensors[f"{role}_{name}"] for role in ("forget", "retain")]
    if name == "mean":
        scores = [score.square() for score in scores]
    try:
        chosen = select_features(
            *scores,
            n_features=recipe.calibrate.n_detectors,
            ratio_percentile=recipe.calibrate.detector_percentile,
        )
    except DsgError as error:
        raise DsgError(
            f"Choosing the detectors of the gate `window`: {error.message}",
            "Lower calibrate.detector_percentile or calibrate.n_detectors (--set), or take another --gate.",
        ) from error
    return [feature.index for feature in chosen.features]


def _gate(
    recipe: Recipe, loaded: LoadedModel, sae: SaeSource, indices: Sequence[int], detectors: Sequence[int]
) -> GuardrailModule:
    """A guardrail without threshold or strength: what watches at run time also watches here."""
    slice_spec, tensors = slice_sae(sae, indices, detectors)
    tensors["detect"] = detector_weights(indices, detectors)
    spec = GuardrailSpec(
        gate=recipe.calibrate.gate,
        threshold=0.0,
        window=recipe.calibrate.window,
        strength=0.0,
        read=sae.site.name,
        write=sae.write.name,
        slice=dataclasses.asdict(slice_spec),
        special_ids=list(special_ids(loaded.tokenizer)),
        model={},
    )
    return GuardrailModule(spec, tensors).to(loaded.model.device)


def _spelled(corpus: Json) -> str:
    """A corpus of select as it was named there, weight included."""
    return f"{corpus['name']}={corpus['weight']}" if corpus.get("weight") else str(corpus["name"])


@torch.inference_mode()
def _statistics(made: _Prepared, part: Part, recipe: Recipe, session: Session, checkpoint: Checkpoint) -> list[Json]:
    """The gate statistic of every piece of one part: `{id, group, part, length, statistic}`, no text."""
    settings, tokenizer, gate = recipe.calibrate, made.loaded.tokenizer, made.gate
    pieces = draw_pieces(
        tokenizer,
        made.retain,
        part,
        bos=made.bos,
        lengths=made.lengths,
        is_packed=settings.rows == "packed",
        at_most=settings.max_pieces,
        seed=recipe.seed,
    )
    kept = checkpoint.entry(part) or {"n_batches": 0, "found": []}
    n_batches: int = kept["n_batches"]
    found: list[list[Any]] = kept["found"]
    """[number of the batch, of the piece, counted tokens, statistic]"""
    n_tokens, total = 0, sum(len(piece.ids) for piece in pieces)
    fit = Fitting()

    def watch(batch: TokenBatch) -> Tensor:
        resid_BLD = read_residual(made.loaded.model, gate.read, batch.ids_BL, batch.mask_BL)
        return gate.watch(resid_BLD, batch.counted_BL).statistic_BL.amax(-1)

    def state() -> State:
        return {"n_batches": n_batches, "found": found}

    device = str(made.loaded.model.device)
    with at_safe_points():
        for number, whole in enumerate(batches([piece.ids for piece in pieces], tokenizer, device=device)):
            n_tokens += int(whole.mask_BL.sum())
            if not session.workers.owns(number) or number < n_batches:
                continue
            for batch, statistic_B in fit(whole, watch):
                several = zip(batch.index, batch.counted_BL.sum(-1).tolist(), statistic_B.tolist(), strict=True)
                found += [[number, *one] for one in several]
            n_batches = number + 1
            session.report(f"{part} pieces, tokens", n_tokens, total)
            checkpoint.reached(part, state)
    checkpoint.keep(part, state())
    of_all = sorted((one for several in session.workers.gathered(found) for one in several), key=lambda one: one[0])
    return [
        {"id": pieces[i].id, "group": pieces[i].corpus, "part": part, "length": length, "statistic": statistic}
        for _, i, length, statistic in of_all
    ]
