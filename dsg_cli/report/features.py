"""Features with what they are about, as part of a page."""

from __future__ import annotations

from collections.abc import Sequence

from dsg_cli.artifacts import Inspection, Json
from dsg_cli.report.html import Markup, data_table, isolated, tag

MOST_CONTEXTS = 5
"""Of a feature in each group."""


def features_section(artifact: str, body: Inspection, rows: Sequence[Json]) -> Markup:
    """One part a feature."""
    contexts: dict[int, list[Json]] = {}
    for row in rows:
        contexts.setdefault(row["feature"], []).append(row)
    return Markup("".join(_feature(artifact, body, one, contexts.get(one["index"], [])) for one in body.features))


def _feature(artifact: str, body: Inspection, feature: Json, rows: Sequence[Json]) -> Markup:
    roles = ", ".join(feature["roles"]) or "not chosen"
    weight = f", weight {feature['weight']:.3g} in the gate's score" if feature["weight"] is not None else ""
    groups = [group["name"] for group in body.groups]
    rates = [[name, *(f"{feature[key].get(name, 0.0):.4g}" for key in ("rates", "means"))] for name in groups]
    parts = [
        tag("h3", f"Feature {feature['index']}", id=f"{artifact}-feature-{feature['index']}"),
        tag("p", f"{roles}{weight}. {feature['description'] or ''}"),
        [tag("p", isolated(warning), class_="failed") for warning in feature["warnings"]],
        tag("p", "Promotes ", _tokens(feature["promoted"]), "; suppresses ", _tokens(feature["suppressed"]), "."),
        tag("p", "Words of its contexts: ", isolated(" ".join(feature["words"])), ".") if feature["words"] else None,
        data_table(
            ["corpus", "active on", "mean"], rates, caption=f"Feature {feature['index']} by corpus", numeric=[0, 1, 1]
        ),
    ]
    texts = [row for row in rows if row.get("tokens")]
    shown = [row for name in groups for row in [one for one in texts if one["group"] == name][:MOST_CONTEXTS]]
    largest = max((abs(row["peak"]) for row in shown), default=0) or 1
    if rows and not shown:
        parts.append(tag("p", "Its contexts were not stored: dsg inspect --samples stores them.", class_="note"))
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
    head = tag("span", f"{row['group']}, peak {row['peak']:.3g}: ", class_="dim")
    return tag("p", head, tag("bdi", shown, dir="auto"), class_="tokens")
