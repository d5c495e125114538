"""Features with what they are about, as part of a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dsg_cli.artifacts import Inspection, Json
from dsg_cli.neuronpedia import page_of, place_of
from dsg_cli.report import html
from dsg_cli.report.html import Markup, data_table, isolated, tag
from dsg_cli.report.inspections import inspection_table, nearest_text, overlap_line, scores_text
from dsg_cli.workspace import Stored

MOST_CONTEXTS = 5
"""Of a feature in each group."""


def inspection_page(stored: Stored, rows: Sequence[Json]) -> str:
    """An inspection as a document of its own.

    Args:
        stored: The inspection.
        rows: Its contexts, with their text where there is any.
    """
    body = stored.body_as(Inspection)
    overlap = [tag("p", overlap_line(one)) for one in body.overlap if one["shared"]]
    notes = [tag("p", isolated(f"note: {note}"), class_="note") for note in stored.header.notes]
    table = html.of_rich(inspection_table(body), f"Features of {body.inspected}")
    title = f"What the features of {body.inspected} are about"
    main = tag("main", tag("h1", title), tag("p", stored.id, class_="id"), notes, table, overlap)
    return html.page(title, main, features_section(stored, rows, heading="h2"))


def features_section(stored: Stored, rows: Sequence[Json], *, heading: str, has_text: bool = True) -> Markup:
    """One part a feature.

    Args:
        stored: The inspection.
        rows: Its contexts.
        heading: Element of the heading of each.
        has_text: Whether what is text of corpora is shown.
    """
    body = stored.body_as(Inspection)
    place = place_of(stored.header.sae.source) if stored.header.sae else None
    contexts: dict[int, list[Json]] = {}
    for row in rows:
        contexts.setdefault(row["feature"], []).append(row)
    if not has_text:
        body = dataclasses.replace(body, features=[one | {"words": []} for one in body.features])
        contexts = {index: [row | {"tokens": None} for row in several] for index, several in contexts.items()}
    parts = [_feature(stored.id, body, one, contexts.get(one["index"], []), place, heading) for one in body.features]
    is_kept = any(row.get("tokens") for row in rows)
    note = (
        "Texts in which they fire are left out: --with-text shows them."
        if is_kept and not has_text
        else (
            ""
            if is_kept or not rows
            else "Texts in which they fire were not stored: dsg inspect --samples stores them."
        )
    )
    return Markup((tag("p", note, class_="note") if note else "") + "".join(parts))


def _feature(
    artifact: str, body: Inspection, feature: Json, rows: Sequence[Json], place: str | None, heading: str
) -> Markup:
    roles = ", ".join(feature["roles"]) or "not chosen"
    weight = f", weight {feature['weight']:.3g} in the gate's score" if feature["weight"] is not None else ""
    rates = [
        [group["name"], *(f"{feature[key].get(group['name'], 0.0):.4g}" for key in ("rates", "means")), group["role"]]
        for group in body.groups
    ]
    parts = [
        tag(heading, f"Feature {feature['index']}", id=f"{artifact}-feature-{feature['index']}"),
        tag("p", f"{roles}{weight}. {feature['description'] or ''}"),
        [tag("p", isolated(warning), class_="failed") for warning in feature["warnings"]],
        tag("p", scores_text(feature), class_="dim") if scores_text(feature) else None,
        tag("p", "Promotes ", _tokens(feature["promoted"]), "; suppresses ", _tokens(feature["suppressed"]), "."),
        tag("p", "Alike: ", nearest_text(feature), ".") if feature["nearest"] else None,
        tag("p", tag("a", "Its page on Neuronpedia", href=page_of(place, feature["index"]))) if place else None,
        tag("p", "Words of its contexts: ", isolated(" ".join(feature["words"])), ".") if feature["words"] else None,
        data_table(
            ["corpus", "active on", "mean", "role"],
            rates,
            caption=f"Feature {feature['index']} by corpus",
            numeric=[0, 1, 1, 0],
        ),
    ]
    texts = [row for row in rows if row.get("tokens")]
    names = [group["name"] for group in body.groups]
    shown = [row for name in names for row in [one for one in texts if one["group"] == name][:MOST_CONTEXTS]]
    largest = max((abs(row["peak"]) for row in shown), default=0) or 1
    return tag("section", parts, [_context(row, largest) for row in shown])


def _tokens(promoted: Sequence[Json]) -> Markup:
    return Markup(", ".join(isolated(one["token"].strip() or repr(one["token"])) for one in promoted) or "nothing")


def _context(row: Json, largest: float) -> Markup:
    """Tokens shaded by activation, of a feature's largest; the peak is underlined too, every value is in its title."""
    shown = []
    for place, (token, value) in enumerate(zip(row["tokens"], row["activations"], strict=False)):
        share = abs(value) / largest
        style = f"background: rgba(var(--heat), {0.7 * share:.2f})" if share > 0.02 else None
        peak = "peak" if place == row.get("at") else None
        shown.append(tag("span", token, title=f"{value:.3g}", style=style, class_=peak))
    head = tag("span", isolated(row["group"]), f", peak {row['peak']:.3g}: ", class_="dim")
    return tag("p", head, tag("bdi", shown, dir="auto"), class_="tokens")
