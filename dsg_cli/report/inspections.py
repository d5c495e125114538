"""Tables of what features are about."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from dsg_cli.artifacts import Inspection


def inspection_table(body: Inspection) -> Table:
    """One row a feature."""
    groups = [group["name"] for group in body.groups]
    table = Table("feature", "promotes", *groups, box=None, pad_edge=False)
    for feature in body.features:
        promoted = Text(" ".join(one["token"].strip() for one in feature["promoted"][:3]))
        rates = [f"{feature['rates'].get(name, 0.0):.3f}" for name in groups]
        table.add_row(str(feature["index"]), promoted, *rates)
    table.caption = "share of tokens on which each is active"
    return table
