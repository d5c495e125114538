"""`dsg calibrate`: from which gate statistic on does a text count as being about the forgotten knowledge?

Reads the `calibrate` part of the retain corpora, which selection never saw, in pieces of the lengths that prompts
have; sets the threshold so that a share `alpha` of them exceeds it; measures on the `fresh` part what it promises;
writes threshold-NNN.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import torch

from dsg_cli.artifacts import FeatureSet, Json, Threshold
from dsg_cli.calibration import clopper_pearson, conformal_threshold, cut_pieces
from dsg_cli.corpora import Corpus, Part, check_disjoint, check_names, load_corpora
from dsg_cli.errors import DsgError
from dsg_cli.gate import hot_tokens, mean_statistic
from dsg_cli.model import LoadedModel
from dsg_cli.progress import Report, silent
from dsg_cli.recipe import Recipe
from dsg_cli.residuals import read_residual
from dsg_cli.sae import SaeSource, slice_sae
from dsg_cli.stages.chain import chain_sae, load_chain_model
from dsg_cli.stages.provenance import Clock, new_header
from dsg_cli.tokens import batches, encode, special_ids
from dsg_cli.workspace import Stored, Workspace

BATCH_TOKENS = 8192


def run(
    recipe: Recipe, workspace: Workspace, *, source: str | None = None, reuse: bool = False, report: Report = silent
) -> Stored:
    """Set the threshold of the newest features, or of those named, and write it.

    Raises:
        DsgError: Anything the user can mend.
    """
    clock = Clock()
    settings = recipe.calibrate
    features = workspace.find("features", source)
    workspace.check_writable()
    shortest, longest = _lengths(settings.lengths)
    if not 0 < settings.alpha < 1:
        raise DsgError(f"alpha is {settings.alpha:g}; it must lie between 0 and 1.")
    selected = features.header.settings
    names = settings.retain or [corpus["name"] for corpus in selected["retain"]]
    check_names(names)
    check_disjoint([corpus["name"] for corpus in selected["forget"]], names)
    retain = load_corpora(names, role="retain", limit=recipe.corpora.limit, seed=recipe.seed)
    assert features.header.sae is not None
    sae = chain_sae(features.header.sae, features.id)
    loaded = load_chain_model(features.header, recipe, cut=True)
    header = new_header(
        "threshold",
        recipe,
        settings={
            **dataclasses.asdict(settings),
            "retain": [{"name": corpus.name, "sha256": corpus.sha256} for corpus in retain],
        },
        model=features.header.model,
        sae=features.header.sae,
        inputs=[features],
    )
    if reuse and (stored := workspace.matching(header)) is not None:
        return stored

    indices = [feature.index for feature in features.body_as(FeatureSet).features]
    rows: list[Json] = []
    for part in ("calibrate", "fresh"):
        rows += _statistics(
            loaded, sae, indices, retain, part, shortest=shortest, longest=longest, seed=recipe.seed, report=report
        )
    calibration = [row["statistic"] for row in rows if row["part"] == "calibrate"]
    fresh = [row["statistic"] for row in rows if row["part"] == "fresh"]
    threshold = conformal_threshold(calibration, settings.alpha)
    if threshold >= 1:
        raise DsgError(
            f"The gate could never fire: at alpha {settings.alpha:g} its threshold is {threshold:g}, the largest "
            "value that the statistic can take.",
            "The features fire on retain text too: raise --ratio-percentile or lower -n in select, or raise --alpha.",
        )
    n_false = sum(statistic > threshold for statistic in fresh)
    low, high = clopper_pearson(n_false, len(fresh))
    body = Threshold(
        threshold=threshold,
        gate=settings.gate,
        alpha=settings.alpha,
        n_calibration=len(calibration),
        n_fresh=len(fresh),
        false_positive_rate=n_false / len(fresh) if fresh else 0.0,
        low=low,
        high=high,
        features=indices,
        special_ids=list(special_ids(loaded.tokenizer)),
    )
    n_tokens = sum(row["length"] for row in rows)
    return workspace.write(clock.close(header, n_tokens=n_tokens), body, rows=rows)


def _lengths(lengths: Sequence[int]) -> tuple[int, int]:
    if len(lengths) != 2 or not 1 <= lengths[0] <= lengths[1]:
        raise DsgError(
            f"Calibration lengths are {list(lengths)}; give the shortest and the longest, such as --lengths 8:128."
        )
    return lengths[0], lengths[1]


@torch.inference_mode()
def _statistics(
    loaded: LoadedModel,
    sae: SaeSource,
    indices: Sequence[int],
    retain: Sequence[Corpus],
    part: Part,
    *,
    shortest: int,
    longest: int,
    seed: int,
    report: Report,
) -> list[Json]:
    """The gate statistic of every piece of one part: `{id, group, part, length, statistic}`, no text."""
    features = slice_sae(sae, indices).to(loaded.model.device)
    rng = random.Random(f"{seed}/{part}")
    bos = loaded.tokenizer.bos_token_id
    pieces: list[list[int]] = []
    names: list[tuple[str, str]] = []
    for corpus in retain:
        documents = encode(loaded.tokenizer, corpus.part(part), prepend_bos=sae.identity.prepend_bos)
        for i, ids in enumerate(documents):
            n_head = int(ids[:1] == [bos])
            cut = cut_pieces(ids, rng, shortest=shortest, longest=longest, n_head=n_head)
            pieces += cut
            names += [(f"{corpus.name}/{part}/{i}/{j}", corpus.name) for j in range(len(cut))]
    rows: list[Json] = []
    for batch in batches(pieces, loaded.tokenizer, batch_tokens=BATCH_TOKENS, device=str(loaded.model.device)):
        acts_BLK = features(read_residual(loaded.model, sae.site, batch.ids_BL, batch.mask_BL))
        counted_BL = batch.counted_BL
        statistic_B = mean_statistic(hot_tokens(acts_BLK, counted_BL), counted_BL)
        rows += [
            {"id": names[i][0], "group": names[i][1], "part": part, "length": length, "statistic": statistic}
            for i, length, statistic in zip(batch.index, counted_BL.sum(-1).tolist(), statistic_B.tolist(), strict=True)
        ]
        report(f"{part} pieces", len(rows), len(pieces))
    return rows
