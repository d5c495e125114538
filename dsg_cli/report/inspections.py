"""What features are about, on a terminal: a table of all, then a block of each with its contexts."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dsg_cli.artifacts import Inspection, Json
from dsg_cli.neuronpedia import page_of, place_of
from dsg_cli.report.heat import heat
from dsg_cli.report.plain import visible
from dsg_cli.workspace import Stored, Workspace

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
