"""`dsg inspect`: what are the features of a guardrail, or of a selection, about?

Reads the `select` part of the corpora through the model up to the hook and those features alone, once; keeps how often
and where they fire; asks their decoder rows what they promote and which features are like them; writes inspect-NNN.
Text of the corpora is shown, and kept only with `--samples`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dsg_cli.data.corpora import Corpus, check_disjoint, check_named, parse_name, part_of
from dsg_cli.data.tokens import bos_to_prepend, check_chat, chunks, encode, prompts
from dsg_cli.errors import DsgError
from dsg_cli.guardrail.runtime.guardrail import GuardrailModule
from dsg_cli.guardrail.selection import EPSILON, SelectedFeature, score_of, selected_features
from dsg_cli.inspection.contexts import read_contexts
from dsg_cli.inspection.features import Group, Read, Rows, context_rows, feature_warnings, with_near, words_of_all
from dsg_cli.inspection.lens import decoder_rows, logit_lens, nearest_features
from dsg_cli.inspection.neuronpedia import PageDescriptions, described, place_of
from dsg_cli.job import Job
from dsg_cli.models.language_model import LoadedModel, context_length, load_tokenizer
from dsg_cli.models.sae import SaeSource
from dsg_cli.models.sae_slice import load_slice
from dsg_cli.settings import Recipe
from dsg_cli.stages.composition import find_composition, guardrail_modules, only_guardrails
from dsg_cli.stages.inputs import chain_sae, check_tokens, identify, load_chain_model, read_corpora
from dsg_cli.stages.stage import QUIET, RunOptions, settle, stage
from dsg_cli.workspace.artifacts import FeatureSet, Guardrail, SaeIdentity
from dsg_cli.workspace.body import Json
from dsg_cli.workspace.provenance import Clock
from dsg_cli.workspace.results import Inspection
from dsg_cli.workspace.store import Stored, Workspace

MOST_TOKENS = 2**18
"""Of each corpus."""

LONGEST_ROW = 1024

N_TOKENS, N_NEAREST = 8, 3
"""Of the logit lens either way, and of like features."""

CANDIDATES = 8
"""Contexts that are kept for each that is shown: many are the same words."""


@dataclass(frozen=True)
class InspectSettings:
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
class InspectionShown:
    """The artifact, and its contexts with their text, which may be in no file."""

    stored: Stored
    rows: list[Json] = field(default_factory=list)
    """Empty where an earlier artifact without text was taken."""


def run(
    recipe: Recipe,
    workspace: Workspace,
    *,
    source: str | None = None,
    settings: InspectSettings = InspectSettings(),
    options: RunOptions = QUIET,
) -> InspectionShown:
    """Inspect the newest guardrail, else the newest features, or what is named."""
    clock = Clock()
    if settings.n_contexts < 1:
        raise DsgError(f"--contexts {settings.n_contexts} is too few; at least 1.")
    choice = find_choice(workspace, source, options.say)
    inspected, chosen = choice.artifact, choice.pick(settings.features)
    features = features_of(inspected)
    workspace.check_writable()
    recipe = settle(recipe, inspected.header)
    # Documents are drawn as select drew them, where that is known.
    limit, seed = recipe.corpora.limit, recipe.seed
    if features is not None:
        limit, seed = features.header.settings["limit"], features.header.seed
    limit = limit if settings.limit is None else settings.limit
    drawn = replace(recipe, seed=seed, corpora=replace(recipe.corpora, limit=limit))
    groups, notes = read_groups(drawn, inspected, features, near=settings.near)
    tokenizer = load_tokenizer(recipe.model.instead or inspected.header.model.source, recipe.model)
    check_chat(tokenizer, [group.corpus for group in groups])
    sae = chain_sae(inspected)
    earlier = _earlier(workspace, choice)
    scores = _scores(workspace, features, chosen)
    header_settings: Json = {
        **dataclasses.asdict(settings),
        "corpora": [group.described() for group in groups],
        "drawn": {"limit": drawn.corpora.limit, "seed": drawn.seed, "most_tokens": MOST_TOKENS},
        "earlier": [stored.id for stored in earlier],
    }
    inputs = [inspected, *([features] if features is not None and features.id != inspected.id else [])]
    with stage(
        "inspect", recipe, workspace, options, clock, header_settings, origin=inspected, inputs=inputs, notes=notes
    ) as this:
        if this.existing:
            return InspectionShown(this.existing, workspace.rows(this.existing) if settings.samples else [])
        loaded = load_chain_model(inspected.header, recipe, cut=True)
        reads = _read(loaded, choice, chosen, sae, groups, CANDIDATES * settings.n_contexts, this.job)
        reads, near_notes = with_near(reads, chosen)
        described, feature_notes = _describe(loaded, choice, chosen, sae, scores, reads, settings, this.job)
        rows = [
            row
            for c, feature in enumerate(chosen)
            for row in context_rows(reads, c, feature.index, settings.n_contexts, loaded.tokenizer)
        ]
        overlap = []  # Which of the features earlier guardrails clamp too.
        for stored in earlier:
            clamped = stored.body_as(Guardrail).indices
            shared = [feature.index for feature in chosen if feature.index in clamped]
            overlap.append({"id": stored.id, "n_features": len(clamped), "shared": shared})
        body = Inspection(
            inspected=inspected.id,
            groups=[
                {
                    "name": read.group.name,
                    "role": read.group.role,
                    "n_documents": read.rows.n_documents,
                    "n_tokens": read.contexts.n_tokens,
                }
                for read in reads
            ],
            features=described,
            overlap=overlap,
        )
        stored = this.write(
            body,
            n_tokens=sum(read.contexts.n_tokens for read in reads),
            notes=[*near_notes, *feature_notes],
            model=identify(loaded, inspected.header.model.last_layer) if recipe.model.allow_mismatch else None,
            rows=rows if settings.samples else [{key: row[key] for key in row if key != "tokens"} for row in rows],
        )
        return InspectionShown(stored, rows)


@dataclass(frozen=True)
class FeatureChoice:
    """An artifact that chose features: a guardrail or a selection."""

    artifact: Stored
    guardrail: GuardrailModule | None
    """None for a selection."""
    features: list[SelectedFeature]

    @property
    def sae(self) -> SaeIdentity:
        assert self.artifact.header.sae is not None
        return self.artifact.header.sae

    def pick(self, indices: Sequence[int]) -> list[SelectedFeature]:
        """These features of the SAE, with their roles if they have any; all that were chosen if none are named."""
        for index in indices:
            if not 0 <= index < self.sae.n_features:
                raise DsgError(f"The SAE {self.sae.source} has {self.sae.n_features} features; there is no {index}.")
        known = {feature.index: feature for feature in self.features}
        return [known.get(index, SelectedFeature(index, [])) for index in dict.fromkeys(indices)] or self.features

    def bos(self, loaded: LoadedModel) -> int | None:
        """The token that every sequence begins with, after a look at the model's others."""
        body = self.artifact.body
        if isinstance(body, Guardrail):
            check_tokens(loaded, body.special_ids, self.artifact.id)
            return body.bos
        return bos_to_prepend(loaded.tokenizer, self.sae.prepend_bos)


def find_choice(workspace: Workspace, source: str | None, say: Callable[[str], None] = lambda _: None) -> FeatureChoice:
    """The newest guardrail, else the newest features, which `say` then names, or what is named.

    A guardrail may also be named as a light file, or from the hub.
    """
    if source is None:
        kind = "guardrail" if workspace.ids("guardrail") else "features"
        stored = workspace.find(kind)
        source = stored.id
        say(f"acting: {source}" + (f" ({stored.body.method})" if isinstance(stored.body, Guardrail) else ""))
    name = Path(source).name
    if name.startswith("features-"):
        stored = workspace.find("features", source)
        return FeatureChoice(stored, None, selected_features(stored.body_as(FeatureSet)))
    if name.startswith(("threshold-", "eval-", "attack-", "study-", "compare-", "inspect-")):
        raise DsgError(f"dsg inspect takes a guardrail or features, not {source}.")
    composition = find_composition(workspace, [source])
    only_guardrails(composition, "dsg inspect")
    (guardrail,) = guardrail_modules(workspace, composition)
    return FeatureChoice(
        composition.guardrails[0], guardrail, selected_features(composition.bodies[0], guardrail.detect)
    )


def features_of(stored: Stored) -> Stored | None:
    """The features that an artifact was made from, where they lie beside it; itself, if it is features."""
    if stored.header.kind == "features":
        return stored
    beside = Workspace(stored.path.parent)
    for named in stored.header.inputs:
        path = stored.path.with_name(f"{named.id}.json")
        if not named.is_elsewhere and path.is_file() and (features := features_of(beside.read(str(path)))) is not None:
            return features
    return None


def read_groups(
    recipe: Recipe, inspected: Stored, features: Stored | None, *, near: Sequence[str]
) -> tuple[list[Group], list[str]]:
    """The corpora of select, and those that are named as near; and a note on each that has changed since.

    Documents are drawn by the recipe's limit and seed. `features` are those that the guardrail was made from, if they
    are at hand; near corpora may be some of theirs, or others.
    """
    if features is not None:
        names = {role: [corpus["name"] for corpus in features.header.settings[role]] for role in ("forget", "retain")}
    else:
        body = inspected.body_as(Guardrail)
        names = {"forget": body.forget, "retain": body.retain}
    near = list(near) or [name for name in names["retain"] if name == "lab-near"]
    if near:
        check_named(near, role="near")
    check_disjoint(names["forget"], near)
    near_names = [parse_name(name).name for name in near]
    is_whole = features is not None and recipe.corpora.limit == features.header.settings["limit"]
    groups: list[Group] = []
    notes: list[str] = []
    for role, of_role in names.items():
        corpora, changes = read_corpora(of_role, role, recipe, features) if of_role else ([], [])
        groups += [Group(corpus, "near" if corpus.name in near_names else role) for corpus in corpora]
        notes += changes if is_whole else []
    known = {group.name for group in groups}
    if further := [name for name in near if parse_name(name).name not in known]:
        corpora, _ = read_corpora(further, "near", recipe, None)
        groups += [Group(corpus, "near") for corpus in corpora]
    order = ("forget", "near", "retain")
    return sorted(groups, key=lambda group: order.index(group.role)), notes


def _earlier(workspace: Workspace, choice: FeatureChoice) -> list[Stored]:
    """Guardrails of the workspace on the same SAE that were made before the inspected one; of features, all."""
    earlier = []
    for stored in workspace.readable(workspace.ids("guardrail")):
        if stored.json["sha256"] == choice.artifact.json["sha256"]:
            break
        sae = stored.header.sae
        if sae is not None and (sae.sha256, sae.config_sha256) == (choice.sae.sha256, choice.sae.config_sha256):
            earlier.append(stored)
    return earlier


def _read(
    loaded: LoadedModel,
    choice: FeatureChoice,
    chosen: Sequence[SelectedFeature],
    sae: SaeSource,
    groups: Sequence[Group],
    n_contexts: int,
    job: Job,
) -> list[Read]:
    """One pass over each corpus, through the chosen features alone."""
    sae_slice = load_slice(sae, [feature.index for feature in chosen]).to(loaded.model.device)
    bos = choice.bos(loaded)
    seq_len = min(LONGEST_ROW, context_length(loaded.model.config))
    reads = []
    for group in groups:
        rows = read_rows(loaded.tokenizer, group.corpus, bos=bos, seq_len=seq_len)
        contexts = read_contexts(
            loaded.model,
            sae.site,
            lambda resid_TD: sae_slice(resid_TD).acts,
            rows.ids,
            loaded.tokenizer,
            n_contexts=n_contexts,
            job=job.named(f"{group.role} corpus {group.name.rsplit('/', 1)[-1]}"),
        )
        reads.append(Read(group, rows, contexts))
    return reads


BLOCK = 256
"""Documents that are encoded at a time."""


def read_rows(tokenizer: PreTrainedTokenizerBase, corpus: Corpus, *, bos: int | None, seq_len: int) -> Rows:
    """The `select` split of a corpus, on which scores and rates of select are too: so many tokens of it, at most."""
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


def _describe(
    loaded: LoadedModel,
    choice: FeatureChoice,
    chosen: Sequence[SelectedFeature],
    sae: SaeSource,
    scores: Sequence[Json],
    reads: Sequence[Read],
    settings: InspectSettings,
    job: Job,
) -> tuple[list[Json], list[str]]:
    indices = [feature.index for feature in chosen]
    tokenizer = loaded.tokenizer
    lens = logit_lens(loaded.model, tokenizer, sae.write, decoder_rows(sae, indices), N_TOKENS)
    nearest = nearest_features(sae, indices, N_NEAREST)
    place = place_of(sae.identity.source) if settings.neuronpedia else None
    descriptions = described(place, indices, job.progress) if place else PageDescriptions({}, "")
    words = words_of_all(reads, len(indices), tokenizer) if settings.samples else [[] for _ in indices]
    selected = {feature.index for feature in choice.features}
    rows = [
        {
            **dataclasses.asdict(feature),
            **scores[c],
            "rates": {read.group.name: read.rate(c) for read in reads},
            "means": {read.group.name: float(read.contexts.mean_C[c]) for read in reads},
            "promoted": _tokens(lens[c].promoted if lens else []),
            "suppressed": _tokens(lens[c].suppressed if lens else []),
            "nearest": [{"index": j, "cosine": cosine, "is_selected": j in selected} for j, cosine in nearest[c]],
            "words": words[c],
            "description": descriptions.texts.get(feature.index),
            "warnings": feature_warnings(reads, c, feature, sae.identity.n_features, tokenizer),
        }
        for c, feature in enumerate(chosen)
    ]
    notes = []
    if not lens:
        notes.append(f"What is written at {sae.write.name} promotes no tokens by itself: there is no logit lens of it.")
    if settings.neuronpedia and place is None:
        notes.append(f"Neuronpedia has no pages of the SAE {sae.identity.source} that sae-lens knows of.")
    return rows, [note for note in (*notes, descriptions.note) if note]


def _tokens(pairs: Sequence[tuple[str, float]]) -> list[Json]:
    return [{"token": token, "value": value} for token, value in pairs]


def _scores(workspace: Workspace, features: Stored | None, chosen: Sequence[SelectedFeature]) -> list[Json]:
    """Of select, which has those of every feature; the ratio is unknown where retain text never woke it."""
    rows: list[Json] = [dict.fromkeys(("forget_score", "retain_score", "ratio")) for _ in chosen]
    if features is None:
        return rows
    feature_set, statistics = features.body_as(FeatureSet), workspace.tensors(features)
    for row, j in zip(rows, (feature.index for feature in chosen), strict=True):
        row["retain_score"] = retain = float(score_of(feature_set.score, statistics, "retain")[j])
        if feature_set.forget_tokens:
            row["forget_score"] = forget = float(score_of(feature_set.score, statistics, "forget")[j])
            row["ratio"] = forget / retain if retain > EPSILON else None
    return rows
