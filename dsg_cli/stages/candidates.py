"""Features that are picked without any text: by their descriptions, or by hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dsg_cli.artifacts import Json, SaeIdentity
from dsg_cli.descriptions import Descriptions, read_descriptions
from dsg_cli.embedding import rank_by_embedding
from dsg_cli.errors import DsgError
from dsg_cli.neuronpedia import place_of
from dsg_cli.neuronpedia_export import INSTEAD, fetch_descriptions
from dsg_cli.ranking import Match, rank_by_terms, unmatched
from dsg_cli.recipe import Recipe
from dsg_cli.settings import SelectSection
from dsg_cli.stages.session import Session

KEPT = 1000
"""Of a ranking, the best that an artifact names."""


@dataclass(frozen=True)
class Candidates:
    """Features in the order in which they are to be taken."""

    ranking: list[Match]
    texts: dict[int, str]
    """Their descriptions; none where they were named by hand."""
    described: Json
    """What an artifact says of the ranking; empty where they were named by hand."""
    notes: list[str]

    @property
    def indices(self) -> list[int]:
        return [match.index for match in self.ranking]


def is_picked(settings: SelectSection) -> bool:
    """Whether features are picked without text."""
    return settings.describe is not None or bool(settings.features)


def find_candidates(recipe: Recipe, sae: SaeIdentity, session: Session) -> Candidates | None:
    """What the settings pick; None if forget text says which features to take.

    Args:
        recipe: Its selection, and the device for an embedding model.
        sae: Whose features they are.
        session: Who downloads, and progress.

    Raises:
        DsgError: An index that the SAE does not have, no descriptions, bad ones, or none that matches.
    """
    settings = recipe.select
    if settings.features:
        beyond = [j for j in settings.features if j >= sae.n_features]
        if beyond:
            raise DsgError(f"The SAE has {sae.n_features:,} features; there is no {beyond[0]}.", "Check the list.")
        return Candidates([Match(j, 0.0) for j in settings.features], {}, {}, [])
    if settings.describe is None:
        return None
    found = _descriptions(settings, sae, session)
    if settings.embedding is None:
        ranking = rank_by_terms(settings.describe, found.texts)
        ranker, missing = "bm25", unmatched(settings.describe, found.texts.values())
    else:
        ranking = rank_by_embedding(
            settings.describe, found.texts, settings.embedding, device=recipe.model.device, report=session.report
        )
        ranker, missing = f"embedding {settings.embedding}", []
    rows: list[Json] = [{"index": match.index, "score": match.score} for match in ranking[:KEPT]]
    if settings.samples:
        rows = [row | {"description": found.texts[row["index"]]} for row in rows]
    said: Json = {"query": settings.describe, "ranker": ranker, "source": found.source, "sha256": found.sha256}
    said["n_matched"] = len(ranking)
    notes = [f"No description has the word {' or '.join(missing)}."] if missing else []
    return Candidates(ranking, found.texts, said | {"ranking": rows}, notes)


def _descriptions(settings: SelectSection, sae: SaeIdentity, session: Session) -> Descriptions:
    """From the file that is named, or else Neuronpedia's.

    Raises:
        DsgError: There are none, or they are bad.
    """
    if settings.descriptions is not None:
        return read_descriptions(Path(settings.descriptions), sae.n_features)
    name = place_of(sae.source)
    if name is None:
        raise DsgError(f"Nobody is known to have described the features of {sae.source}.", INSTEAD)
    path = fetch_descriptions(name, sae.n_features, report=session.report)
    return read_descriptions(path, sae.n_features, source=f"neuronpedia:{name}")
