"""`dsg inspect`: what are the features of a guardrail, or of a selection, about?

Reads the `select` part of the corpora through the model up to the hook and those features alone, once; keeps how often
and where they fire; asks their decoder rows what they promote and which features are like them; writes inspect-NNN.
Text of the corpora is shown, and kept only with `--samples`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dsg_cli.data.corpora import Corpus, check_disjoint, check_named, parse_name, part_of
from dsg_cli.data.tokens import bos_to_prepend, check_chat, chunks, encode, prompts
from dsg_cli.errors import DsgError
from dsg_cli.guardrail.runtime.guardrail import GuardrailModule
from dsg_cli.guardrail.selection import EPSILON, SelectedFeature, score_of, selected_features
from dsg_cli.inspection.contexts import read_contexts
from dsg_cli.inspection.features import Group, Read, Rows, context_rows, doubts_of, with_near, words_of_all
from dsg_cli.inspection.lens import decoder_rows, logit_lens, nearest_features
from dsg_cli.inspection.neuronpedia import Descriptions, described, place_of
from dsg_cli.job import Job
from dsg_cli.models.language_model import LoadedModel, context_length, load_tokenizer
from dsg_cli.models.sae import SaeSource
from dsg_cli.models.sae_slice import load_slice
from dsg_cli.settings import Recipe
from dsg_cli.stages.inputs import (
    chain_sae,
    check_tokens,
    find_composition,
    guardrail_modules,
    identify,
    load_chain_model,
    only_guardrails,
    read_corpora,
)
from dsg_cli.stages.stage import QUIET, RunOptions, new_header, settle
from dsg_cli.workspace.artifacts import FeatureSet, Guardrail, Header, SaeIdentity
from dsg_cli.workspace.provenance import Clock
from dsg_cli.workspace.results import Inspection, Json
from dsg_cli.workspace.store import Stored, Workspace

KINDS = ("guardrail", "features")


@dataclass(frozen=True)
class Inspected:
    """An artifact that chose features."""

    made: Stored
    guard: GuardrailModule | None
    """None for a selection."""
    chosen: list[SelectedFeature]

    @property
    def sae(self) -> SaeIdentity:
        """The SAE that it was made with."""
        assert self.made.header.sae is not None
        return self.made.header.sae

    def some(self, indices: Sequence[int]) -> list[SelectedFeature]:
        """These features of the SAE, with their roles if they have any; all that were chosen if none are named."""
        for index in indices:
            if not 0 <= index < self.sae.n_features:
                raise DsgError(f"The SAE {self.sae.source} has {self.sae.n_features} features; there is no {index}.")
        known = {one.index: one for one in self.chosen}
        return [known.get(index, SelectedFeature(index, [])) for index in dict.fromkeys(indices)] or self.chosen

    def bos(self, loaded: LoadedModel) -> int | None:
        """The token that every sequence begins with, after a look at the model's others."""
        body = self.made.body
        if isinstance(body, Guardrail):
            check_tokens(loaded, body.special_ids, self.made.id)
            return body.bos
        return bos_to_prepend(loaded.tokenizer, self.sae.prepend_bos)


def features_of(made: Stored) -> Stored | None:
    """The features that an artifact was made from, where they lie beside it; itself, if it is features."""
    if made.header.kind == "features":
        return made
    beside = Workspace(made.path.parent)
    for one in made.header.inputs:
        path = made.path.with_name(f"{one.id}.json")
        if not one.is_elsewhere and path.is_file() and (found := features_of(beside.read(str(path)))) is not None:
            return found
    return None


def find_inspected(workspace: Workspace, source: str | None) -> Inspected:
    """The newest guardrail, else the newest features, or what is named.

    Args:
        workspace: Where artifacts are.
        source: An id or path of either kind; a guardrail also as a light file, or from the hub.
    """
    if source is None:
        kind = next((kind for kind in KINDS if workspace.ids(kind)), "features")
        source = workspace.find(kind).id
    if Path(source).name.startswith("features-"):
        made = workspace.find("features", source)
        return Inspected(made, None, selected_features(made.body))  # type: ignore[arg-type]
    if Path(source).name.startswith(("threshold-", "eval-", "attack-", "study-", "compare-", "inspect-")):
        raise DsgError(f"dsg inspect takes a guardrail or features, not {source}.")
    composition = find_composition(workspace, [source])
    only_guardrails(composition, "dsg inspect")
    guard = guardrail_modules(workspace, composition)[0]
    return Inspected(composition.guardrails[0], guard, selected_features(composition.bodies[0], guard.detect))


NEAR_BY_DEFAULT = "lab-near"

MOST_TOKENS = 2**18
"""Of each corpus."""

LONGEST_ROW = 1024

BLOCK = 256
"""Documents that are encoded at a time."""


def drawn_as(recipe: Recipe, features: Stored | None, limit: int | None) -> Recipe:
    """The recipe with the limit and the seed by which documents are drawn: those of select, where they are known.

    Args:
        recipe: Else its own.
        features: What select made.
        limit: Documents of each corpus, if other than those of select are wanted.
    """
    drawn = recipe.corpora.limit
    if features is not None:
        drawn, recipe = features.header.settings["limit"], replace(recipe, seed=features.header.seed)
    return replace(recipe, corpora=replace(recipe.corpora, limit=drawn if limit is None else limit))


def read_groups(
    recipe: Recipe, found: Inspected, features: Stored | None, *, near: Sequence[str]
) -> tuple[list[Group], list[str]]:
    """The corpora of select, and those that are named as near; and a note on each that has changed since.

    Args:
        recipe: From `drawn_as`.
        found: The artifact that is inspected.
        features: The features that it was made from, if they are at hand.
        near: Names of near corpora, of those that select had or others.
    """
    forget, retain = _names(found, features)
    near = list(near) or [name for name in retain if name == NEAR_BY_DEFAULT]
    if near:
        check_named(near, role="near")
    check_disjoint(forget, near)
    near_names = [parse_name(name).name for name in near]
    is_whole = features is not None and recipe.corpora.limit == features.header.settings["limit"]
    groups: list[Group] = []
    notes: list[str] = []
    for role, names in (("forget", forget), ("retain", retain)):
        corpora, changed = read_corpora(names, role, recipe, features) if names else ([], [])
        groups += [Group(one, "near" if one.name in near_names else role) for one in corpora]
        notes += changed if is_whole else []
    further = [name for name in near if parse_name(name).name not in {group.name for group in groups}]
    if further:
        corpora, _ = read_corpora(further, "near", recipe, None)
        groups += [Group(one, "near") for one in corpora]
    order = ("forget", "near", "retain")
    return sorted(groups, key=lambda group: order.index(group.role)), notes


def _names(found: Inspected, features: Stored | None) -> tuple[list[str], list[str]]:
    """Names of the forget and the retain corpora of select."""
    if features is not None:
        settings = features.header.settings
        return [one["name"] for one in settings["forget"]], [one["name"] for one in settings["retain"]]
    body = found.made.body
    assert isinstance(body, Guardrail)
    return list(body.forget), list(body.retain)


def read_rows(tokenizer: PreTrainedTokenizerBase, corpus: Corpus, *, bos: int | None, seq_len: int) -> Rows:
    """The `select` part of a corpus, on which scores and rates of select are too: so many tokens of it, at most."""
    texts = prompts(tokenizer, corpus, "select")
    numbers = [i for i, text in enumerate(corpus.texts) if part_of(text) == "select"]
    ids: list[list[int]] = []
    places: list[tuple[int, int]] = []
    n_tokens = n_documents = 0
    step = seq_len - (bos is not None)
    for start in range(0, len(texts), BLOCK):
        block = encode(tokenizer, texts[start : start + BLOCK], bos=bos)
        for number, document in zip(numbers[start : start + BLOCK], block, strict=True):
            if n_tokens >= MOST_TOKENS:
                return Rows(ids, places, n_documents)
            for k, row in enumerate(chunks(document, seq_len, bos=bos)):
                ids.append(row)
                places.append((number, k * step))
            n_documents += 1
            n_tokens += len(document)
    return Rows(ids, places, n_documents)


N_TOKENS, N_NEAREST = 8, 3
"""Of the logit lens either way, and of like features."""

CANDIDATES = 8
"""Contexts that are kept for each that is shown: many are the same words."""


@dataclass(frozen=True)
class Wanted:
    """What is to be shown."""

    near: list[str] = field(default_factory=list)
    """Corpora that are near to what is forgotten."""
    features: list[int] = field(default_factory=list)
    """Of the SAE; those that were chosen, if none is named."""
    n_contexts: int = 3
    """Of each feature in each corpus."""
    samples: bool = False
    """Keep their text."""
    neuronpedia: bool = False
    """Ask for descriptions."""
    limit: int | None = None
    """Documents of each corpus."""


@dataclass(frozen=True)
class Shown:
    """The artifact, and its contexts with their text, which may be in no file."""

    stored: Stored
    rows: list[Json] = field(default_factory=list)
    """Empty where an earlier artifact without text was taken."""


def run(
    recipe: Recipe,
    workspace: Workspace,
    *,
    source: str | None = None,
    wanted: Wanted = Wanted(),
    options: RunOptions = QUIET,
) -> Shown:
    """Inspect the newest guardrail, else the newest features, or what is named."""
    clock = Clock()
    made = _prepared(recipe, workspace, source, wanted)
    if (stored := options.existing(workspace, made.header)) is not None:
        return Shown(stored, workspace.rows(stored) if wanted.samples else [])
    loaded = load_chain_model(made.found.made.header, made.recipe, cut=True)
    reads = _reads(made, loaded, wanted, options)
    reads, notes = with_near(reads, made.chosen)
    features, more = _features(made, loaded, reads, wanted, options)
    rows = [
        row
        for c, one in enumerate(made.chosen)
        for row in context_rows(reads, c, one.index, wanted.n_contexts, loaded.tokenizer)
    ]
    groups = [
        {
            "name": read.group.name,
            "role": read.group.role,
            "n_documents": read.rows.n_documents,
            "n_tokens": read.contexts.n_tokens,
        }
        for read in reads
    ]
    body = Inspection(made.found.made.id, groups, features, _overlap(made))
    header = replace(made.header, notes=[*made.header.notes, *notes, *more])
    if made.recipe.model.allow_mismatch:
        header = replace(header, model=identify(loaded, header.model.last_layer))
    kept = rows if wanted.samples else [{key: row[key] for key in row if key != "tokens"} for row in rows]
    closed = clock.close(header, n_tokens=sum(read.contexts.n_tokens for read in reads))
    return Shown(workspace.write(closed, body, rows=kept), rows)


@dataclass(frozen=True)
class _Prepared:
    """All that the pass needs, but for the model."""

    found: Inspected
    chosen: list[SelectedFeature]
    features: Stored | None
    """What they were selected with; None where it is not at hand."""
    tensors: dict[str, Tensor]
    """Statistics of every feature of the SAE; empty without it."""
    groups: list[Group]
    sae: SaeSource
    header: Header
    recipe: Recipe
    earlier: list[Stored]


def _prepared(recipe: Recipe, workspace: Workspace, source: str | None, wanted: Wanted) -> _Prepared:
    if wanted.n_contexts < 1:
        raise DsgError(f"--contexts {wanted.n_contexts} is too few; at least 1.")
    found = find_inspected(workspace, source)
    chosen = found.some(wanted.features)
    features = features_of(found.made)
    workspace.check_writable()
    recipe = settle(recipe, found.made.header)
    drawn = drawn_as(recipe, features, wanted.limit)
    groups, notes = read_groups(drawn, found, features, near=wanted.near)
    tokenizer = load_tokenizer(recipe.model.instead or found.made.header.model.source, recipe.model)
    check_chat(tokenizer, [group.corpus for group in groups])
    sae = chain_sae(found.made)
    earlier = _earlier(workspace, found)
    header = new_header(
        "inspect",
        recipe,
        settings={
            **dataclasses.asdict(wanted),
            "corpora": [group.described() for group in groups],
            "drawn": {"limit": drawn.corpora.limit, "seed": drawn.seed, "most_tokens": MOST_TOKENS},
            "earlier": [stored.id for stored in earlier],
        },
        model=found.made.header.model,
        sae=found.made.header.sae,
        inputs=[found.made, *([features] if features is not None and features.id != found.made.id else [])],
        notes=notes,
    )
    tensors = workspace.tensors(features) if features is not None else {}
    return _Prepared(found, chosen, features, tensors, groups, sae, header, recipe, earlier)


def _reads(made: _Prepared, loaded: LoadedModel, wanted: Wanted, options: RunOptions) -> list[Read]:
    """One pass over each corpus, through the chosen features alone."""
    watched = load_slice(made.sae, [one.index for one in made.chosen]).to(loaded.model.device)

    def encode(resid_TD: Tensor) -> Tensor:
        acts_TC: Tensor = watched(resid_TD).acts
        return acts_TC

    bos = made.found.bos(loaded)
    seq_len = min(LONGEST_ROW, context_length(loaded.model.config))
    reads = []
    for group in made.groups:
        rows = read_rows(loaded.tokenizer, group.corpus, bos=bos, seq_len=seq_len)
        contexts = read_contexts(
            loaded.model,
            made.sae.site,
            encode,
            rows.ids,
            loaded.tokenizer,
            n_contexts=CANDIDATES * wanted.n_contexts,
            job=Job(progress=options.report, name=f"{group.role} corpus {group.name.rsplit('/', 1)[-1]}"),
        )
        reads.append(Read(group, rows, contexts))
    return reads


def _features(
    made: _Prepared, loaded: LoadedModel, reads: Sequence[Read], wanted: Wanted, options: RunOptions
) -> tuple[list[Json], list[str]]:
    """What there is to say of each feature, and notes."""
    indices = [one.index for one in made.chosen]
    said = logit_lens(loaded.model, loaded.tokenizer, made.sae.write, decoder_rows(made.sae, indices), N_TOKENS)
    nearest = nearest_features(made.sae, indices, N_NEAREST)
    place = place_of(made.sae.identity.source) if wanted.neuronpedia else None
    told = described(place, indices, options.report) if place else Descriptions({}, "")
    words = words_of_all(reads, len(indices), loaded.tokenizer) if wanted.samples else [[] for _ in indices]
    selected = {one.index for one in made.found.chosen}
    features = []
    for c, one in enumerate(made.chosen):
        features.append(
            {
                **dataclasses.asdict(one),
                **_scores(made, one.index),
                "rates": {read.group.name: read.rate(c) for read in reads},
                "means": {read.group.name: float(read.contexts.mean_C[c]) for read in reads},
                "promoted": _tokens(said[c].promoted if said else []),
                "suppressed": _tokens(said[c].suppressed if said else []),
                "nearest": [{"index": j, "cosine": cosine, "is_selected": j in selected} for j, cosine in nearest[c]],
                "words": words[c],
                "description": told.texts.get(one.index),
                "warnings": doubts_of(reads, c, one, made.sae.identity.n_features, loaded.tokenizer),
            }
        )
    no_lens = f"What is written at {made.sae.write.name} promotes no tokens by itself: there is no logit lens of it."
    no_place = f"Neuronpedia has no pages of the SAE {made.sae.identity.source} that sae-lens knows of."
    notes = [*([] if said else [no_lens]), *([no_place] if wanted.neuronpedia and place is None else []), told.note]
    return features, [note for note in notes if note]


def _tokens(pairs: Sequence[tuple[str, float]]) -> list[Json]:
    return [{"token": token, "value": value} for token, value in pairs]


def _scores(made: _Prepared, index: int) -> Json:
    """Of select, which has those of every feature; the ratio is unknown where retain text never woke it."""
    if made.features is None:
        return dict.fromkeys(("forget_score", "retain_score", "ratio"))
    score, tensors = made.features.body_as(FeatureSet).score, made.tensors
    retain = float(score_of(score, tensors, "retain")[index])
    if not made.features.body_as(FeatureSet).forget_tokens:
        return {"forget_score": None, "retain_score": retain, "ratio": None}
    forget = float(score_of(score, tensors, "forget")[index])
    return {"forget_score": forget, "retain_score": retain, "ratio": forget / retain if retain > EPSILON else None}


def _earlier(workspace: Workspace, found: Inspected) -> list[Stored]:
    """Guardrails of the workspace on the same SAE that were made before the inspected one; of features, all."""
    known = []
    for artifact_id in workspace.ids("guardrail"):
        try:
            stored = workspace.read(artifact_id)
        except DsgError:  # A damaged one is no reason not to look at this one.
            continue
        if stored.json["sha256"] == found.made.json["sha256"]:
            break
        sae = stored.header.sae
        if sae is not None and (sae.sha256, sae.config_sha256) == (found.sae.sha256, found.sae.config_sha256):
            known.append(stored)
    return known


def _overlap(made: _Prepared) -> list[Json]:
    """Which of the features earlier guardrails clamp too."""
    overlap = []
    for stored in made.earlier:
        clamped = stored.body_as(Guardrail).indices
        shared = [one.index for one in made.chosen if one.index in clamped]
        overlap.append({"id": stored.id, "n_features": len(clamped), "shared": shared})
    return overlap
