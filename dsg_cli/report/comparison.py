"""A comparison of methods: its tables for a terminal of 80 columns, Markdown and a page, and its findings in words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest

from markupsafe import Markup
from rich.console import Group

from dsg_cli.methods import METHODS
from dsg_cli.report.rendering import Name, Styled, Table, View, code, interval, share, spread, terminal
from dsg_cli.workspace.body import Json
from dsg_cli.workspace.results import Comparison

UNHARMED = 0.98  # Share of the base model's accuracy on every other bench from which on a method is said to harm none.


def comparison_view(body: Comparison) -> View:
    """Quality and cost of each method, then how requests one after another went, and what failed."""
    parts: View = [quality_table(body), "", cost_table(body)]
    if body.sequences:
        parts += ["", sequence_table(body)]
    return [*parts, *failures_compared(body)]


def comparison_table(body: Comparison) -> Group:
    """The same for a terminal."""
    return terminal(comparison_view(body))


def comparison_page(body: Comparison, link: Callable[[str], Markup]) -> View:
    """The same for a page: every row of it names its method, those of quality what they were measured on."""
    quality, costs = quality_table(body), cost_table(body)
    sources = [(*row["artifacts"], row.get("eval"), row.get("attack")) for row in body.rows]
    links = [Markup(" ").join(link(name) for name in names if name) for names in sources]
    rows = [[*row, cell] for row, cell in zip_longest(quality.rows, links, fillvalue="")]
    view: View = [replace(quality, columns=[*quality.columns, "from"], rows=rows)]
    view.append(replace(costs, fold="What each took to make"))
    if body.sequences:
        sequences, rows = sequence_table(body), []
        for row in sequences.rows:
            rows.append([row[0] or rows[-1][0], *row[1:]])
        view.append(replace(sequences, rows=rows, notes=(), fold="Accuracy after each request, by bench"))
    return [*view, *failures_compared(body)]


def comparison_markdown(body: Comparison) -> str:
    """The same as Markdown."""
    parts = [quality_table(body).markdown(), legend(body), cost_table(body).markdown()]
    if body.sequences:
        parts.append(sequence_table(body).markdown())
    failed = [f"- {code(row_name(body, row))}: {' '.join(row['error'].split())}" for row in body.rows if row["error"]]
    return "\n\n".join([*parts, *(["\n".join(failed)] if failed else [])])


def failures_compared(body: Comparison) -> list[Styled]:
    """What could not be made, and why."""
    lines = [f"{row_name(body, row)}: {row['error']}" for row in body.rows if row["error"]]
    lines += [f"{row['method']}, further requests: {row['error']}" for row in body.sequences if row["error"]]
    return [Styled(line, "red") for line in lines]


def legend(body: Comparison) -> str:
    """What the columns are."""
    forget, base = body.benches["forget"], body.base["test"]
    steps = next((row["relearned"]["x"] for row in body.rows if row["relearned"]), None)
    of_base = f" (base {share(base[forget].get('acc'))})" if forget in base else ""
    near, other = (", ".join(body.benches[role]) or "none" for role in ("near", "other"))
    sentences = [
        f"forget: accuracy on {forget}{of_base}, chance {body.chance:.2f}.",
        f"near: {near}; other: {other}; means over benches.",
        "gated: share of near and other questions on which a gate or filter acted.",
    ]
    if steps is not None:
        sentences.append(f"relearned: forget accuracy after {steps} steps of fine-tuning on other forget questions.")
    if body.trials:
        names = [trial["method"] for trial in body.trials]
        budget = max(names.count(name) for name in names)
        sentences.append(f"dev score: {body.criterion}, {budget} trials a method at most.")
    return " ".join(sentences)


def quality_table(body: Comparison) -> Table:
    """A row a method, one for each further SAE, and the base model's."""
    scores = {trial["method"]: trial["score"] for trial in body.trials if trial["is_chosen"]}
    rows: list[list[str]] = []
    for row in body.rows:
        forget = row["results"].get(body.benches["forget"], {})
        gate_rates = [row["gate"][bench] for bench in other_benches(body) if bench in row["gate"]]
        numbers = [
            *(mean_accuracy(row["results"], body.benches[role]) for role in ("near", "other")),
            sum(gate_rates) / len(gate_rates) if gate_rates else None,
            row["relearned"].get("guarded"),
            scores.get(row["method"]),
        ]
        forgotten = [share(forget.get("acc")), interval(forget, "acc")]
        rows.append([Name(row_name(body, row)), *forgotten, *map(share, numbers)])
    if base := body.base["test"]:
        relearned = next((row["relearned"]["unguarded"] for row in body.rows if row["relearned"]), None)
        means = [share(mean_accuracy(base, body.benches[role])) for role in ("near", "other")]
        forget_acc = share(base.get(body.benches["forget"], {}).get("acc"))
        rows.append(["(base model)", forget_acc, "-", *means, "-", share(relearned), "-"])
    columns = ("method", "forget", "95 %", "near", "other", "gated", "relearned", "dev score")
    return Table(columns, rows, "quality on test questions", notes=[legend(body)])


def cost_table(body: Comparison) -> Table:
    """What each took to make; it does not count evaluation and search."""
    formats = {"forward_tokens": ",", "backward_tokens": ",", "seconds": ".1f", "peak_memory_mb": ",.0f"}
    rows = []
    for row in body.rows:
        if cost := row["cost"]:
            numbers = [*(format(cost[key], digits) for key, digits in formats.items()), f"{cost['bytes'] / 1000:,.0f}"]
            rows.append([Name(row_name(body, row)), *numbers, str(row["n_features"] or "-")])
    columns = ("method", "forward", "backward", "seconds", "peak MB", "kB", "features")
    return Table(columns, rows, "what each took to make", notes=["forward, backward: tokens through the model."])


def sequence_table(body: Comparison) -> Table:
    """Of each method, forget accuracies after each request, and the mean of all that was never to be forgotten."""
    requests = list(dict.fromkeys(point["request"] for sequence in body.sequences for point in sequence["curve"]))
    benches = [body.benches["forget"], *requests[1:]]
    rest = [bench for bench in other_benches(body) if bench not in benches]
    rows = []
    for sequence in body.sequences:
        for i, point in enumerate(sequence["curve"], start=1):
            results = {bench: {"acc": acc} for bench, acc in point["results"].items()}
            accuracies = [share(point["results"].get(bench)) for bench in benches]
            name = Name(sequence["method"] if i == 1 else "")
            rows.append([name, str(i), *accuracies, share(mean_accuracy(results, rest))])
    columns, note = ("method", "requests", *benches, "rest"), "Accuracy after each request; lower is forgotten."
    return Table(columns, rows, "accuracy after each request", notes=[note])


def other_benches(body: Comparison) -> list[str]:
    """Everything that is to be kept."""
    return [*body.benches["near"], *body.benches["other"]]


def mean_accuracy(results: Json, benches: Sequence[str]) -> float | None:
    """Mean over those of the benches that were asked."""
    accuracies = [results[bench]["acc"] for bench in benches if results.get(bench, {}).get("acc") is not None]
    return sum(accuracies) / len(accuracies) if accuracies else None


def row_name(body: Comparison, row: Json, before_sae: str = ", ") -> str:
    """The method, and the SAE where it was applied to more than one."""
    saes = {other["sae"] for other in body.rows if other["method"] == row["method"]}
    return f"{row['method']}{before_sae}{str(row['sae']).rsplit('/', 1)[-1]}" if len(saes) > 1 else str(row["method"])


def subject_compared(body: Comparison, model: str) -> str:
    """Methods, model, and how settings were chosen."""
    n = len({row["method"] for row in body.rows})
    trials = f", with settings chosen in {len(body.trials)} trials on dev questions" if body.trials else ""
    return f"{model} is to stop answering about {body.benches['forget']}: {n} methods side by side{trials}."


def quality_compared(body: Comparison) -> Iterator[str]:
    """Which methods forget and keep the rest, which only do one of them, on test questions."""
    rows_by_outcome: defaultdict[tuple[bool, bool], list[Json]] = defaultdict(list)
    for row in body.rows:
        forget = row["results"].get(body.benches["forget"], {})
        if forget.get("acc") is not None:
            has_forgotten = forget.get("acc_low", forget["acc"]) <= body.chance
            rows_by_outcome[has_forgotten, _keeps_other_benches(row, body)].append(row)
    kept = f"keeps {UNHARMED:.0%} of the base model's accuracy on every other bench"
    both = _named(rows_by_outcome[True, True], body)
    yield f"Forgets down to guessing ({body.chance:.2f}) or below, and {kept}: {both}."
    sentences = {
        (True, False): "Forgets as much, and does not keep that",
        (False, True): "Keeps that, and does not forget as much",
        (False, False): "Does neither",
    }
    for outcome, sentence in sentences.items():
        if rows := rows_by_outcome[outcome]:
            yield f"{sentence}: {_named(rows, body)}."


def costs_compared(body: Comparison) -> Iterator[str]:
    """Of each form of method, the range of time and size that one guarded or changed model took."""
    names = {"guardrail": "Clamping features", "wrapper": "A prompt or filter", "model": "Changing weights"}
    for form, name in names.items():
        costs = [row["cost"] for row in body.rows if row["cost"] and form_of(row["method"]) == form]
        if costs:
            seconds = spread((cost["seconds"] for cost in costs), ".1f")
            size = spread((cost["bytes"] / 1000 for cost in costs), ",.0f")
            yield f"{name} takes {seconds} s to make, with the settings known, and {size} kB."


def relearning_compared(body: Comparison) -> Iterator[str]:
    """What fine-tuning on other forget questions brought back, halfway to the base model or not."""
    rows = [row for row in body.rows if row["relearned"]]
    back = [row for row in rows if row["relearned"]["guarded"] > (row["relearned"]["unguarded"] + body.chance) / 2]
    for how_much, group in (("more", back), ("less", [row for row in rows if row not in back])):
        if group:
            after = f"After {rows[0]['relearned']['x']} steps of fine-tuning on other questions"
            methods = _named(group, body, is_relearned=True)
            yield f"{after}, {how_much} than half of it is back with {methods}."


def _keeps_other_benches(row: Json, body: Comparison) -> bool:
    """On every bench that the base model was asked; one that nobody asked after is no evidence of no harm."""
    shares = [
        (row["results"].get(bench, {}).get("acc") or 0) / base
        for bench in other_benches(body)
        if (base := body.base["test"].get(bench, {}).get("acc"))
    ]
    return bool(shares) and min(shares) >= UNHARMED


def _named(rows: Iterable[Json], body: Comparison, *, is_relearned: bool = False) -> str:
    """Methods with the accuracies of their SAEs, lowest to highest."""
    accuracies: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows:
        forget = row["relearned"]["guarded"] if is_relearned else row["results"][body.benches["forget"]]["acc"]
        accuracies[row["method"]].append(forget)
    names = [row["method"] for row in body.rows]
    parts = []
    for name, values in accuracies.items():
        saes = f", {len(values)} of {names.count(name)} SAEs" if names.count(name) > 1 else ""
        parts.append(f"{name} ({spread(values)}{saes})")
    return ", ".join(parts) or "none"


def form_of(method: str) -> str:
    """What a method makes: a guardrail, a wrapper or a model; nothing for one that is not known here."""
    return METHODS[method].form if method in METHODS else ""
