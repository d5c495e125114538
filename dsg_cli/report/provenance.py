"""What an artifact was computed from, as a tree."""

from __future__ import annotations

from rich.text import Text
from rich.tree import Tree

from dsg_cli.artifacts import Header, Json
from dsg_cli.errors import DsgError
from dsg_cli.report.tables import headline
from dsg_cli.workspace import Stored, Workspace


def provenance_tree(stored: Stored) -> Tree:
    """An artifact, below it its inputs, and below those what they were computed from: model, SAE, corpora, versions.

    What differs from the artifact above is said; what lies elsewhere, is missing or is damaged too.
    """
    return _grown(Tree(Text(f"{stored.id}  {headline(stored)}"), guide_style="dim"), stored, None)


def _grown(tree: Tree, stored: Stored, above: Header | None) -> Tree:
    header = stored.header
    for line in facts(header, above):
        tree.add(Text(line, style="dim"))
    for named in header.inputs:
        if named.is_elsewhere:
            tree.add(Text(f"{named.id}, which lay elsewhere ({named.sha256[:12]})"))
            continue
        try:
            below = Workspace(stored.path.parent).read(str(stored.path.with_name(f"{named.id}.json")))
        except DsgError as error:
            tree.add(Text(f"{named.id}  {error.message}", style="red"))
            continue
        _grown(tree.add(Text(f"{below.id}  {headline(below)}")), below, header)
    return tree


def facts(header: Header, above: Header | None = None) -> list[str]:
    """What it was made with; of an input, only what is not as it is for the artifact above it."""
    known = _made_with(above) if above is not None else {}
    lines = [f"{name}: {text}" for name, text in _made_with(header).items() if known.get(name) != text]
    roles = [role for role in ("forget", "retain") if header.settings.get(role)]
    return [f"made {header.created}", *lines, *(f"{role}: {_corpora(header.settings[role])}" for role in roles)]


def _made_with(header: Header) -> dict[str, str]:
    git, sae = header.git, header.sae
    commit = f", commit {git['commit'][:12]}{' with changes' if git['dirty'] else ''}" if git else ""
    packages = ", ".join(f"{name} {version}" for name, version in header.packages.items())
    return {
        "model": f"{header.model.source}, fingerprint {header.model.fingerprint[:12]}",
        "SAE": f"{sae.source} at {sae.hook}, weights {sae.sha256[:12]}" if sae else "none",
        "versions": f"dsg-cli {header.dsg_version}{commit}, {packages}",
        "run": f"{header.device}, {header.dtype}, seed {header.seed}",
    }


def _corpora(described: dict[str, str] | list[str] | list[Json]) -> str:
    if isinstance(described, dict):
        return ", ".join(f"{name} ({digest[:12]})" for name, digest in described.items())
    if any(isinstance(one, str) for one in described):
        return ", ".join(map(str, described))  # Of a method that read no text.
    known = [one for one in described if isinstance(one, dict)]
    counts = [f"{one['documents']} documents, " if "documents" in one else "" for one in known]
    return ", ".join(f"{one['name']} ({n}{one['sha256'][:12]})" for one, n in zip(known, counts, strict=True))
