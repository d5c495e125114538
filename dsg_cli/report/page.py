"""One page about some artifacts: a summary in words, figures, tables, and where all of it comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from dsg_cli import __version__
from dsg_cli.errors import DsgError
from dsg_cli.report import comparison, studies
from dsg_cli.report.evaluations import curve_table, published_table, ranking_table
from dsg_cli.report.figures.draw import (
    draw_all,
    draw_attack,
    draw_comparison,
    draw_evaluation,
    draw_histogram,
    draw_published,
    draw_sequence,
    draw_study,
)
from dsg_cli.report.figures.style import Drawn, theme
from dsg_cli.report.findings import findings
from dsg_cli.report.gather import Gathered
from dsg_cli.report.inspections import features_section
from dsg_cli.report.rendering import Markup, data_table, folded, isolated, of_rich, page, tag
from dsg_cli.report.tables import artifact_table, facts, headline
from dsg_cli.workspace.artifacts import FeatureSet, Threshold
from dsg_cli.workspace.files import is_taken, write_atomically
from dsg_cli.workspace.results import AttackReport, Comparison, EvalReport, Inspection, Json, StudyReport
from dsg_cli.workspace.store import Stored

OriginLink = Callable[[str], Markup]
"""From an id to its entry."""

OF_NONE = {"compare": "the artifacts that its rows name"}
"""What an artifact was made from that names no other in its header."""


def origins_section(gathered: Gathered, link: OriginLink) -> Markup:
    """A tree that begins with what was made from no other artifact of the page, and an entry for each."""
    made_of = {stored.id: {one.id for one in stored.header.inputs if one.sha256} for stored in gathered.artifacts}
    first = [one for one in gathered.artifacts if not made_of[one.id] & set(made_of)]
    return tag(
        "section",
        tag("h2", "Where it comes from", id="provenance"),
        tag("p", "What stands below another was made from it.", class_="note"),
        tag("ul", [_node(one, gathered.artifacts, link) for one in first], class_="tree"),
        [_entry(stored, made_of, link) for stored in gathered.artifacts],
    )


def _node(stored: Stored, artifacts: Sequence[Stored], link: OriginLink) -> Markup:
    below = [one for one in artifacts if any(used.sha256 == stored.json["sha256"] for used in one.header.inputs)]
    inner = tag("ul", [_node(one, artifacts, link) for one in below]) if below else None
    return tag("li", link(stored.id), " ", isolated(headline(stored)), inner)


def _entry(stored: Stored, known: dict[str, set[str]], link: OriginLink) -> Markup:
    header = stored.header
    elsewhere = [f"{one.id} (not in this report; {one.sha256[:12]})" for one in header.inputs if one.id not in known]
    here = [link(one.id) for one in header.inputs if one.id in known]
    origin = [one for pair in ((text, ", ") for text in (*here, *elsewhere)) for one in pair][:-1]
    cost = f"{header.seconds:,.1f} s, {header.n_tokens:,} tokens, peak {header.peak_memory_mb:,.0f} MB"
    lines = [("from", origin or OF_NONE.get(header.kind, "corpora")), *_split(facts(header)), ("took", cost)]
    lines += [("sha256", stored.json["sha256"]), *(("note", note) for note in header.notes)]
    return tag(
        "section",
        tag("h3", stored.id, id=f"from-{stored.id}"),
        tag(
            "dl",
            [[tag("dt", name), tag("dd", isolated(said) if isinstance(said, str) else said)] for name, said in lines],
            class_="facts",
        ),
    )


def _split(lines: Sequence[str]) -> list[tuple[str, str]]:
    """`name: text` and `made ...` as names and texts."""
    pairs = [line.split(": ", 1) if ": " in line else line.split(" ", 1) for line in lines]
    return [(name, text) for name, text in pairs]


Link = Callable[[str], Markup]
"""From an id to its entry in the page."""

CAPTIONS = {
    "features": "the selected features",
    "threshold": "the gate, and on which text it opens",
    "guardrail": "what it clamps, and when",
    "model": "what was changed, and how",
    "wrapper": "its rule, and what it refuses",
    "eval": "base and unlearned model on the same questions",
}

LONG = 12
"""Rows from which on a table that a figure shows too is folded."""


def tables_of(stored: Stored, link: Link, *, has_text: bool = False) -> Markup:
    """All tables of an artifact.

    Args:
        stored: The artifact.
        link: For the ids of others.
        has_text: Whether descriptions, which may hold words of corpora, are shown where they were kept.
    """
    body = stored.body
    if isinstance(body, FeatureSet) and not has_text:
        ranking = [{"index": row["index"], "score": row["score"]} for row in body.described.get("ranking", [])]
        described = body.described | {"ranking": ranking} if ranking else {}
        stored = replace(stored, body=body.replace(described=described))
    notes = [tag("p", tag("bdi", f"note: {note}", dir="auto"), class_="note") for note in stored.header.notes]
    if isinstance(body, Comparison):
        return Markup("".join([*_comparison(stored.id, body, link), *notes]))
    if isinstance(body, StudyReport):
        return Markup("".join([*_study(stored.id, body), *notes]))
    if isinstance(body, AttackReport):
        table = of_rich(curve_table(body), f"{stored.id}: {body.attack}, every point of its curve")
        n_rows = len(body.curve)
        return Markup("".join([folded(table, f"All {n_rows} points") if n_rows > LONG else table, *notes]))
    # Its own id, and where it comes from, stand elsewhere.
    shown = artifact_table(stored).renderables[1:-1]
    return Markup("".join(of_rich(one, f"{stored.id}: {CAPTIONS[stored.header.kind]}") for one in shown))


def ranked(attacks: list[Stored]) -> Markup:
    """Several attacks side by side, where most came back."""
    table = ranking_table([one.body_as(AttackReport) for one in attacks])
    return of_rich(table, f"All {len(attacks)} attacks, the one that brought back most first")


def _comparison(artifact: str, body: Comparison, link: Link) -> list[Markup]:
    """Quality with the artifacts that it was measured on, what each took, and how requests one after another went."""
    named = [[*row["artifacts"], row.get("eval"), row.get("attack")] for row in body.rows]
    links = [Markup(" ".join(link(one) for one in several if one)) for several in named]
    quality = comparison.quality_rows(body)
    rows = [[*row, of_row] for row, of_row in zip(quality, [*links, *[""] * (len(quality) - len(links))], strict=True)]
    columns = [*comparison.QUALITY, "from"]
    numeric = [0, *[1] * (len(comparison.QUALITY) - 1), 0]
    costs = comparison.cost_rows(body)
    parts = [
        data_table(columns, rows, caption=f"{artifact}: quality on test questions", numeric=numeric),
        tag("p", comparison.legend(body), class_="note"),
        folded(
            data_table(comparison.COSTS, costs, caption=f"{artifact}: what each took to make", numeric=[0, *[1] * 6])
            + tag("p", "forward, backward: tokens through the model.", class_="note"),
            "What each took to make",
        ),
    ]
    if body.sequences:
        heads, lines = comparison.sequence_rows(body)
        for above, line in pairwise(lines):
            line[0] = line[0] or above[0]
        table = data_table(heads, lines, caption=f"{artifact}: accuracy after each request", numeric=[0, *[1] * 99])
        parts.append(folded(table, "Accuracy after each request, by bench"))
    failed = [f"{row['method']}: {row['error']}" for row in (*body.rows, *body.sequences) if row["error"]]
    return [*parts, *(tag("p", tag("bdi", line, dir="auto"), class_="failed") for line in failed)]


def _study(artifact: str, body: StudyReport) -> list[Markup]:
    """With the columns that a terminal has no room for."""
    heads, rows = studies.table_of(body)
    is_number = [all(row[i][:1] in set("-+.0123456789") for row in rows) for i in range(len(heads))]
    table = data_table(heads, rows, caption=f"{artifact}: study {body.study}, a line a point", numeric=is_number)
    failed = [tag("p", tag("bdi", line, dir="auto"), class_="failed") for line in studies.failures(body)]
    shown = folded(table, f"All {len(rows)} lines") if len(rows) > LONG else table
    return [shown, tag("p", studies.legend(body), class_="note"), *failed]


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
        worst = draw_all([(one.id, one.body_as(AttackReport)) for one in attacks])
        figures["attack"] = [worst] if worst else []
    link = _linked(gathered)
    sections = [_section(kind, gathered, figures, link, has_text=has_text) for kind in HEADINGS if gathered.of(kind)]
    if published:
        table = of_rich(published_table(list(published)), "Published beside measured")
        drawn = draw_published(published)
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
    text = page(title, head, main, foot, figures_style=theme())
    return Report(text, [one for several in figures.values() for one in several])


def _figures(stored: Stored, gathered: Gathered) -> list[Drawn]:
    body = stored.body
    drawn: list[Drawn | None] = []
    if isinstance(body, Comparison):
        drawn = [draw_comparison(stored.id, body), draw_sequence(stored.id, body)]
    elif isinstance(body, EvalReport):
        known = {bench: gathered.chance(stored, bench) for bench in body.results}
        chances = {bench: chance for bench, chance in known.items() if chance is not None}
        drawn = [draw_evaluation(stored.id, body, stored.header.settings.get("benches", []), chances)]
    elif isinstance(body, AttackReport):
        drawn = [draw_attack(stored.id, body)]
    elif isinstance(body, Threshold):
        drawn = [draw_histogram(stored.id, body, gathered.rows.get(stored.id, []))]
    elif isinstance(body, StudyReport):
        drawn = [draw_study(stored.id, body)]
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


def write_report(
    made: Report, output: Path, figures: Path | None, kinds: Sequence[str], *, force: bool = False
) -> list[Path]:
    """Write both, each file whole or not at all; returns those of the figures.

    Args:
        made: The page.
        output: Its file.
        figures: Folder for its figures, if they are wanted as files.
        kinds: `svg`, `png`, `pdf`.
        force: Replace files that are there.
    """
    wanted = [(one, kind) for one in made.figures for kind in kinds] if figures is not None else []
    paths = [(figures or Path()) / f"{one.name}.{kind}" for one, kind in wanted]
    if not force and (taken := [path for path in paths if is_taken(path)]):
        raise DsgError(f"{taken[0]} is there already.", "Name another folder with --figures, or replace with --force.")
    try:
        if figures is not None:
            figures.mkdir(parents=True, exist_ok=True)
        for path, (one, kind) in zip(paths, wanted, strict=True):
            write_atomically(path, one.content(kind))
        write_atomically(output, made.text.encode())
    except OSError as error:
        where = error.filename or output
        raise DsgError(
            f"{where} cannot be written: {error.strerror or error}.", "Make room, or name another."
        ) from error
    return paths
