"""One page about some artifacts: a summary in words, figures, tables, and where all of it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsg_cli import __version__
from dsg_cli.artifacts import AttackReport, Comparison, EvalReport, Inspection, Json, StudyReport, Threshold
from dsg_cli.report import html
from dsg_cli.report.features import features_section
from dsg_cli.report.figures import attack, comparison, evaluation, histogram, sequence, study
from dsg_cli.report.figures import published as published_figure
from dsg_cli.report.figures.style import Drawn, theme
from dsg_cli.report.findings import findings
from dsg_cli.report.html import Markup, isolated, tag
from dsg_cli.report.origins import origins_section
from dsg_cli.report.published import published_table
from dsg_cli.report.sections import Link, ranked, tables_of
from dsg_cli.report.tables import headline
from dsg_cli.stages.gathering import Gathered
from dsg_cli.workspace import Stored

HEADINGS = {
    "compare": "Methods side by side",
    "eval": "What it answers",
    "attack": "Attacks",
    "threshold": "The gate",
    "study": "Studies",
    "features": "Features",
    "guardrail": "Guardrails",
    "model": "Changed weights",
    "wrapper": "Wrappers",
    "inspect": "What the features are about",
}
"""Kinds in the order of the page."""


@dataclass(frozen=True)
class Report:
    """A page, and its figures for papers."""

    text: str
    figures: list[Drawn]


def report_of(gathered: Gathered, title: str, published: Sequence[Json] = (), *, has_text: bool = False) -> Report:
    """Everything in one page.

    Args:
        gathered: What it is about.
        title: Of the page.
        published: Rows of `published.beside`.
        has_text: Whether text of corpora, where an inspection kept some, is shown.
    """
    figures: dict[str, list[Drawn]] = {stored.id: _figures(stored, gathered) for stored in gathered.artifacts}
    if len(attacks := gathered.of("attack")) > 1:
        worst = attack.draw_all([(one.id, one.body_as(AttackReport)) for one in attacks])
        figures["attack"] = [worst] if worst else []
    link = _linked(gathered)
    sections = [_section(kind, gathered, figures, link, has_text=has_text) for kind in HEADINGS if gathered.of(kind)]
    if published:
        table = html.of_rich(published_table(list(published)), "Published beside measured")
        drawn = published_figure.draw(published)
        figures["published"] = [drawn] if drawn else []
        shown = [one.markup() for one in figures["published"]]
        sections.insert(0, tag("section", tag("h2", "Published beside measured", id="published"), shown, table))
    links = [tag("li", tag("a", name, href=f"#{anchor}")) for anchor, name in _anchors(gathered, bool(published))]
    main = tag("main", _summary(gathered, link), sections, origins_section(gathered, link), id="main")
    head = tag(
        "header",
        tag("a", "Skip to the report", href="#main", class_="skip"),
        tag("h1", isolated(title)),
        tag("nav", tag("ul", links), aria_label="Parts of the report"),
    )
    foot = tag("footer", tag("p", f"Made by dsg-cli {__version__}. Every number is from the artifact named beside it."))
    text = html.page(title, head, main, foot, figures_style=theme())
    return Report(text, [one for several in figures.values() for one in several])


def _figures(stored: Stored, gathered: Gathered) -> list[Drawn]:
    body = stored.body
    drawn: list[Drawn | None] = []
    if isinstance(body, Comparison):
        drawn = [comparison.draw(stored.id, body), sequence.draw(stored.id, body)]
    elif isinstance(body, EvalReport):
        known = {bench: gathered.chance(stored, bench) for bench in body.results}
        chances = {bench: chance for bench, chance in known.items() if chance is not None}
        drawn = [evaluation.draw(stored.id, body, stored.header.settings.get("benches", []), chances)]
    elif isinstance(body, AttackReport):
        drawn = [attack.draw(stored.id, body)]
    elif isinstance(body, Threshold):
        drawn = [histogram.draw(stored.id, body, gathered.rows.get(stored.id, []))]
    elif isinstance(body, StudyReport):
        drawn = [study.draw(stored.id, body)]
    return [one for one in drawn if one is not None]


def _anchors(gathered: Gathered, has_published: bool) -> list[tuple[str, str]]:
    kinds = [(f"kind-{kind}", name) for kind, name in HEADINGS.items() if gathered.of(kind)]
    published = [("published", "Published beside measured")] if has_published else []
    return [("summary", "Summary"), *published, *kinds, ("provenance", "Where it comes from")]


def _summary(gathered: Gathered, link: Link) -> Markup:
    parts = []
    for heading, sentences in findings(gathered).items():
        lines = [tag("li", isolated(one.text), [[" ", link(name)] for name in one.artifacts]) for one in sentences]
        parts += [tag("h3", heading), tag("ul", lines)]
    return tag("section", tag("h2", "Summary", id="summary"), tag("div", parts, class_="lead"))


def _section(kind: str, gathered: Gathered, figures: dict[str, list[Drawn]], link: Link, *, has_text: bool) -> Markup:
    of_kind = gathered.of(kind)
    parts = []
    for stored in of_kind:
        name = tag("h3", isolated(headline(stored)), " ", link(stored.id))
        if isinstance(stored.body, Inspection):
            shown = features_section(stored, gathered.rows.get(stored.id, []), heading="h4", has_text=has_text)
        else:
            shown = tables_of(stored, link, has_text=has_text)
        parts.append(tag("section", name, [one.markup() for one in figures[stored.id]], shown))
    several = [one.markup() for one in figures.get(kind, [])] if len(of_kind) > 1 else []
    first = [*several, ranked(of_kind)] if kind == "attack" and len(of_kind) > 1 else several
    return tag("section", tag("h2", HEADINGS[kind], id=f"kind-{kind}"), first, parts)


def _linked(gathered: Gathered) -> Link:
    """Of artifacts that the page shows, links to their entries; of others, the id alone."""
    ids = {stored.id for stored in gathered.artifacts}
    return lambda name: (
        tag("a", name, href=f"#from-{name}", class_="id") if name in ids else tag("span", name, class_="id")
    )
