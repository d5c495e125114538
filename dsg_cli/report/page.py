"""One page about some artifacts: a summary in words, figures, tables, and where all of it comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from dsg_cli import __version__
from dsg_cli.errors import DsgError
from dsg_cli.report.comparison import comparison_page, comparison_view
from dsg_cli.report.evaluations import benches_of, published_table, ranking_table
from dsg_cli.report.figures import draw
from dsg_cli.report.figures.style import Drawn, theme
from dsg_cli.report.findings import findings
from dsg_cli.report.gather import Gathered
from dsg_cli.report.inspections import feature_parts
from dsg_cli.report.rendering import HIDDEN, View, page_templates
from dsg_cli.report.tables import KIND_VIEWS, artifact_view, facts, headline
from dsg_cli.workspace.artifacts import FeatureSet, Threshold
from dsg_cli.workspace.body import Json
from dsg_cli.workspace.files import is_taken, write_atomically
from dsg_cli.workspace.results import AttackReport, Comparison, EvalReport, StudyReport
from dsg_cli.workspace.store import Stored


@dataclass(frozen=True)
class Report:
    """A page, and its figures for papers."""

    text: str
    figures: list[Drawn]


def report_of(gathered: Gathered, title: str, published: Sequence[Json] = (), *, has_text: bool = False) -> Report:
    """Everything in one page, with rows of `evaluations.beside` for a recipe's published numbers.

    With `has_text` it shows text of corpora, where an inspection kept some.
    """
    artifacts, ids = gathered.artifacts, {stored.id for stored in gathered.artifacts}
    figures = {stored.id: _figures(stored, gathered) for stored in artifacts}
    attacks = [(stored.id, stored.body_as(AttackReport)) for stored in gathered.of("attack")]
    figures["attacks"] = [draw.draw_all(attacks)] if len(attacks) > 1 else []
    figures["published"] = [draw.draw_published(published)]
    drawn = {name: [figure for figure in of if figure is not None] for name, of in figures.items()}

    def link(artifact: str) -> Markup:
        html = '<a href="#from-{0}" class="id">{0}</a>' if artifact in ids else '<span class="id">{0}</span>'
        return Markup(html).format(artifact.translate(HIDDEN))

    page = page_templates().get_template("page.html.j2")
    text = page.render(
        title=title,
        version=__version__,
        theme=Markup(theme()),
        ids=ids,
        link=link,
        drawn=drawn,
        findings=findings(gathered),
        published=published_table(published) if published else None,
        ranking=ranking_table([body for _, body in attacks]) if len(attacks) > 1 else None,
        sections=[
            {"kind": kind, "heading": shown.heading, "artifacts": gathered.of(kind)}
            for kind, shown in KIND_VIEWS.items()
            if gathered.of(kind)
        ],
        headlines={stored.id: headline(stored) for stored in artifacts},
        views={stored.id: _view(stored, link, has_text=has_text) for stored in artifacts},
        features={
            stored.id: feature_parts(stored, gathered.rows.get(stored.id, []), has_text=has_text)
            for stored in gathered.of("inspect")
        },
        roots=_tree(artifacts),
        origins=[_origin(stored, ids) for stored in artifacts],
    )
    return Report(text, [figure for of in drawn.values() for figure in of])


def _figures(stored: Stored, gathered: Gathered) -> list[Drawn | None]:
    body = stored.body
    if isinstance(body, EvalReport):
        chances = {bench: gathered.chance(stored, bench) for bench in body.results}
        return [draw.draw_evaluation(stored.id, body, benches_of(stored), chances)]
    if isinstance(body, Threshold):
        return [draw.draw_histogram(stored.id, body, gathered.rows.get(stored.id, []))]
    return [draw_one(stored.id, body) for draw_one in DRAWINGS.get(type(body), ())]


DRAWINGS: dict[type, Sequence[Callable[[str, Any], Drawn | None]]] = {
    Comparison: (draw.draw_comparison, draw.draw_sequence),
    AttackReport: (draw.draw_attack,),
    StudyReport: (draw.draw_study,),
}


def _view(stored: Stored, link: Callable[[str], Markup], *, has_text: bool) -> View:
    body = stored.body
    if isinstance(body, FeatureSet) and not has_text:
        # Descriptions may hold words of corpora.
        ranking = [{"index": row["index"], "score": row["score"]} for row in body.described.get("ranking", [])]
        described = body.described | {"ranking": ranking} if ranking else {}
        stored = replace(stored, body=body.replace(described=described))
    view = artifact_view(stored)
    if isinstance(body, Comparison):
        view[: len(comparison_view(body))] = comparison_page(body, link)
    return view


def _tree(artifacts: Sequence[Stored]) -> list[Json]:
    """Nodes `{id, headline, below}`: it begins with what was made from no other artifact of the page."""

    def node(stored: Stored) -> Json:
        digest = stored.json["sha256"]
        below = [node(other) for other in artifacts if digest in {used.sha256 for used in other.header.inputs}]
        return {"id": stored.id, "headline": headline(stored), "below": below}

    ids = {stored.id for stored in artifacts}
    return [node(stored) for stored in artifacts if not {used.id for used in stored.header.inputs if used.sha256} & ids]


def _origin(stored: Stored, ids: set[str]) -> Json:
    header = stored.header
    inputs = [used.id for used in header.inputs if used.id in ids]
    inputs += [f"{used.id} (not in this report; {used.sha256[:12]})" for used in header.inputs if used.id not in ids]
    cost = f"{header.seconds:,.1f} s, {header.n_tokens:,} tokens, peak {header.peak_memory_mb:,.0f} MB"
    pairs = [line.split(": ", 1) if ": " in line else line.split(" ", 1) for line in facts(header)]
    pairs += [["took", cost], ["sha256", stored.json["sha256"]], *(["note", note] for note in header.notes)]
    nothing = "the artifacts that its rows name" if header.kind == "compare" else "corpora"
    return {"id": stored.id, "inputs": inputs or [nothing], "facts": pairs}


def write_report(
    report: Report, output: Path, figures: Path | None, formats: Sequence[str], *, force: bool = False
) -> list[Path]:
    """Write the page and, into a folder if one is named, its figures: each file whole or not at all.

    Returns the paths of the figures, in every one of the formats `svg`, `png`, `pdf` that is named.
    """
    drawn = [(figure, kind) for figure in report.figures for kind in formats] if figures is not None else []
    paths = [(figures or Path()) / f"{figure.name}.{kind}" for figure, kind in drawn]
    if not force and (taken := [path for path in paths if is_taken(path)]):
        raise DsgError(f"{taken[0]} is there already.", "Name another folder with --figures, or replace with --force.")
    try:
        if figures is not None:
            figures.mkdir(parents=True, exist_ok=True)
        for path, (figure, kind) in zip(paths, drawn, strict=True):
            write_atomically(path, figure.content(kind))
        write_atomically(output, report.text.encode())
    except OSError as error:
        reason = f"{error.filename or output} cannot be written: {error.strerror or error}."
        raise DsgError(reason, "Make room, or name another.") from error
    return paths
