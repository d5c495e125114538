"""One pass over the corpora to features and a probe: of `dsg select`, and of studies that begin elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from dsg_cli.artifacts import FeatureSet, Header, Json
from dsg_cli.checkpoints import Checkpoint
from dsg_cli.corpora import Corpus
from dsg_cli.model import LoadedModel
from dsg_cli.probe import candidates, fit_probe, sampled_activations
from dsg_cli.prompting import prompts
from dsg_cli.sae import SaeSource, load_encoder
from dsg_cli.selection import Selection, picked_features, select_features
from dsg_cli.settings import SelectSection
from dsg_cli.slicing import load_slice
from dsg_cli.stages.candidates import Candidates
from dsg_cli.stages.session import Session
from dsg_cli.statistics import CHUNK_TOKENS, FeatureStatistics, feature_statistics, mix
from dsg_cli.streaming import estimated_tokens, stream_batches
from dsg_cli.tokens import TokenBatch, bos_to_prepend


@dataclass(frozen=True)
class Prepared:
    """All that the pass needs."""

    loaded: LoadedModel
    sae: SaeSource
    corpora: dict[str, list[Corpus]]
    header: Header
    seq_len: int
    candidates: Candidates | None = None
    """Features that are picked without any text; then there may be no forget corpus."""


Parts = dict[str, list[FeatureStatistics]]
"""Role -> the statistics of each of its corpora."""


@dataclass(frozen=True)
class Remembered:
    """What earlier passes found of corpora, by all that it depends on beside the model."""

    statistics: dict[object, FeatureStatistics] = field(default_factory=dict)
    residuals: dict[object, Tensor] = field(default_factory=dict)
    """Of sampled retain tokens, [T, D] on the CPU."""


@dataclass(frozen=True)
class Selected:
    """What a pass over the corpora found."""

    body: FeatureSet
    tensors: dict[str, Tensor]
    """Statistics of every feature of the SAE."""
    parts: Parts
    notes: tuple[str, ...] = ()
    """On the choice."""


def selected(
    made: Prepared,
    settings: SelectSection,
    session: Session,
    checkpoint: Checkpoint,
    *,
    remembered: Remembered | None = None,
) -> Selected:
    """Statistics, features and probe.

    Args:
        made: From `prepared`.
        settings: Of the selection.
        session: How it is run.
        checkpoint: Where the pass goes on from, and is kept.
        remembered: What earlier calls found of the same corpora by the same SAE.

    Raises:
        DsgError: Too few features pass, or an activation is not finite.
    """
    parts = _statistics(made, settings, session, checkpoint, remembered or Remembered())
    statistics = {
        role: mix(of_role, [corpus.weight for corpus in made.corpora[role]])
        for role, of_role in parts.items()
        if of_role
    }
    selection = _selection(made.candidates, settings, statistics)
    body = FeatureSet(
        features=selection.features,
        score=settings.score,
        ratio_cut=selection.ratio_cut,
        forget_cut=selection.forget_cut,
        percentiles_over=selection.percentiles_over,
        n_live=selection.n_live,
        n_passed=selection.n_passed,
        forget_tokens=statistics["forget"].n_tokens if "forget" in statistics else 0,
        retain_tokens=statistics["retain"].n_tokens,
        median_residual_norm=statistics["retain"].median_residual_norm,
        probe=_probe(made, settings, statistics, parts, session, remembered),
        described=made.candidates.described if made.candidates is not None else {},
    )
    tensors = {name: tensor for role in statistics for name, tensor in statistics[role].tensors(role).items()}
    return Selected(body, tensors, parts, selection.notes)


def _selection(
    candidates: Candidates | None, settings: SelectSection, statistics: dict[str, FeatureStatistics]
) -> Selection:
    """By forget text, unless the features are picked without it."""
    retain = statistics["retain"]
    scores = {role: of_role.score(settings.score) for role, of_role in statistics.items()}
    if candidates is None:
        return select_features(
            scores["forget"],
            scores["retain"],
            n_features=settings.n_features,
            ratio_percentile=settings.ratio_percentile,
        )
    return picked_features(
        candidates.indices,
        scores.get("forget"),
        scores["retain"],
        retain.rate_F,
        n_features=settings.n_features if candidates.described else None,
        max_retain_rate=settings.max_retain_rate,
    )


def _statistics(
    made: Prepared, settings: SelectSection, session: Session, checkpoint: Checkpoint, remembered: Remembered
) -> Parts:
    """From one pass over each corpus's `select` part, but for those that are remembered."""
    encoder = load_encoder(made.sae, device=str(made.loaded.model.device))
    parts: Parts = {role: [] for role in made.corpora}
    for role, several in made.corpora.items():
        for corpus in several:
            at_most = _max_tokens(made, settings, role)
            key = _key(made, settings, role, corpus)
            if key not in remembered.statistics:
                remembered.statistics[key] = feature_statistics(
                    made.loaded.model,
                    made.sae.site,
                    encoder,
                    _batches(made, settings, role, corpus),
                    total_tokens=estimated_tokens(corpus.part("select"), at_most),
                    what=f"{role} corpus {corpus.name.rsplit('/', 1)[-1]}",
                    workers=session.workers,
                    checkpoint=checkpoint,
                    report=session.report,
                )
            parts[role].append(remembered.statistics[key])
    return parts


def _key(made: Prepared, settings: SelectSection, role: str, corpus: Corpus) -> tuple[object, ...]:
    """What a pass over a corpus depends on; where the corpus is read whole, not on how much may be read."""
    n_bytes = sum(len(text.encode()) for text in corpus.texts)  # No token has less than one.
    at_most = min(_max_tokens(made, settings, role), n_bytes)
    return (made.sae.identity, corpus.name, corpus.sha256, at_most, made.seq_len, settings.rows)


def _max_tokens(made: Prepared, settings: SelectSection, role: str) -> int:
    return settings.max_rows * made.seq_len // len(made.corpora[role])


def _batches(made: Prepared, settings: SelectSection, role: str, corpus: Corpus) -> Iterator[TokenBatch]:
    """The `select` part of one corpus."""
    return stream_batches(
        made.loaded.tokenizer,
        prompts(made.loaded.tokenizer, corpus, "select"),
        bos=bos_to_prepend(made.loaded.tokenizer, made.sae.identity.prepend_bos),
        seq_len=made.seq_len,
        max_tokens=_max_tokens(made, settings, role),
        is_packed=settings.rows == "packed",
        device=str(made.loaded.model.device),
    )


def _probe(
    made: Prepared,
    settings: SelectSection,
    mixed: dict[str, FeatureStatistics],
    parts: Parts,
    session: Session,
    remembered: Remembered | None,
) -> Json:
    """A probe of tokens, from a second pass over a sample of the same text; nothing if none is wanted, or possible."""
    if not settings.probe_features or "forget" not in mixed:
        return {}
    indices = candidates(mixed["forget"], mixed["retain"], settings.probe_candidates)
    watched = load_slice(made.sae, indices).to(made.loaded.model.device)

    def encode(resid_TD: Tensor) -> Tensor:
        return watched(resid_TD).acts.abs()

    found: dict[str, list[Tensor]] = {}
    for role, several in made.corpora.items():
        found[role] = []
        for corpus, statistics in zip(several, parts[role], strict=True):
            sample = partial(
                sampled_activations,
                made.loaded.model,
                made.sae.site,
                batches=_batches(made, settings, role, corpus),
                total_tokens=statistics.n_tokens,
                n_tokens=max(1, settings.probe_tokens // 2 // len(several)),
                workers=session.workers,
                report=session.report,
                what=f"probe, {role} corpus {corpus.name.rsplit('/', 1)[-1]}",
            )
            if remembered is None or role == "forget":
                found[role].append(sample(encode, len(indices)))
                continue
            # Other forget text asks for other features of the same retain text, whose residuals are kept.
            key = (_key(made, settings, role, corpus), settings.probe_tokens, len(several))
            if key not in remembered.residuals:
                remembered.residuals[key] = sample(Tensor.float, made.sae.identity.width)
            device = made.loaded.model.device
            chunks = [
                encode(resid_TD.to(device)).cpu() for resid_TD in torch.split(remembered.residuals[key], CHUNK_TOKENS)
            ]
            found[role].append(torch.cat(chunks))
    shares = [1.0 if corpus.weight is None else corpus.weight for corpus in made.corpora["retain"]]
    return fit_probe(
        torch.cat(found["forget"]),
        found["retain"],
        shares,
        indices,
        n_features=settings.probe_features,
        ridge=settings.probe_ridge,
        report=session.report,
    ).as_json()
