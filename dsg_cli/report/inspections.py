"""What features are about, on a terminal: a table of all, then a block of each with its contexts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsg_cli.inspection.trace import GateSteps, Trace, Traced

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dsg_cli.inspection.neuronpedia import page_of, place_of
from dsg_cli.report.rendering import Markup, data_table, isolated, of_rich, page, tag, visible
from dsg_cli.workspace.results import Inspection, Json
from dsg_cli.workspace.store import Stored, Workspace

STEPS = ("", "black on grey82", "black on khaki1", "black on orange1", "bold white on red3")
"""From nothing on; each with enough contrast on dark and on light."""

OPEN, CLOSE = "«", "»"


def heat(tokens: Sequence[str], values: Sequence[float], *, largest: float, marked: int | None = None) -> Text:
    """A line of text.

    Args:
        tokens: Its tokens.
        values: A number each; magnitudes are shown, in four steps.
        largest: The number that is as strong as can be.
        marked: The token to stand between « and ».
    """
    line = Text()
    for i, (token, value) in enumerate(zip(tokens, values, strict=True)):
        style = STEPS[step_of(value, largest)]
        shown = visible(token)
        if i == marked:
            lead = shown[: len(shown) - len(shown.lstrip())]
            line.append(lead)
            line.append(OPEN + shown[len(lead) :] + CLOSE, style=style)
        else:
            line.append(shown, style=style)
    return line


def step_of(value: float, largest: float) -> int:
    """0 for nothing, else 1 to 4."""
    share = abs(value) / largest if largest > 0 else 0.0
    return 0 if share <= 0 else min(4, 1 + int(share * 4))


ROLES = ("forget", "near", "retain")


def inspection_view(stored: Stored, rows: Sequence[Json] | None = None) -> Group:
    """The table, and a block a feature.

    Args:
        stored: The inspection.
        rows: Its contexts, with their text; by default those beside it, which have text only with `--samples`.
    """
    body = stored.body_as(Inspection)
    if rows is None:
        has_rows = stored.path.with_suffix(".jsonl").is_file()
        rows = Workspace(stored.path.parent).rows(stored) if has_rows else []
    shown = [row for row in rows if "tokens" in row]
    source = stored.header.sae.source if stored.header.sae else ""
    place = place_of(source)
    blocks = [
        feature_block(one, body, [row for row in shown if row["feature"] == one["index"]], place)
        for one in body.features
    ]
    overlap = [Text(overlap_line(one)) for one in body.overlap if one["shared"]]
    without = [] if shown else [Text("Contexts are kept without their text; --samples keeps it.", style="dim")]
    return Group(inspection_table(body), *overlap, *without, *blocks)


def inspection_table(body: Inspection) -> Table:
    """One row a feature."""
    table = Table("feature", "role", "weight", *ROLES, "", "promotes", box=None, pad_edge=False)
    for column, width in zip(table.columns, (7, 7, 6, 6, 6, 6, 2, 0), strict=True):
        column.no_wrap, column.overflow, column.min_width = True, "ellipsis", width or None
        column.justify = "right" if width == 6 else "left"
    for feature in body.features:
        promoted = Text(" ".join(visible(one["token"].strip()) for one in feature["promoted"][:4]))
        rates = [rate_text(rate_of(feature, body, role)) for role in ROLES]
        table.add_row(
            str(feature["index"]), role_text(feature), weight_text(feature), *rates, doubt_marks(feature), promoted
        )
    table.caption = Text(
        "share of tokens on which each is active; F looks like formatting, S shared with near text", style="dim"
    )
    return table


def feature_block(feature: Json, body: Inspection, rows: Sequence[Json], place: str | None) -> RenderableType:
    """All that there is to say of one feature; `place` is that of its SAE on Neuronpedia."""
    weight = f"; weight {weight_text(feature)}" if feature["weight"] is not None else ""
    title = Text(f"\nfeature {feature['index']}", style="bold")
    title.append(f"  {', '.join(feature['roles']) or 'not chosen'}{weight}", style="not bold")
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column()
    for name, text in block_lines(feature, body, place):
        grid.add_row(name, Text(text, style="yellow" if name == "doubt" else ""))
    return Group(title, Padding(grid, (0, 0, 0, 2)), *_contexts(rows, body))


def block_lines(feature: Json, body: Inspection, place: str | None) -> list[tuple[str, str]]:
    """Names and texts of a block, in order."""
    rates = "  ".join(f"{group['name']} {rate_text(feature['rates'].get(group['name']))}" for group in body.groups)
    lines = [
        ("scores", scores_text(feature)),
        ("active on", rates),
        ("promotes", _tokens(feature["promoted"])),
        ("suppresses", _tokens(feature["suppressed"])),
        ("alike", nearest_text(feature)),
        ("words", visible(" ".join(feature["words"]))),
        ("said to be", visible(feature["description"] or "")),
        *(("doubt", visible(warning)) for warning in feature["warnings"]),
        ("page", page_of(place, feature["index"]) if place else ""),
    ]
    return [(name, text) for name, text in lines if text]


def nearest_text(feature: Json) -> str:
    """Features with nearly the same decoder row, with the cosine."""
    return ", ".join(
        f"{one['index']} ({one['cosine']:.2f}{', chosen' if one['is_selected'] else ''})" for one in feature["nearest"]
    )


def scores_text(feature: Json) -> str:
    """Of select; nothing where they were not at hand."""
    if feature["forget_score"] is None or feature["retain_score"] is None:
        return ""
    ratio = "never on retain text" if feature["ratio"] is None else f"ratio {feature['ratio']:.3g}"
    return f"forget {feature['forget_score']:.3g}, retain {feature['retain_score']:.3g}, {ratio}"


def _tokens(pairs: Sequence[Json]) -> str:
    return "  ".join(visible(one["token"].strip(" ")) for one in pairs)


def _contexts(rows: Sequence[Json], body: Inspection) -> list[RenderableType]:
    largest = max((abs(row["peak"]) for row in rows), default=0.0)
    found: list[RenderableType] = []
    for role, strongest in by_role(rows, body).items():
        grid = Table.grid(padding=(0, 2))
        grid.add_column(justify="right", width=6, no_wrap=True)
        grid.add_column()
        for row in strongest:
            line = heat(row["tokens"], row["activations"], largest=largest, marked=row["at"])
            grid.add_row(f"{row['peak']:.3g}", line)
        names = ", ".join(visible(name) for name in dict.fromkeys(row["group"] for row in strongest))
        found += [Padding(Text(f"{role}: {names}", style="dim"), (0, 0, 0, 2)), Padding(grid, (0, 0, 0, 2))]
    return found


def by_role(rows: Sequence[Json], body: Inspection) -> dict[str, list[Json]]:
    """The contexts of a feature by the role of their group, of each role the strongest: as many as a group has."""
    role_of = {group["name"]: group["role"] for group in body.groups}
    most = max((sum(row["group"] == name for row in rows) for name in role_of), default=0)
    found = {}
    for role in ROLES:
        of_role = [row for row in rows if role_of.get(row["group"]) == role]
        if of_role:
            found[role] = sorted(of_role, key=lambda row: -abs(row["peak"]))[:most]
    return found


def role_text(feature: Json) -> str:
    """In a word."""
    return "both" if len(feature["roles"]) > 1 else "".join(feature["roles"]) or "-"


def weight_text(feature: Json) -> str:
    """In the gate's score."""
    return "" if feature["weight"] is None else f"{feature['weight']:+.2f}"


def rate_text(rate: float | None) -> str:
    """A share of tokens; one that is not 0 never looks like it."""
    if rate is None:
        return "-"
    return "0%" if rate == 0 else "<0.1%" if rate < 0.001 else f"{rate:.1%}"


def rate_of(feature: Json, body: Inspection, role: str) -> float | None:
    """Share of the tokens of all groups of a role on which a feature is active; None where there is none."""
    groups = [group for group in body.groups if group["role"] == role]
    n_tokens = sum(group["n_tokens"] for group in groups)
    active = sum(feature["rates"].get(group["name"], 0.0) * group["n_tokens"] for group in groups)
    return active / n_tokens if n_tokens else None


def doubt_marks(feature: Json) -> str:
    """A letter each kind of doubt."""
    kinds = {"F": "formatting", "S": "shared with"}
    return "".join(mark for mark, words in kinds.items() if any(words in one for one in feature["warnings"]))


def overlap_line(overlap: Json) -> str:
    """What an earlier guardrail has in common with what is inspected."""
    return f"{overlap['id']} clamps {' '.join(map(str, overlap['shared']))} too ({overlap['n_features']} in all)"


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
    table = of_rich(inspection_table(body), f"Features of {body.inspected}")
    title = f"What the features of {body.inspected} are about"
    main = tag("main", tag("h1", title), tag("p", stored.id, class_="id"), notes, table, overlap)
    return page(title, main, features_section(stored, rows, heading="h2"))


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
        body = body.replace(features=[one | {"words": []} for one in body.features])
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
        tag(
            "p",
            "Promotes ",
            _tokens_markup(feature["promoted"]),
            "; suppresses ",
            _tokens_markup(feature["suppressed"]),
            ".",
        ),
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


def _tokens_markup(promoted: Sequence[Json]) -> Markup:
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


SHORT = 48
"""Tokens of a text that is shown whole in the table."""

TOKEN_WIDTH = 14


def trace_view(traced: Traced) -> Group:
    """One prompt: what happened in a sentence, the text, the tokens."""
    seen = traced.trace
    return Group(
        Text(f"{traced.inspected}: {_told(seen)}", style="bold"), Text(), _line(seen), Text(), _table(seen), Text()
    )


def _told(seen: Trace) -> str:
    gate = seen.gate
    if gate is None:
        return f"{len(seen.features)} features; coloured by the strongest of them"
    rule = f"{gate.form} > {gate.threshold:.3f}"
    if not any(gate.gated):
        return f"{rule} stayed shut, at {_number(max_statistic(gate))}; nothing was clamped"
    if gate.latched_at is None:
        opened = f"gated the whole text, at {_number(max_statistic(gate))}"
    else:
        at = gate.latched_at
        opened = f"opened at token {at + 1} of {len(seen.tokens)}, {visible(seen.tokens[at].strip())!r}"
    n = sum(gate.clamped)
    return f"{rule} {opened}; {n} token{'' if n == 1 else 's'} clamped, largest edit {max(gate.edit):.2g}"


def max_statistic(gate: GateSteps) -> float | None:
    """The largest; None where one counts as infinite."""
    found = [one for one in gate.statistic if one is not None]
    return max(found) if len(found) == len(gate.statistic) else None


def _line(seen: Trace) -> Text:
    gate = seen.gate
    if gate is None:
        values = _strongest(seen)
        return heat(seen.tokens, values, largest=max(values))
    above = [max(score - gate.floor, 0.0) for score in gate.score]
    # What is below the threshold is weak, however strong the text's strongest is.
    return heat(seen.tokens, above, largest=max(*above, gate.threshold - gate.floor), marked=gate.latched_at)


def _strongest(seen: Trace) -> list[float]:
    return [max((abs(one) for one in of_token), default=0.0) for of_token in zip(*seen.activations, strict=True)]


def _table(seen: Trace) -> Table:
    gate = seen.gate
    columns = ["#", "token", *(["score", "statistic", "gate", "edit"] if gate else []), "strongest features"]
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns:
        column.no_wrap, column.overflow = True, "ellipsis"
    for column in table.columns[2 : 4 if gate else 2]:
        column.justify = "right"
    table.columns[1].max_width = TOKEN_WIDTH
    shown = [i for i in range(len(seen.tokens)) if len(seen.tokens) <= SHORT or _is_worth_a_row(seen, i)]
    for i in shown:
        cells = _gate_cells(gate, i, is_counted=seen.counted[i]) if gate else []
        table.add_row(str(i + 1), Text(visible(seen.tokens[i].strip(" "))), *cells, _features(seen, i))
    left_out = len(seen.tokens) - len(shown)
    notes = ["* is clamped where the gate is open" if gate else "* would be clamped"]
    notes += [f"{left_out} tokens on which no feature is active are left out"] if left_out else []
    table.caption = Text("; ".join(notes), style="dim")
    return table


def _is_worth_a_row(seen: Trace, i: int) -> bool:
    return any(acts[i] for acts in seen.activations) or (seen.gate is not None and i == seen.gate.latched_at)


def _gate_cells(gate: GateSteps, i: int, *, is_counted: bool) -> list[str]:
    opened = "opens" if i == gate.latched_at else "open" if gate.gated[i] else ""
    score = f"{gate.score[i]:.2f}" if is_counted else "-"
    return [score, _number(gate.statistic[i]), opened, f"{gate.edit[i]:.2g}" if gate.clamped[i] else ""]


def _features(seen: Trace, i: int) -> Text:
    pairs = zip(seen.features, seen.activations, strict=True)
    active = sorted(((abs(acts[i]), acts[i], one) for one, acts in pairs if acts[i]), key=lambda each: -each[0])
    most = 2 if seen.gate else 4
    parts = [f"{one.index}{'*' if 'clamped' in one.roles else ''} {value:.3g}" for _, value, one in active[:most]]
    return Text("  ".join(parts) + (f"  +{len(active) - most}" if len(active) > most else ""))


def _number(value: float | None) -> str:
    return "inf" if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"
