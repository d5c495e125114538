"""Evaluations as terminal tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from dsg_cli.attacks import ATTACKS
from dsg_cli.evals.expect import GATE, parse_expected
from dsg_cli.methods import finetunes
from dsg_cli.report.rendering import captioned, forget_interval, number, share
from dsg_cli.report.rendering import interval_markup as interval
from dsg_cli.settings import PublishedSection
from dsg_cli.workspace.results import AttackReport, EvalReport, Json
from dsg_cli.workspace.store import Stored


def composed(composition: Sequence[Json]) -> str:
    """What acted, in its order."""
    return " + ".join(
        f"{one['id']} ({one['method']}{', taught' if finetunes(one['method']) else ''})" for one in composition
    )


@dataclass(frozen=True)
class Verdict:
    """One expectation, its numbers as they are shown."""

    expect: str
    is_met: bool
    base: str
    unlearned: str
    """What was held against the bound."""
    bound: str
    n: str


def verdicts(body: EvalReport) -> list[Verdict]:
    """Every expectation of an evaluation, in the order in which they were given."""
    shown = []
    for one in body.expected:
        asked = parse_expected(one["expect"], list(body.results))
        sides, is_gate = body.results[asked.bench], asked.metric == GATE
        n = (body.gate[asked.bench] if is_gate else sides["unlearned"]).get("n")
        shown.append(
            Verdict(
                expect=one["expect"].strip(),
                is_met=one["met"],
                base=condition_number(None if is_gate else sides["base"].get(asked.metric)),
                unlearned=condition_number(one["value"]),
                bound=condition_number(one.get("bound")),
                n="-" if n is None else f"{n:,}",
            )
        )
    return shown


def verdicts_of_attack(body: AttackReport) -> list[Verdict]:
    """Every expectation of an attack; `unlearned` is what came back where most did."""
    base, n = body.before["base"]["forget_acc"], body.before["unlearned"].get("n")
    return [
        Verdict(
            expect=one["expect"].strip(),
            is_met=one["met"],
            base=condition_number(base),
            unlearned=condition_number(one["value"]),
            bound=condition_number(one.get("bound")),
            n="-" if n is None else f"{n:,}",
        )
        for one in body.expected
    ]


def met(is_met: bool) -> Text:
    """Whether an expectation was met, in a word."""
    return Text("met", style="green") if is_met else Text("NOT MET", style="red")


def missed_table(chain: Sequence[Stored]) -> Table | None:
    """The expectations that were not met, if there are any."""
    of_evaluations = [one for stored in chain if isinstance(stored.body, EvalReport) for one in verdicts(stored.body)]
    of_attacks = [
        one for stored in chain if isinstance(stored.body, AttackReport) for one in verdicts_of_attack(stored.body)
    ]
    missed = [one for one in (*of_evaluations, *of_attacks) if not one.is_met]
    table = Table(box=None, pad_edge=False)
    table.add_column("not met", overflow="fold")
    for name in ("base", "guarded", "bound", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in missed:
        table.add_row(Text(one.expect, style="red"), one.base, one.unlearned, one.bound, one.n)
    return table if missed else None


def condition_number(value: float | None) -> str:
    """Five digits: enough to see on which side of a bound a share of thousands of questions lies."""
    return "-" if value is None else f"{value:.5g}"


FOLLOWING = ("_low", "_high", "_stderr", "_count")
"""Endings of what follows from a metric."""


def shown_metrics(sides: Json) -> list[str]:
    """Metrics of a bench in their order: accuracy alone where there is one."""
    after = sides["unlearned"]
    if "acc" in after:
        return ["acc"]
    names = [
        name
        for name, value in after.items()
        if isinstance(value, int | float) and name != "n" and not name.endswith(FOLLOWING) and name[:6] != "gated_"
    ]
    return names or ["acc"]


def refusals(refused: dict[str, Json]) -> list[str]:
    """A sentence for each bench on what could not be computed, and why."""
    return [
        f"{bench}: no {', '.join(metrics)}, {next(iter(metrics.values()))} (--reference)"
        for bench, metrics in refused.items()
    ]


def evaluation_table(body: EvalReport, named: Sequence[str]) -> Table:
    """What was measured, a row a bench or, of one on free text, a row a metric."""
    has_reference = any("reference" in sides for sides in body.results.values())
    of_all = ("bench", "questions", "base", "guarded", "95 %", "gated", "reference")
    # In 80 columns: beside a reference, the number of questions and how many were gated stand with the bench.
    left_out = {"questions", "gated"} if has_reference else {"reference"}
    columns = [name for name in of_all if name not in left_out]
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, no_wrap=name == "bench")
    shown = shown_benches(body, named)
    for bench in shown:
        for row in _rows_of_bench(bench, body, has_reference):
            table.add_row(*(row.get(name, "") for name in columns))
    for one in verdicts(body):
        verdict: dict[str, str | Text] = {"bench": Text(one.expect), "guarded": one.unlearned, "95 %": one.bound}
        verdict[columns[-1]] = met(one.is_met)
        table.add_row(*(verdict.get(name, "") for name in columns))
    remarks = [composed(body.composition)] if body.composition else []
    if len(shown) < len(body.results):
        remarks.append(f"{len(body.results) - len(shown)} parts more with --json")
    remarks += [f"{n} answers of the base model are from {name}" for name, n in body.base_from.items()]
    remarks += refusals(body.refused)
    table.caption = "; ".join(remarks) or None
    return table


def _rows_of_bench(bench: str, body: EvalReport, has_reference: bool) -> Iterator[dict[str, str]]:
    """One row for accuracy; of a bench without one, a row a metric after the first, which says the rest."""
    sides, gate = body.results[bench], body.gate.get(bench)
    base, after = sides["base"], sides["unlearned"]
    n = str(base["n"]) + (f" of {base['n_asked']}" if base.get("n_asked") else "")
    gated = f"{gate['rate']:.2f}" if gate else "-"
    head = {"bench": f"{bench}, {n}, gated {gated}" if has_reference else bench, "questions": n, "gated": gated}
    metrics = shown_metrics(sides)
    if metrics == ["acc"]:
        shares = {"base": percent(sides, "base"), "guarded": percent(sides, "unlearned")}
        yield head | shares | {"95 %": interval(after, "acc")}
        return
    yield head
    for metric in metrics:
        row = {"bench": f"  {metric}", "base": number(base.get(metric)), "guarded": number(after[metric])}
        row |= {"95 %": interval(after, metric)}
        if f"gated_{metric}" in after:
            row["gated"] = f"{after[f'gated_{metric}']:.2f}"
        if "reference" in sides:
            row["reference"] = number(sides["reference"].get(metric))
        yield row


def percent(sides: Json, side: str) -> str:
    """Accuracy of one side, or a dash."""
    value = sides[side].get("acc")
    return "-" if value is None else f"{value:.2f}"


def first_metric(sides: Json) -> str:
    """The first metric of the unlearned side."""
    metric = shown_metrics(sides)[0]
    return percent(sides, "unlearned") if metric == "acc" else f"{metric} {number(sides['unlearned'].get(metric))}"


def shown_benches(body: EvalReport, named: Sequence[str]) -> list[str]:
    """Of an evaluation's benches those that were named, not their parts."""
    return [bench for bench in body.results if bench in named] or list(body.results)


NOT_MEASURABLE = "not measurable on this model"


def curve_table(body: AttackReport) -> Table:
    """Every point of one attack; forget accuracies with their intervals."""
    variants = list(dict.fromkeys(point["variant"] for point in body.curve))
    has_variants = len(variants) > 1
    has_utility = any("utility_acc" in point["unlearned"] for point in body.curve)
    columns = [*(["variant"] if has_variants else []), unit(body.attack) or "how"]
    table = Table(*columns, "guarded", "95 %", "gated", "unguarded", box=None, pad_edge=False)
    if has_utility:
        table.add_column("utility")
    above = None
    for point in body.curve:
        guard, variant = point["unlearned"], point["variant"]
        cells = [
            *([variant if variant != above else ""] if has_variants else []),
            shown(point["x"]),
            f"{guard['forget_acc']:.2f}",
        ]
        cells += [forget_interval(guard), share(guard.get("gate_rate")), share(point["base"]["forget_acc"])]
        table.add_row(*cells, *([share(guard.get("utility_acc"))] if has_utility else []))
        above = variant
    for one in verdicts_of_attack(body):
        mark = met(one.is_met)
        table.add_row(*([""] if has_variants else []), Text(one.expect), one.unlearned, one.bound, mark, one.base)
    before = body.before
    how = f" Variant: {variants[0]}." if variants[:1] not in ([], [""]) and not has_variants else ""
    table.caption = (
        f"{body.threat_model}{how} Without the attack: guarded {before['unlearned']['forget_acc']:.2f}, "
        f"unguarded {before['base']['forget_acc']:.2f}."
        + ("" if body.summary["n_measurable"] else f" {NOT_MEASURABLE.capitalize()}: unguarded, it cannot answer.")
        + evasions(body)
    )
    return table


def attack_headline(body: AttackReport) -> str:
    """What came back at most, and what there was without the attack."""
    found = body.summary
    if not found["n_measurable"]:
        return f"{body.attack} on {body.bench}: {NOT_MEASURABLE}"
    return (
        f"{body.attack} on {body.bench}: {share(found['forget_acc_worst'])}, before {share(found['forget_acc_before'])}"
    )


def evasions(body: AttackReport) -> str:
    """Where each variant first brought back more than half of what the guard took away."""
    first = [f"{variant + ': ' if variant else ''}{shown(x)}" for variant, x in body.summary["evaded_at"].items()]
    return f" Above {body.summary['evades_above']:.2f} from {'; '.join(first)}." if first else ""


def ranking(attacks: Sequence[AttackReport]) -> list[AttackReport]:
    """What brought back most first; what could not be measured last."""
    return sorted(attacks, key=lambda one: -(one.summary["forget_acc_worst"] or 0))


def ranking_table(attacks: Sequence[AttackReport]) -> Group:
    """One line an attack, at the point where most came back."""
    table = Table("attack", "before", "worst", "gated", "unguarded", "where", box=None, pad_edge=False)
    for one in ranking(attacks):
        found = one.summary
        cells = (found["forget_acc_before"], found["forget_acc_worst"], found["gate_rate_at_worst"])
        where = place(one) if found["n_measurable"] else NOT_MEASURABLE
        table.add_row(one.attack, *map(share, cells), share(found["unguarded_at_worst"]), where)
    table.caption = "Accuracy on forget questions, guarded, where most came back; and the unguarded model there."
    return captioned(table)


def place(one: AttackReport) -> str:
    """The variant and the x at which most came back."""
    found = one.summary
    if not found["n_measurable"]:
        return "-"
    return " ".join(part for part in (found["worst_variant"], shown(found["worst_x"]), unit(one.attack)) if part)


def unit(kind: str) -> str:
    """What the x of an attack's curve counts."""
    return ATTACKS[kind].unit if kind in ATTACKS else "x"


def shown(x: float | str) -> str:
    """The x of a point."""
    return x if isinstance(x, str) else f"{x:g}"


SIDES = {"base": "base", "unlearned": "guarded"}
"""What tables call the sides of a bench."""


def beside(section: PublishedSection, results: Json) -> list[Json]:
    """`[{bench, side, metric, published, measured, difference}]`; null where nothing was measured.

    Args:
        section: Of a recipe.
        results: bench -> side -> metric -> value, of an evaluation.
    """
    rows: list[Json] = []
    for bench, sides in section.results.items():
        for side, values in sides.items():
            of_metrics = values if isinstance(values, dict) else {"acc": values}
            for metric, published in of_metrics.items():
                measured = results.get(bench, {}).get(side, {}).get(metric)
                difference = None if measured is None else measured - published
                row = {"bench": bench, "side": side, "metric": metric, "published": published}
                rows.append(row | {"measured": measured, "difference": difference})
    return rows


def published_table(rows: list[Json]) -> Table:
    """The same for a terminal: shares with four digits after the point, other metrics with two."""
    table = Table("", "side", "metric", "published", "measured", "difference", box=None, pad_edge=False)
    for row in rows:
        n_digits = 4 if row["metric"].startswith("acc") else 2
        signs = {"published": "", "measured": "", "difference": "+"}
        shown = ["-" if row[key] is None else f"{row[key]:{sign}.{n_digits}f}" for key, sign in signs.items()]
        table.add_row(row["bench"], SIDES[row["side"]], row["metric"], *shown)
    return table
