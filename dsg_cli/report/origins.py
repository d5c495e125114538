"""Where the artifacts of a page come from: what was made from what, and each with what it was made with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dsg_cli.report.html import Markup, isolated, tag
from dsg_cli.report.provenance import facts
from dsg_cli.report.tables import headline
from dsg_cli.stages.gathering import Gathered
from dsg_cli.workspace import Stored

Link = Callable[[str], Markup]
"""From an id to its entry."""

OF_NONE = {"compare": "the artifacts that its rows name"}
"""What an artifact was made from that names no other in its header."""


def origins_section(gathered: Gathered, link: Link) -> Markup:
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


def _node(stored: Stored, artifacts: Sequence[Stored], link: Link) -> Markup:
    below = [one for one in artifacts if any(used.sha256 == stored.json["sha256"] for used in one.header.inputs)]
    inner = tag("ul", [_node(one, artifacts, link) for one in below]) if below else None
    return tag("li", link(stored.id), " ", isolated(headline(stored)), inner)


def _entry(stored: Stored, known: dict[str, set[str]], link: Link) -> Markup:
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
