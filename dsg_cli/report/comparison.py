"""A comparison as terminal tables of at most 80 columns, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from dsg_cli.methods import METHODS
from dsg_cli.report.rendering import code, share
from dsg_cli.report.rendering import table as markdown_table
from dsg_cli.workspace.results import Comparison, Json

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


UNHARMED = 0.98
"""Share of the base model's accuracy on every other bench from which on a method is said to harm none."""


def what_compared(body: Comparison, model: str) -> str:
    """Methods, model, and how settings were chosen."""
    n = len({row["method"] for row in body.rows})
    trials = f", with settings chosen in {len(body.trials)} trials on dev questions" if body.trials else ""
    return f"{model} is to stop answering about {body.benches['forget']}: {n} methods side by side{trials}."


def how_well_compared(body: Comparison) -> Iterator[str]:
    """Which methods forget and keep the rest, which only do one of them, on test questions."""
    both, forgets, keeps, neither = (list[Json]() for _ in range(4))
    for row in body.rows:
        forget = row["results"].get(body.benches["forget"], {})
        if forget.get("acc") is None:
            continue
        is_gone, is_kept = forget.get("acc_low", forget["acc"]) <= body.chance, _harms_nothing(row, body)
        (both if is_gone and is_kept else forgets if is_gone else keeps if is_kept else neither).append(row)
    share = f"{UNHARMED:.0%} of the base model's accuracy on every other bench"
    yield f"Forgets down to guessing ({body.chance:.2f}) or below, and keeps {share}: {_named(both, body)}."
    if forgets:
        yield f"Forgets as much, and does not keep that: {_named(forgets, body)}."
    if keeps:
        yield f"Keeps that, and does not forget as much: {_named(keeps, body)}."
    if neither:
        yield f"Does neither: {_named(neither, body)}."


def costs_compared(body: Comparison) -> Iterator[str]:
    """Of each form of method, the range of time and size that one guarded or changed model took."""
    names = {"guardrail": "Clamping features", "wrapper": "A prompt or filter", "model": "Changing weights"}
    for form, name in names.items():
        rows = [row["cost"] for row in body.rows if row["cost"] and _form(row) == form]
        if rows:
            seconds, sizes = ([one[key] for one in rows] for key in ("seconds", "bytes"))
            size = _range([one / 1000 for one in sizes], ",.0f")
            yield f"{name} takes {_range(seconds, '.1f')} s to make, with the settings known, and {size} kB."


def relearned(body: Comparison) -> Iterator[str]:
    """What fine-tuning on other forget questions brought back, halfway to the base model or not."""
    tried = [row for row in body.rows if row["relearned"]]
    if not tried:
        return
    steps = tried[0]["relearned"]["x"]
    back = [row for row in tried if row["relearned"]["guarded"] > (row["relearned"]["unguarded"] + body.chance) / 2]
    held = [row for row in tried if row not in back]
    after = f"After {steps} steps of fine-tuning on other questions"
    if back:
        yield f"{after}, more than half of it is back with {_named(back, body, is_relearned=True)}."
    if held:
        yield f"{after}, less than half of it is back with {_named(held, body, is_relearned=True)}."


def _harms_nothing(row: Json, body: Comparison) -> bool:
    """On every bench that the base model was asked; one that nobody asked after is no evidence of no harm."""
    shares = []
    for bench in (*body.benches["near"], *body.benches["other"]):
        found, base = row["results"].get(bench, {}).get("acc"), body.base["test"].get(bench, {}).get("acc")
        if base:
            shares.append((found or 0) / base)
    return bool(shares) and all(one >= UNHARMED for one in shares)


def _named(rows: Iterable[Json], body: Comparison, *, is_relearned: bool = False) -> str:
    """Methods with the accuracies of their SAEs, lowest to highest."""
    found: dict[str, list[float]] = {}
    for row in rows:
        value = row["relearned"]["guarded"] if is_relearned else row["results"][body.benches["forget"]]["acc"]
        found.setdefault(row["method"], []).append(value)
    n_of = {name: sum(row["method"] == name for row in body.rows) for name in found}
    said = []
    for name, values in found.items():
        saes = f", {len(values)} of {n_of[name]} SAEs" if n_of[name] > 1 else ""
        said.append(f"{name} ({_range(values, '.2f')}{saes})")
    return ", ".join(said) or "none"


def _range(values: list[float], digits: str) -> str:
    low, high = format(min(values), digits), format(max(values), digits)
    return low if low == high else f"{low} to {high}"


def _form(row: Json) -> str:
    return METHODS[row["method"]].form if row["method"] in METHODS else ""
