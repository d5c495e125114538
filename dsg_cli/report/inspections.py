"""What features are about, and what they did in one prompt: on a terminal and as parts of a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table as Grid
from rich.text import Text

from dsg_cli.inspection.neuronpedia import page_of, place_of
from dsg_cli.report.rendering import Styled, Table, page_templates, visible
from dsg_cli.workspace.body import Json
from dsg_cli.workspace.results import Inspection
from dsg_cli.workspace.store import Stored, Workspace

if TYPE_CHECKING:
    from dsg_cli.inspection.trace import Trace, Traced

HEAT_STYLES = ("", "black on grey82", "black on khaki1", "black on orange1", "bold white on red3")
"""From nothing on; each with enough contrast on dark and on light."""

ROLES = ("forget", "near", "retain")
MOST_CONTEXTS = 5  # On a page, of a feature in each group.
LONGEST_WHOLE = 48  # Tokens of a prompt that is shown whole in the table.
TOKEN_WIDTH = 14
CUT: Json = {"no_wrap": True, "overflow": "ellipsis"}  # Columns whose cells end in dots where there is no room.


def heat(tokens: Sequence[str], values: Sequence[float], *, largest: float, marked: int | None = None) -> Text:
    """A line of text, shaded in four steps by each token's value as a share of the largest.

    The token at place `marked` stands between « and ».
    """
    line = Text()
    for i, (token, value) in enumerate(zip(tokens, values, strict=True)):
        share = abs(value) / largest if largest > 0 else 0.0
        style = HEAT_STYLES[0 if share <= 0 else min(4, 1 + int(share * 4))]
        text = visible(token)
        if i == marked:
            space = text[: len(text) - len(text.lstrip())]
            line.append(space)
            text = f"«{text[len(space) :]}»"
        line.append(text, style=style)
    return line


def inspection_view(stored: Stored, rows: Sequence[Json] | None = None) -> Group:
    """The table, and a block a feature.

    `rows` are its contexts: by default those beside it, which have text only with `--samples`.
    """
    body = stored.body_as(Inspection)
    if rows is None:
        has_rows = stored.path.with_suffix(".jsonl").is_file()
        rows = Workspace(stored.path.parent).rows(stored) if has_rows else []
    with_text = [row for row in rows if "tokens" in row]
    place = place_of(stored.header.sae.source if stored.header.sae else "")
    blocks = []
    for feature in body.features:
        contexts = [row for row in with_text if row["feature"] == feature["index"]]
        blocks.append(_feature_block(feature, body, contexts, place))
    missing = [] if with_text else [Text("Contexts are kept without their text; --samples keeps it.", style="dim")]
    return Group(inspection_table(body), *map(Text, overlap_lines(body)), *missing, *blocks)


def inspection_table(body: Inspection) -> Table:
    """One row a feature."""
    columns = ("feature", "role", "weight", *ROLES, "", "promotes")
    widths = (7, 7, 6, 6, 6, 6, 2, None)
    rows = [
        [
            str(feature["index"]),
            "both" if len(feature["roles"]) > 1 else "".join(feature["roles"]) or "-",
            _weight(feature),
            *(rate_text(_rate_of(feature, body, role)) for role in ROLES),
            _warning_marks(feature),
            " ".join(visible(token["token"].strip()) for token in feature["promoted"][:4]),
        ]
        for feature in body.features
    ]
    note = "share of tokens on which each is active; F looks like formatting, S shared with near text"
    options = {
        name: CUT | {"min_width": width, "justify": "right" if width == 6 else "left"}
        for name, width in zip(columns, widths, strict=True)
    }
    return Table(columns, rows, notes=[Styled(note, "dim")], options=options)


def overlap_lines(body: Inspection) -> list[str]:
    """What earlier guardrails have in common with what is inspected."""
    return [
        f"{overlap['id']} clamps {' '.join(map(str, overlap['shared']))} too ({overlap['n_features']} in all)"
        for overlap in body.overlap
        if overlap["shared"]
    ]


def _feature_block(feature: Json, body: Inspection, rows: Sequence[Json], place: str | None) -> RenderableType:
    """All that there is to say of one feature; `place` is that of its SAE on Neuronpedia."""
    weight = f"; weight {_weight(feature)}" if feature["weight"] is not None else ""
    title = Text(f"\nfeature {feature['index']}", style="bold")
    title.append(f"  {', '.join(feature['roles']) or 'not chosen'}{weight}", style="not bold")
    lines = block_lines(feature, body, place)
    styled = [(name, Text(text, style="yellow" if name == "doubt" else "")) for name, text in lines]
    parts: list[RenderableType] = [title, _indented(styled, style="dim")]
    largest = max((abs(row["peak"]) for row in rows), default=0.0)
    for role, contexts in _by_role(rows, body).items():
        names = ", ".join(visible(name) for name in dict.fromkeys(row["group"] for row in contexts))
        texts = [heat(row["tokens"], row["activations"], largest=largest, marked=row["at"]) for row in contexts]
        shaded = [(f"{row['peak']:.3g}", text) for row, text in zip(contexts, texts, strict=True)]
        parts.append(Padding(Text(f"{role}: {names}", style="dim"), (0, 0, 0, 2)))
        parts.append(_indented(shaded, justify="right", width=6))
    return Group(*parts)


def _indented(rows: Sequence[tuple[str, Text]], **first_column: Any) -> Padding:
    grid = Grid.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, **first_column)
    grid.add_column()
    for row in rows:
        grid.add_row(*row)
    return Padding(grid, (0, 0, 0, 2))


def block_lines(feature: Json, body: Inspection, place: str | None) -> list[tuple[str, str]]:
    """Names and texts of a block, in order."""
    rates = "  ".join(f"{group['name']} {rate_text(feature['rates'].get(group['name']))}" for group in body.groups)
    lines = [
        ("scores", scores_text(feature)),
        ("active on", rates),
        ("promotes", _tokens_line(feature["promoted"])),
        ("suppresses", _tokens_line(feature["suppressed"])),
        ("alike", nearest_text(feature)),
        ("words", visible(" ".join(feature["words"]))),
        ("said to be", visible(feature["description"] or "")),
        *(("doubt", visible(warning)) for warning in feature["warnings"]),
        ("page", page_of(place, feature["index"]) if place else ""),
    ]
    return [(name, text) for name, text in lines if text]


def _tokens_line(tokens: Sequence[Json]) -> str:
    return "  ".join(visible(token["token"].strip(" ")) for token in tokens)


def nearest_text(feature: Json) -> str:
    """Features with nearly the same decoder row, with the cosine."""
    return ", ".join(
        f"{other['index']} ({other['cosine']:.2f}{', chosen' * other['is_selected']})" for other in feature["nearest"]
    )


def scores_text(feature: Json) -> str:
    """Of select; nothing where they were not at hand."""
    if feature["forget_score"] is None or feature["retain_score"] is None:
        return ""
    ratio = "never on retain text" if feature["ratio"] is None else f"ratio {feature['ratio']:.3g}"
    return f"forget {feature['forget_score']:.3g}, retain {feature['retain_score']:.3g}, {ratio}"


def _by_role(rows: Sequence[Json], body: Inspection) -> dict[str, list[Json]]:
    """The contexts of a feature by the role of their group, of each role the strongest: as many as a group has."""
    role_of = {group["name"]: group["role"] for group in body.groups}
    most = max((sum(row["group"] == name for row in rows) for name in role_of), default=0)
    contexts = {role: [row for row in rows if role_of.get(row["group"]) == role] for role in ROLES}
    return {role: sorted(of, key=lambda row: -abs(row["peak"]))[:most] for role, of in contexts.items() if of}


def _weight(feature: Json) -> str:
    return "" if feature["weight"] is None else f"{feature['weight']:+.2f}"


def rate_text(rate: float | None) -> str:
    """A share of tokens; one that is not 0 never looks like it."""
    return "-" if rate is None else "0%" if rate == 0 else "<0.1%" if rate < 0.001 else f"{rate:.1%}"


def _rate_of(feature: Json, body: Inspection, role: str) -> float | None:
    """Share of the tokens of all groups of a role on which a feature is active; None where there is none."""
    groups = [group for group in body.groups if group["role"] == role]
    n_tokens = sum(group["n_tokens"] for group in groups)
    n_active = sum(feature["rates"].get(group["name"], 0.0) * group["n_tokens"] for group in groups)
    return n_active / n_tokens if n_tokens else None


def _warning_marks(feature: Json) -> str:
    warnings = "\n".join(feature["warnings"])
    return "F" * ("formatting" in warnings) + "S" * ("shared with" in warnings)


def inspection_page(stored: Stored, rows: Sequence[Json]) -> str:
    """An inspection as a document of its own; of its contexts those are shown that have text."""
    body = stored.body_as(Inspection)
    return page_templates().get_template("inspection.html.j2").render(
        title=f"What the features of {body.inspected} are about",
        stored=stored,
        table=inspection_table(body),
        caption=f"Features of {body.inspected}",
        overlap=overlap_lines(body),
        features=feature_parts(stored, rows),
    )  # fmt: skip


def feature_parts(stored: Stored, rows: Sequence[Json], *, has_text: bool = True) -> Json:
    """What a page shows of features: a part each, and a note on texts that are missing.

    `rows` are contexts; without `has_text` nothing that is text of corpora is shown.
    """
    body = stored.body_as(Inspection)
    place = place_of(stored.header.sae.source) if stored.header.sae else None
    is_kept = any(row.get("tokens") for row in rows)
    note = ""
    if is_kept and not has_text:
        note = "Texts in which they fire are left out: --with-text shows them."
    elif rows and not is_kept:
        note = "Texts in which they fire were not stored: dsg inspect --samples stores them."
    parts = []
    for feature in body.features:
        own = [row for row in rows if row["feature"] == feature["index"] and row.get("tokens") and has_text]
        contexts, rates = [], []
        for group in body.groups:
            name = group["name"]
            contexts += [row for row in own if row["group"] == name][:MOST_CONTEXTS]
            numbers = [f"{feature[key].get(name, 0.0):.4g}" for key in ("rates", "means")]
            rates.append([name, *numbers, group["role"]])
        weight = f", weight {feature['weight']:.3g} in the gate's score" if feature["weight"] is not None else ""
        parts.append(
            {
                "index": feature["index"],
                "anchor": f"{stored.id}-feature-{feature['index']}",
                "lead": f"{', '.join(feature['roles']) or 'not chosen'}{weight}. {feature['description'] or ''}",
                "warnings": feature["warnings"],
                "scores": scores_text(feature),
                "promoted": _token_names(feature["promoted"]),
                "suppressed": _token_names(feature["suppressed"]),
                "nearest": nearest_text(feature),
                "page": page_of(place, feature["index"]) if place else "",
                "words": " ".join(feature["words"]) if has_text else "",
                "rates": Table(("corpus", "active on", "mean", "role"), rates),
                "contexts": contexts,
                "largest": max((abs(row["peak"]) for row in contexts), default=0) or 1,
            }
        )
    return {"note": note, "parts": parts}


def _token_names(tokens: Sequence[Json]) -> list[str]:
    return [token["token"].strip() or repr(token["token"]) for token in tokens]


def trace_view(traced: Traced) -> Group:
    """One prompt: what happened in a sentence, the text, the tokens."""
    trace = traced.trace
    gate = trace.gate
    if gate is None:
        strongest = [max(map(abs, of_token), default=0.0) for of_token in zip(*trace.activations, strict=True)]
        line = heat(trace.tokens, strongest, largest=max(strongest))
    else:
        above = [max(score - gate.floor, 0.0) for score in gate.score]
        # What is below the threshold is weak, however strong the text's strongest is.
        largest = max(*above, gate.threshold - gate.floor)
        line = heat(trace.tokens, above, largest=largest, marked=gate.latched_at)
    title = Text(f"{traced.inspected}: {_trace_headline(trace)}", style="bold")
    return Group(title, Text(), line, Text(), _trace_table(trace), Text())


def _trace_headline(trace: Trace) -> str:
    gate = trace.gate
    if gate is None:
        return f"{len(trace.features)} features; coloured by the strongest of them"
    rule = f"{gate.form} > {gate.threshold:.3f}"
    finite = [value for value in gate.statistic if value is not None]  # None counts as infinite.
    peak = _statistic(max(finite) if len(finite) == len(gate.statistic) else None)
    if not any(gate.gated):
        return f"{rule} stayed closed, at {peak}; nothing was clamped"
    if gate.latched_at is None:
        opened = f"gated the whole text, at {peak}"
    else:
        token = visible(trace.tokens[gate.latched_at].strip())
        opened = f"opened at token {gate.latched_at + 1} of {len(trace.tokens)}, {token!r}"
    n = sum(gate.clamped)
    return f"{rule} {opened}; {n} token{'' if n == 1 else 's'} clamped, largest edit {max(gate.edit):.2g}"


def _trace_table(trace: Trace) -> Table:
    gate = trace.gate
    is_whole = len(trace.tokens) <= LONGEST_WHOLE
    rows = []
    for i, token in enumerate(trace.tokens):
        is_latched = gate is not None and i == gate.latched_at
        if not (is_whole or is_latched or any(activations[i] for activations in trace.activations)):
            continue
        cells = []
        if gate:
            score = f"{gate.score[i]:.2f}" if trace.counted[i] else "-"
            state = "opens" if is_latched else "open" if gate.gated[i] else ""
            cells = [score, _statistic(gate.statistic[i]), state, f"{gate.edit[i]:.2g}" if gate.clamped[i] else ""]
        rows.append([str(i + 1), visible(token.strip(" ")), *cells, _active_features(trace, i)])
    columns = ["#", "token", *(["score", "statistic", "gate", "edit"] if gate else []), "strongest features"]
    options = dict.fromkeys(columns, CUT) | {"token": CUT | {"max_width": TOKEN_WIDTH}}
    if gate:
        options |= dict.fromkeys(("score", "statistic"), CUT | {"justify": "right"})
    notes = ["* is clamped where the gate is open" if gate else "* would be clamped"]
    if n_left_out := len(trace.tokens) - len(rows):
        notes.append(f"{n_left_out} tokens on which no feature is active are left out")
    return Table(columns, rows, notes=[Styled("; ".join(notes), "dim")], options=options)


def _active_features(trace: Trace, i: int) -> str:
    activations = zip(trace.features, trace.activations, strict=True)
    active = sorted(((acts[i], feature) for feature, acts in activations if acts[i]), key=lambda pair: -abs(pair[0]))
    most = 2 if trace.gate else 4
    parts = [f"{feature.index}{'*' * ('clamped' in feature.roles)} {value:.3g}" for value, feature in active[:most]]
    return "  ".join([*parts, *[f"+{len(active) - most}"] * (len(active) > most)])


def _statistic(value: float | None) -> str:
    return "inf" if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"
