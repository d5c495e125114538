"""What a page shows of one artifact, below its figures: the tables that a terminal shows, each with a caption."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

from dsg_cli.artifacts import AttackReport, Comparison, FeatureSet, StudyReport
from dsg_cli.report import comparison, studies
from dsg_cli.report.attacks import curve_table, ranking_table
from dsg_cli.report.html import Markup, data_table, folded, of_rich, tag
from dsg_cli.report.tables import artifact_table
from dsg_cli.workspace import Stored

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
        stored = replace(stored, body=replace(body, described=body.described | {"ranking": ranking} if ranking else {}))
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
