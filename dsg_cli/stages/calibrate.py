"""`dsg calibrate`: from which gate statistic on does a text count as being about the forgotten knowledge?

Reads the `calibrate` part of the retain corpora, which selection never saw, in pieces of the lengths that prompts
have; sets the threshold so that a share `alpha` of them exceeds it; measures what it does to fresh text of every
kind: each retain corpus, longer pieces of it, forget text and questions; writes threshold-NNN.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dsg_cli.data.corpora import Corpus, Part, check_disjoint, check_named, load_corpora
from dsg_cli.data.readers import read_prompts
from dsg_cli.data.tokens import Piece, bos_to_prepend, check_chat, draw_pieces, encode, special_ids
from dsg_cli.errors import DsgError
from dsg_cli.guardrail.calibration import (
    Detection,
    check_finite,
    detection_of,
    gate_for,
    gate_statistics,
    percentile_threshold,
    threshold_at,
    watching,
)
from dsg_cli.guardrail.runtime.gates import FORMS
from dsg_cli.guardrail.runtime.guardrail import GuardrailModule
from dsg_cli.intervals import rate_above
from dsg_cli.job import Job
from dsg_cli.lab import data as lab
from dsg_cli.models.language_model import LoadedModel, context_length
from dsg_cli.settings import CalibrateSection, Recipe
from dsg_cli.stages.inputs import chain_sae, load_chain_model, spelled
from dsg_cli.stages.stage import QUIET, RunOptions, new_header, settle
from dsg_cli.workspace.artifacts import FeatureSet, Header, Threshold
from dsg_cli.workspace.checkpoints import Checkpoint
from dsg_cli.workspace.provenance import Clock
from dsg_cli.workspace.results import Json
from dsg_cli.workspace.store import Stored, Workspace

MEASURED_BY = 2
"""Long pieces have up to so many times the tokens of the longest that the threshold is set on."""


def lengths_of(settings: CalibrateSection, prompts: Sequence[Sequence[int]]) -> Sequence[int]:
    """Lengths of pieces, each as likely as the others: those of the user's prompts, or a range."""
    if settings.lengths_from is None:
        return range(settings.lengths[0], settings.lengths[1] + 1)
    found = [len(ids) for ids in prompts if ids]
    if not found:
        raise DsgError(f"{settings.lengths_from} holds no prompt.", "Give one a line, or leave lengths_from out.")
    if FORMS[settings.gate][1] in ("window", "running-mean") and min(found) < settings.window:
        raise DsgError(
            f"The shortest prompt in {settings.lengths_from} has {min(found)} tokens, fewer than the window of "
            f"{settings.window}.",
            "Lower calibrate.window (--set).",
        )
    return found


def piece_lengths(
    settings: CalibrateSection, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, bos: int | None
) -> Sequence[int]:
    """The same from prompts as texts, of which BOS is not counted."""
    return lengths_of(settings, [ids[int(bos is not None) :] for ids in encode(tokenizer, prompts, bos=bos)])


def dev_questions(settings: CalibrateSection, forget: Sequence[str]) -> dict[str, list[str]]:
    """Bench -> its dev questions, as texts up to the answer."""
    benches = settings.questions or [name for name in forget if name in lab.bench_names()]
    if any(bench not in lab.bench_names() for bench in benches):
        raise DsgError("calibrate.questions takes benches of the lab: others have no dev questions.")
    return {
        bench: [
            row["context"]
            for row in map(json.loads, lab.questions_path(bench).read_text(encoding="utf-8").splitlines())
            if row["split"] == "dev"
        ]
        for bench in benches
    }


def all_pieces(
    recipe: Recipe,
    loaded: LoadedModel,
    retain: Sequence[Corpus],
    forget: Sequence[Corpus],
    questions: dict[str, list[str]],
    *,
    bos: int | None,
    lengths: Sequence[int],
    room: int,
) -> dict[str, list[Piece]]:
    """Part -> pieces: `calibrate` sets the threshold, all others are only measured."""
    settings, tokenizer = recipe.calibrate, loaded.tokenizer
    longest = min(max(lengths), room)
    usual = [min(length, room) for length in lengths]

    def drawn(corpora: Sequence[Corpus], part: Part, of: Sequence[int]) -> list[Piece]:
        return draw_pieces(
            tokenizer,
            corpora,
            part,
            bos=bos,
            lengths=of,
            is_packed=settings.rows == "packed",
            at_most=settings.max_pieces,
            seed=recipe.seed,
        )

    plain = [dataclasses.replace(corpus, weight=None) for corpus in retain if not corpus.is_chat]
    more = range(longest + 1, min(MEASURED_BY * longest, room) + 1)
    return {
        "calibrate": drawn(retain, "calibrate", usual),
        "fresh": drawn(retain, "fresh", usual),
        "long": drawn(plain, "fresh", more) if more and plain else [],
        "forget": drawn(forget, "fresh", usual),
        "questions": [
            Piece(f"{bench}/dev/{i}", bench, ids)
            for bench, texts in questions.items()
            for i, ids in enumerate(encode(tokenizer, texts, bos=bos))
        ],
    }


def run(recipe: Recipe, workspace: Workspace, *, source: str | None = None, options: RunOptions = QUIET) -> Stored:
    """Set the threshold of the newest features, or of those named, and write it."""
    clock = Clock()
    source = options.named(workspace, "features", source)
    with options.workers.in_turn():
        made = _prepared(recipe, workspace, source)
    if (stored := options.existing(workspace, made.header)) is not None:
        return stored
    with options.checkpoint(workspace, made.header) as checkpoint:
        rows = [
            row for part, pieces in made.pieces.items() for row in _statistics(made, part, pieces, options, checkpoint)
        ]
        body = _threshold(made, rows)
        rows = [{**row, "gated": row["statistic"] > body.threshold} for row in rows]
        n_tokens = sum(row["length"] for row in rows)
        return options.write(
            workspace, lambda: workspace.write(clock.close(made.header, n_tokens=n_tokens), body, rows=rows)
        )


@dataclass(frozen=True)
class _Prepared:
    """All that the pass needs."""

    features: Stored
    settings: CalibrateSection
    """With the gate that the features allow."""
    pieces: dict[str, list[Piece]]
    """Part -> what the gate is asked about."""
    loaded: LoadedModel
    gate: GuardrailModule
    detection: Detection
    bos: int | None
    header: Header


def _prepared(recipe: Recipe, workspace: Workspace, source: str | None) -> _Prepared:
    """Everything checked and read."""
    features = workspace.find("features", source)
    workspace.check_writable()
    of_features = features.body_as(FeatureSet)
    settings, notes = gate_for(recipe.calibrate, of_features)
    recipe = settle(dataclasses.replace(recipe, calibrate=settings), features.header)
    selected = features.header.settings
    names = settings.retain or [spelled(corpus) for corpus in selected["retain"]]
    check_named(names, role="retain")
    forget_names = [corpus["name"] for corpus in selected["forget"]]
    check_disjoint(forget_names, names)
    if settings.threshold is not None:
        notes.append("The threshold was given, not calibrated: alpha promises nothing.")
    prompts = read_prompts((), Path(settings.lengths_from)) if settings.lengths_from else []
    detection = detection_of(settings, of_features, workspace.tensors(features), made=features.id)
    questions = dev_questions(settings, forget_names)
    retain = _corpora(names, "retain", recipe, selected["retain"])
    forget = _corpora(forget_names, "forget", recipe, selected["forget"]) if forget_names else []
    assert features.header.sae is not None
    sae = chain_sae(features.header.sae, features.id)
    loaded = load_chain_model(features.header, recipe, cut=True)
    bos = bos_to_prepend(loaded.tokenizer, sae.identity.prepend_bos)
    room = context_length(loaded.model.config) - (bos is not None)
    lengths = piece_lengths(settings, loaded.tokenizer, prompts, bos=bos)
    header = new_header(
        "threshold",
        recipe,
        settings={
            **dataclasses.asdict(settings),
            "lengths": [min(lengths), min(max(lengths), room)],
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
        notes=notes,
    )
    if min(lengths) > room:
        raise DsgError(f"Pieces of {min(lengths)} tokens do not fit: the model reads {room}.", "Lower --lengths.")
    check_chat(loaded.tokenizer, retain)
    indices = [feature.index for feature in of_features.features]
    gate = watching(settings, loaded, sae, indices, detection)
    pieces = all_pieces(recipe, loaded, retain, forget, questions, bos=bos, lengths=lengths, room=room)
    return _Prepared(features, settings, pieces, loaded, gate, detection, bos, header)


def _corpora(names: Sequence[str], role: str, recipe: Recipe, read: Sequence[Json]) -> list[Corpus]:
    """Corpora as they were when features were selected, those of the hub at the same commits."""
    return load_corpora(
        names,
        role=role,
        limit=recipe.corpora.limit,
        seed=recipe.seed,
        revisions={corpus["name"]: corpus["revision"] for corpus in read if corpus.get("revision")},
    )


def _threshold(made: _Prepared, rows: Sequence[Json]) -> Threshold:
    """The threshold that the calibration pieces set, and what all others say of it."""
    settings, selected = made.settings, made.features.header.settings
    of_features = made.features.body_as(FeatureSet)
    check_finite([row["statistic"] for row in rows])
    calibration = [row for row in rows if row["part"] == "calibrate"]
    fresh = [row for row in rows if row["part"] == "fresh"]
    threshold = threshold_at(settings, [(row["group"], row["statistic"]) for row in calibration])
    of_fresh = rate_above(threshold, [row["statistic"] for row in fresh])
    return Threshold(
        threshold=threshold,
        gate=settings.gate,
        alpha=settings.alpha,
        n_calibration=len(calibration),
        n_fresh=len(fresh),
        n_documents=len({row["id"].rsplit("/", 1)[0] for row in calibration}),
        false_positive_rate=of_fresh["rate"] if fresh else None,
        low=of_fresh["low"],
        high=of_fresh["high"],
        features=[feature.index for feature in of_features.features],
        detectors=made.detection.detectors,
        weights=made.detection.weights,
        bias=made.detection.bias,
        clip=made.detection.clip,
        window=settings.window if FORMS[settings.gate][1] in ("window", "running-mean") else 0,
        guarantee=settings.guarantee,
        percentile=percentile_threshold([row["statistic"] for row in calibration], settings.alpha),
        rates=_rates(rows, threshold, made.header.settings["lengths"][1]),
        special_ids=list(special_ids(made.loaded.tokenizer)),
        bos=made.bos,
        median_residual_norm=of_features.median_residual_norm,
        forget=[corpus["name"] for corpus in selected["forget"]],
        retain=[corpus["name"] for corpus in selected["retain"]],
    )


def _rates(rows: Sequence[Json], threshold: float, longest: int) -> list[Json]:
    """Share gated of each kind of text that did not set the threshold."""
    kinds: dict[tuple[str, bool], list[float]] = {}
    for row in rows:
        what = {
            "fresh": row["group"],
            "long": f"{row['group']}, more than {longest} tokens",
            "forget": row["group"],
            "questions": f"{row['group']}, dev questions",
        }.get(row["part"])
        if what is not None:
            kinds.setdefault((what, row["part"] in ("forget", "questions")), []).append(row["statistic"])
    return [
        {"what": what, "is_forget": is_forget, **rate_above(threshold, several)}
        for (what, is_forget), several in kinds.items()
    ]


def _statistics(
    made: _Prepared, part: str, pieces: Sequence[Piece], options: RunOptions, checkpoint: Checkpoint
) -> list[Json]:
    """The gate statistic of every piece of one part: `{id, group, part, length, statistic}`, no text."""
    found = gate_statistics(
        made.loaded,
        [made.gate],
        pieces,
        Job(options.workers, checkpoint, options.report, part),
    )
    return [
        {"id": pieces[i].id, "group": pieces[i].corpus, "part": part, "length": length, "statistic": statistic}
        for i, length, (statistic,) in found
    ]
