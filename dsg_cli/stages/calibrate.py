"""`dsg calibrate`: from which gate statistic on does a text count as being about the forgotten knowledge?

Reads the `calibrate` part of the retain corpora, which selection never saw, in pieces of the lengths that prompts
have; sets the threshold so that a share `alpha` of them exceeds it; measures what it does to fresh text of every
kind: each retain corpus, longer pieces of it, forget text and questions; writes threshold-NNN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from dsg_cli.data.corpora import Corpus, check_disjoint, check_named
from dsg_cli.data.readers import read_prompts
from dsg_cli.data.tokens import Piece, bos_to_prepend, check_chat, draw_pieces, encode, special_ids
from dsg_cli.errors import DsgError
from dsg_cli.guardrail.calibration import (
    calibrated_threshold,
    check_finite,
    feasible_gate,
    gate_inputs,
    gate_statistics,
    make_guardrail,
    percentile_threshold,
)
from dsg_cli.guardrail.runtime.gates import FORMS
from dsg_cli.intervals import rate_above
from dsg_cli.lab import data as lab
from dsg_cli.models.language_model import LoadedModel, context_length
from dsg_cli.models.sae_slice import slice_sae
from dsg_cli.settings import CalibrateSection, Recipe
from dsg_cli.stages.inputs import chain_sae, load_chain_model, reload_corpora, spelled
from dsg_cli.stages.stage import QUIET, RunOptions, settle, stage
from dsg_cli.workspace.artifacts import FeatureSet, Threshold
from dsg_cli.workspace.body import Json
from dsg_cli.workspace.provenance import Clock
from dsg_cli.workspace.store import Stored, Workspace

LONG = 2
"""Long pieces have up to so many times the tokens of the longest that the threshold is set on."""


def run(recipe: Recipe, workspace: Workspace, *, source: str | None = None, options: RunOptions = QUIET) -> Stored:
    """Set the threshold of the newest features, or of those named, and write it."""
    clock = Clock()
    source = options.newest(workspace, "features", source)
    with options.workers.in_turn():
        features = workspace.find("features", source)
        workspace.check_writable()
        feature_set, selected = features.body_as(FeatureSet), features.header.settings
        settings, notes = feasible_gate(recipe.calibrate, feature_set)
        recipe = settle(dataclasses.replace(recipe, calibrate=settings), features.header)
        retain_names = settings.retain or [spelled(corpus) for corpus in selected["retain"]]
        forget_names = [corpus["name"] for corpus in selected["forget"]]
        check_named(retain_names, role="retain")
        check_disjoint(forget_names, retain_names)
        if settings.threshold is not None:
            notes.append("The threshold was given, not calibrated: alpha promises nothing.")
        prompts = read_prompts((), Path(settings.lengths_from)) if settings.lengths_from else []
        inputs = gate_inputs(settings, feature_set, workspace.tensors(features), where=features.id)
        questions = dev_questions(settings, forget_names)
        drawn: Json = {"limit": recipe.corpora.limit, "seed": recipe.seed}
        retain, _ = reload_corpora(features, retain_names, "retain", **drawn)
        forget, _ = reload_corpora(features, forget_names, "forget", **drawn) if forget_names else ([], [])
        sae = chain_sae(features)
        loaded = load_chain_model(features.header, recipe, cut=True)
        check_chat(loaded.tokenizer, retain)
        bos = bos_to_prepend(loaded.tokenizer, sae.identity.prepend_bos)
        lengths = piece_lengths(settings, loaded, prompts, bos=bos)
    header_settings: Json = {
        **dataclasses.asdict(settings),
        "lengths": [min(lengths), max(lengths)],
        "retain": [corpus.described() for corpus in retain],
        "limit": recipe.corpora.limit,
        # What apply tries the guardrail on, wherever the features lie by then.
        "forget": selected["forget"],
        "forget_limit": selected["limit"],
        "forget_seed": features.header.seed,
    }
    with stage("threshold", recipe, workspace, options, clock, header_settings, origin=features, notes=notes) as this:
        if this.existing:
            return this.existing
        indices = [feature.index for feature in feature_set.features]
        gate = make_guardrail(inputs, loaded, sae, slice_sae(sae, indices, inputs.detectors, inputs.weights))
        rows: list[Json] = []
        by_part = calibration_pieces(recipe, loaded, retain, forget, questions, bos=bos, lengths=lengths)
        for part, pieces in by_part.items():
            statistics = gate_statistics(loaded, [gate], pieces, this.job.named(part))
            rows += [
                {"id": pieces[i].id, "group": pieces[i].corpus, "part": part, "length": length, "statistic": statistic}
                for i, length, (statistic,) in statistics
            ]
        check_finite([row["statistic"] for row in rows])
        calibration, fresh = ([row for row in rows if row["part"] == part] for part in ("calibrate", "fresh"))
        threshold = calibrated_threshold(settings, [(row["group"], row["statistic"]) for row in calibration])
        false_positives = rate_above(threshold, [row["statistic"] for row in fresh])
        body = Threshold(
            threshold=threshold,
            gate=settings.gate,
            alpha=settings.alpha,
            n_calibration=len(calibration),
            n_fresh=len(fresh),
            n_documents=len({row["id"].rsplit("/", 1)[0] for row in calibration}),
            false_positive_rate=false_positives["rate"] if fresh else None,
            low=false_positives["low"],
            high=false_positives["high"],
            features=indices,
            detectors=inputs.detectors,
            weights=inputs.weights,
            bias=inputs.bias,
            clip=inputs.clip,
            window=settings.window if FORMS[settings.gate][1] in ("window", "running-mean") else 0,
            guarantee=settings.guarantee,
            percentile=percentile_threshold([row["statistic"] for row in calibration], settings.alpha),
            rates=_rates(rows, threshold, max(lengths)),
            special_ids=list(special_ids(loaded.tokenizer)),
            bos=bos,
            median_residual_norm=feature_set.median_residual_norm,
            forget=forget_names,
            retain=[corpus["name"] for corpus in selected["retain"]],
        )
        rows = [{**row, "gated": row["statistic"] > threshold} for row in rows]
        return this.write(body, n_tokens=sum(row["length"] for row in rows), rows=rows)


def _rates(rows: Sequence[Json], threshold: float, longest: int) -> list[Json]:
    """Share gated of each kind of text that did not set the threshold."""
    statistics: dict[tuple[str, bool], list[float]] = {}
    for row in rows:
        what = {
            "fresh": row["group"],
            "long": f"{row['group']}, more than {longest} tokens",
            "forget": row["group"],
            "questions": f"{row['group']}, dev questions",
        }.get(row["part"])
        if what is not None:
            statistics.setdefault((what, row["part"] in ("forget", "questions")), []).append(row["statistic"])
    return [
        {"what": what, "is_forget": is_forget, **rate_above(threshold, values)}
        for (what, is_forget), values in statistics.items()
    ]


def dev_questions(settings: CalibrateSection, forget: Sequence[str]) -> dict[str, list[str]]:
    """Bench -> its dev questions, as texts up to the answer."""
    benches = settings.questions or [name for name in forget if name in lab.bench_names()]
    if any(bench not in lab.bench_names() for bench in benches):
        raise DsgError("calibrate.questions takes benches of the lab: others have no dev questions.")
    return {bench: [row["context"] for row in lab.read_questions(bench, "dev")] for bench in benches}


def piece_lengths(
    settings: CalibrateSection, loaded: LoadedModel, prompts: Sequence[str], *, bos: int | None
) -> list[int]:
    """Lengths of calibration pieces in tokens, BOS not counted, each as likely as the others; what the model can read.

    They are a range of the settings, or those of the user's prompts.
    """
    lengths: Sequence[int] = range(settings.lengths[0], settings.lengths[1] + 1)
    if settings.lengths_from is not None:
        ids = encode(loaded.tokenizer, prompts, bos=bos)
        lengths = [n_tokens for n_tokens in (len(row) - (bos is not None) for row in ids) if n_tokens]
        if not lengths:
            raise DsgError(f"{settings.lengths_from} holds no prompt.", "Give one a line, or leave lengths_from out.")
        if FORMS[settings.gate][1] in ("window", "running-mean") and min(lengths) < settings.window:
            raise DsgError(
                f"The shortest prompt in {settings.lengths_from} has {min(lengths)} tokens, fewer than the window of "
                f"{settings.window}.",
                "Lower calibrate.window (--set).",
            )
    room = context_length(loaded.model.config) - (bos is not None)
    if min(lengths) > room:
        raise DsgError(f"Pieces of {min(lengths)} tokens do not fit: the model reads {room}.", "Lower --lengths.")
    return [min(length, room) for length in lengths]


def calibration_pieces(
    recipe: Recipe,
    loaded: LoadedModel,
    retain: Sequence[Corpus],
    forget: Sequence[Corpus],
    questions: Mapping[str, Sequence[str]],
    *,
    bos: int | None,
    lengths: Sequence[int],
) -> dict[str, list[Piece]]:
    """Part -> pieces: `calibrate` sets the threshold, all others are only measured."""
    settings, tokenizer = recipe.calibrate, loaded.tokenizer
    is_packed, at_most = settings.rows == "packed", settings.max_pieces
    draw = partial(draw_pieces, tokenizer, bos=bos, is_packed=is_packed, at_most=at_most, seed=recipe.seed)
    room = context_length(loaded.model.config) - (bos is not None)
    longer = range(max(lengths) + 1, min(LONG * max(lengths), room) + 1)
    plain = [dataclasses.replace(corpus, weight=None) for corpus in retain if not corpus.is_chat]
    return {
        "calibrate": draw(retain, "calibrate", lengths=lengths),
        "fresh": draw(retain, "fresh", lengths=lengths),
        "long": draw(plain, "fresh", lengths=longer) if longer and plain else [],
        "forget": draw(forget, "fresh", lengths=lengths),
        "questions": [
            Piece(f"{bench}/dev/{i}", bench, ids)
            for bench, texts in questions.items()
            for i, ids in enumerate(encode(tokenizer, texts, bos=bos))
        ],
    }
