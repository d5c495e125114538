"""A comparison as terminal tables of at most 80 columns, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from dsg_cli.artifacts import Comparison, Json
from dsg_cli.report.attacks import share
from dsg_cli.report.markdown import code
from dsg_cli.report.markdown import table as markdown_table

QUALITY = ("method", "forget", "95 %", "near", "other", "gated", "relearned", "dev score")
COSTS = ("method", "forward", "backward", "seconds", "peak MB", "kB", "features")


def comparison_table(body: Comparison) -> Group:
    """Quality and cost of each method, then how requests one after another went."""
    parts: list[Table | Text] = [_table(QUALITY, quality_rows(body)), Text(legend(body))]
    parts += [Text(""), _table(COSTS, cost_rows(body)), Text("forward, backward: tokens through the model.")]
    if body.sequences:
        parts += [Text(""), _table(*sequence_rows(body)), Text("Accuracy after each request; lower is forgotten.")]
    failed = [f"{_name(body, row)}: {row['error']}" for row in body.rows if row["error"]]
    failed += [f"{one['method']}, further requests: {one['error']}" for one in body.sequences if one["error"]]
    return Group(*parts, *(Text(line, style="red") for line in failed))


def comparison_markdown(body: Comparison) -> str:
    """The same as Markdown."""
    parts = [markdown_table(QUALITY, [_coded(row) for row in quality_rows(body)]), legend(body)]
    parts.append(markdown_table(COSTS, [_coded(row) for row in cost_rows(body)]))
    if body.sequences:
        columns, rows = sequence_rows(body)
        parts.append(markdown_table(columns, [_coded(row) for row in rows]))
    failed = [f"- {code(_name(body, row))}: {' '.join(row['error'].split())}" for row in body.rows if row["error"]]
    return "\n\n".join([*parts, *(["\n".join(failed)] if failed else [])])


def legend(body: Comparison) -> str:
    """What the columns are."""
    benches, steps = body.benches, next((row["relearned"]["x"] for row in body.rows if row["relearned"]), None)
    forget, test = benches["forget"], body.base["test"]
    base = f" (base {share(test[forget].get('acc'))})" if forget in test else ""
    sentences = [
        f"forget: accuracy on {forget}{base}, chance {body.chance:.2f}.",
        f"near: {_listed(benches['near'])}; other: {_listed(benches['other'])}; means over benches.",
        "gated: share of near and other questions on which a gate or filter acted.",
    ]
    if steps is not None:
        sentences.append(f"relearned: forget accuracy after {steps} steps of fine-tuning on other forget questions.")
    if body.trials:
        sentences.append(f"dev score: {body.criterion}, {_budget(body)} trials a method at most.")
    return " ".join(sentences)


def quality_rows(body: Comparison) -> list[list[str]]:
    """A row a method, and one for each further SAE."""
    scores = {trial["method"]: trial["score"] for trial in body.trials if trial["is_chosen"]}
    rows = []
    for row in body.rows:
        forget = row["results"].get(body.benches["forget"], {})
        kept = [*body.benches["near"], *body.benches["other"]]
        interval = (
            f"{forget['acc_low']:.2f}-{forget['acc_high']:.2f}" if {"acc_low", "acc_high"} <= set(forget) else "-"
        )
        gated = [row["gate"][bench] for bench in kept if bench in row["gate"]]
        rows.append(
            [
                _name(body, row),
                share(forget.get("acc")),
                interval,
                share(_mean(row, body.benches["near"])),
                share(_mean(row, body.benches["other"])),
                share(sum(gated) / len(gated) if gated else None),
                share(row["relearned"].get("guarded")),
                share(scores.get(row["method"])),
            ]
        )
    relearned = next((row["relearned"] for row in body.rows if row["relearned"]), None)
    if body.base["test"]:
        base: Json = {"results": body.base["test"]}
        own = body.base["test"].get(body.benches["forget"], {})
        parts = [_mean(base, body.benches[role]) for role in ("near", "other")]
        again = share(relearned["unguarded"]) if relearned else "-"
        rows.append(["(base model)", share(own.get("acc")), "-", *map(share, parts), "-", again, "-"])
    return rows


def cost_rows(body: Comparison) -> list[list[str]]:
    """What each took to make; it does not count evaluation and search."""
    return [
        [
            _name(body, row),
            f"{row['cost']['forward_tokens']:,}",
            f"{row['cost']['backward_tokens']:,}",
            f"{row['cost']['seconds']:.1f}",
            f"{row['cost']['peak_memory_mb']:,.0f}",
            f"{row['cost']['bytes'] / 1000:,.0f}",
            str(row["n_features"]) if row["n_features"] else "-",
        ]
        for row in body.rows
        if row["cost"]
    ]


def sequence_rows(body: Comparison) -> tuple[list[str], list[list[str]]]:
    """Of each method, forget accuracies after each request, and the mean of all that was never to be forgotten."""
    kept = [*body.benches["near"], *body.benches["other"]]
    requests = list(dict.fromkeys(point["request"] for one in body.sequences for point in one["curve"]))
    benches = [body.benches["forget"], *requests[1:]]
    never = [bench for bench in kept if bench not in benches]
    rows = []
    for one in body.sequences:
        for number, point in enumerate(one["curve"], start=1):
            found = [point["results"].get(bench) for bench in benches]
            rest = [point["results"][bench] for bench in never if bench in point["results"]]
            mean = sum(rest) / len(rest) if rest else None
            rows.append([one["method"] if number == 1 else "", str(number), *map(share, found), share(mean)])
    return ["method", "requests", *benches, "rest"], rows


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _coded(row: Sequence[str]) -> list[str]:
    return [code(row[0], in_table=True) if row[0] and not row[0].startswith("(") else row[0], *row[1:]]


def _name(body: Comparison, row: Json) -> str:
    """The method, and the SAE where there are several."""
    saes = dict.fromkeys(one["sae"] for one in body.rows if one["method"] == row["method"])
    return f"{row['method']}, {row['sae'].rsplit('/', 1)[-1]}" if len(saes) > 1 else str(row["method"])


def _mean(row: Json, benches: Sequence[str]) -> float | None:
    found = [row["results"][bench]["acc"] for bench in benches if "acc" in row["results"].get(bench, {})]
    return sum(found) / len(found) if found else None


def _listed(benches: Sequence[str]) -> str:
    return ", ".join(benches) or "none"


def _budget(body: Comparison) -> int:
    names = [trial["method"] for trial in body.trials]
    return max(names.count(name) for name in names)
