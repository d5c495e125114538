"""Evaluations, expectations, attacks and published numbers as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dsg_cli.attacks import ATTACKS
from dsg_cli.evals.expect import GATE, parse_expected
from dsg_cli.methods import finetunes
from dsg_cli.report.rendering import Styled, Table, exact, fold, interval, number, share
from dsg_cli.settings import PublishedSection
from dsg_cli.workspace.body import Json
from dsg_cli.workspace.results import AttackReport, EvalReport
from dsg_cli.workspace.store import Stored

SIDES = {"base": "base", "unlearned": "guarded"}  # What tables call the sides of a bench.
DERIVED = ("_low", "_high", "_stderr", "_count")  # Endings of what follows from a metric.
NOT_MEASURABLE = "not measurable on this model"


def composed(composition: Sequence[Json]) -> str:
    """What acted, in its order."""
    return " + ".join(
        f"{part['id']} ({part['method']}{', taught' if finetunes(part['method']) else ''})" for part in composition
    )


@dataclass(frozen=True)
class ExpectationRow:
    """One expectation, its numbers as they are shown."""

    expect: str
    is_met: bool
    base: str
    unlearned: str  # What was held against the bound; of an attack, where most came back.
    bound: str
    n: str

    @property
    def verdict(self) -> Styled:
        return Styled("met", "green") if self.is_met else Styled("NOT MET", "red")


def expectation_rows(body: EvalReport | AttackReport) -> list[ExpectationRow]:
    """Every expectation, in the order in which they were given."""
    rows = []
    for outcome in body.expected:
        if isinstance(body, AttackReport):
            base, n = body.before["base"]["forget_acc"], body.before["unlearned"].get("n")
        else:
            condition = parse_expected(outcome["expect"], list(body.results))
            sides, is_gate = body.results[condition.bench], condition.metric == GATE
            base = None if is_gate else sides["base"].get(condition.metric)
            n = (body.gate[condition.bench] if is_gate else sides["unlearned"]).get("n")
        numbers = (exact(base), exact(outcome["value"]), exact(outcome.get("bound")), "-" if n is None else f"{n:,}")
        rows.append(ExpectationRow(outcome["expect"].strip(), outcome["met"], *numbers))
    return rows


def missed_table(chain: Sequence[Stored]) -> Table | None:
    """The expectations that were not met, if there are any; those of evaluations first."""
    bodies = [stored.body for kind in ("eval", "attack") for stored in chain if stored.header.kind == kind]
    rows = [row for body in bodies if isinstance(body, EvalReport | AttackReport) for row in expectation_rows(body)]
    missed = [[Styled(row.expect, "red"), row.base, row.unlearned, row.bound, row.n] for row in rows if not row.is_met]
    numbers = ("base", "guarded", "bound", "n")
    options = {"not met": {"overflow": "fold"}} | {name: {"justify": "right", "no_wrap": True} for name in numbers}
    return Table(("not met", *numbers), missed, options=options) if missed else None


def shown_metrics(sides: Json) -> list[str]:
    """Metrics of a bench in their order: accuracy alone where there is one."""
    unlearned = sides["unlearned"]
    if "acc" in unlearned:
        return ["acc"]
    names = [name for name, value in unlearned.items() if isinstance(value, int | float) and name != "n"]
    return [name for name in names if not name.endswith(DERIVED) and name[:6] != "gated_"] or ["acc"]


def refusals(refused: dict[str, Json]) -> list[str]:
    """A sentence for each bench on what could not be computed, and why."""
    return [
        f"{bench}: no {', '.join(metrics)}, {next(iter(metrics.values()))} (--reference)"
        for bench, metrics in refused.items()
    ]


def benches_of(stored: Stored) -> list[str]:
    """The benches of an evaluation that were named, without their parts."""
    results, named = stored.body_as(EvalReport).results, stored.header.settings.get("benches", [])
    return [bench for bench in results if bench in named] or list(results)


def evaluation_table(stored: Stored) -> Table:
    """What was measured, a row a bench or, of one on free text, a row a metric."""
    body = stored.body_as(EvalReport)
    has_reference = any("reference" in sides for sides in body.results.values())
    # In 80 columns: beside a reference, the number of questions and how many were gated stand with the bench.
    left_out = {"questions", "gated"} if has_reference else {"reference"}
    of_all = ("bench", "questions", "base", "guarded", "95 %", "gated", "reference")
    columns = [name for name in of_all if name not in left_out]
    benches = benches_of(stored)
    rows = [row for bench in benches for row in _bench_rows(bench, body, has_reference)]
    for row in expectation_rows(body):
        cells = {"bench": row.expect, "guarded": row.unlearned, "95 %": row.bound}
        rows.append(cells | {columns[-1]: row.verdict})
    remarks = [composed(body.composition)] if body.composition else []
    if len(benches) < len(body.results):
        remarks.append(f"{len(body.results) - len(benches)} parts more with --json")
    remarks += [f"{n} answers of the base model are from {name}" for name, n in body.base_from.items()]
    remarks += refusals(body.refused)
    cells_of = [[row.get(name, "") for name in columns] for row in rows]
    caption, notes = "base and unlearned model on the same questions", ["; ".join(remarks)] if remarks else []
    return Table(columns, cells_of, caption, notes, options={"bench": {"no_wrap": True}})


def _bench_rows(bench: str, body: EvalReport, has_reference: bool) -> Iterator[dict[str, str]]:
    """One row for accuracy; of a bench without one, a row a metric after the first, which says the rest."""
    sides, gate = body.results[bench], body.gate.get(bench)
    base, unlearned = sides["base"], sides["unlearned"]
    n = str(base["n"]) + (f" of {base['n_asked']}" if base.get("n_asked") else "")
    gated = share(gate["rate"] if gate else None)
    head = {"bench": f"{bench}, {n}, gated {gated}" if has_reference else bench, "questions": n, "gated": gated}
    metrics = shown_metrics(sides)
    if metrics == ["acc"]:
        shares = {"base": share(base.get("acc")), "guarded": share(unlearned.get("acc"))}
        yield head | shares | {"95 %": interval(unlearned, "acc")}
        return
    yield head
    for metric in metrics:
        row = {"bench": f"  {metric}", "base": number(base.get(metric)), "guarded": number(unlearned[metric])}
        row |= {"95 %": interval(unlearned, metric)}
        if f"gated_{metric}" in unlearned:
            row["gated"] = share(unlearned[f"gated_{metric}"])
        if "reference" in sides:
            row["reference"] = number(sides["reference"].get(metric))
        yield row


def evaluation_headline(body: EvalReport) -> str:
    """The first metric of up to three benches, under the guardrail."""
    shown = []
    for bench, sides in list(body.results.items())[:3]:
        metric = shown_metrics(sides)[0]
        value = sides["unlearned"].get(metric)
        shown.append(f"{bench} {share(value)}" if metric == "acc" else f"{bench} {metric} {number(value)}")
    return ", ".join(shown) + (", ..." if len(body.results) > 3 else "")


def curve_table(body: AttackReport) -> Table:
    """Every point of one attack; forget accuracies with their intervals."""
    variants = list(dict.fromkeys(point["variant"] for point in body.curve))
    has_variants = len(variants) > 1
    has_utility = any("utility_acc" in point["unlearned"] for point in body.curve)
    first, last = ["variant"] * has_variants, ["utility"] * has_utility
    columns = [*first, unit(body.attack) or "how", "guarded", "95 %", "gated", "unguarded", *last]
    rows: list[list[str]] = []
    variant_above = None
    for point in body.curve:
        guarded, variant = point["unlearned"], point["variant"]
        cells = [shown_x(point["x"]), share(guarded["forget_acc"]), interval(guarded, "forget")]
        cells += [share(guarded.get("gate_rate")), share(point["base"]["forget_acc"])]
        cells += [share(guarded.get("utility_acc"))] * has_utility
        rows.append([*[variant if variant != variant_above else ""] * has_variants, *cells])
        variant_above = variant
    for row in expectation_rows(body):
        cells = [row.expect, row.unlearned, row.bound, row.verdict, row.base]
        rows.append([*[""] * has_variants, *cells, *[""] * has_utility])
    before = body.before
    note = (
        f"{body.threat_model}{f' Variant: {variants[0]}.' if len(variants) == 1 and variants[0] else ''} Without the "
        f"attack: guarded {before['unlearned']['forget_acc']:.2f}, unguarded {before['base']['forget_acc']:.2f}."
    )
    if not body.summary["n_measurable"]:
        note += f" {NOT_MEASURABLE.capitalize()}: unguarded, it cannot answer."
    caption = f"{body.attack}, every point of its curve"
    evaded = [f"{variant + ': ' if variant else ''}{shown_x(x)}" for variant, x in body.summary["evaded_at"].items()]
    if evaded:
        note += f" Above {body.summary['evades_above']:.2f} from {'; '.join(evaded)}."
    return Table(columns, rows, caption, [note], fold=fold(body.curve, "points"))


def attack_headline(body: AttackReport) -> str:
    """What came back at most, and what there was without the attack."""
    summary = body.summary
    if not summary["n_measurable"]:
        return f"{body.attack} on {body.bench}: {NOT_MEASURABLE}"
    worst, before = share(summary["forget_acc_worst"]), share(summary["forget_acc_before"])
    return f"{body.attack} on {body.bench}: {worst}, before {before}"


def ranking(attacks: Sequence[AttackReport]) -> list[AttackReport]:
    """What brought back most first; what could not be measured last."""
    return sorted(attacks, key=lambda attack: -(attack.summary["forget_acc_worst"] or 0))


def ranking_table(attacks: Sequence[AttackReport]) -> Table:
    """One line an attack, at the point where most came back."""
    keys = ("forget_acc_before", "forget_acc_worst", "gate_rate_at_worst", "unguarded_at_worst")
    rows = []
    for attack in ranking(attacks):
        where = place(attack) if attack.summary["n_measurable"] else NOT_MEASURABLE
        rows.append([attack.attack, *(share(attack.summary[key]) for key in keys), where])
    note = "Accuracy on forget questions, guarded, where most came back; and the unguarded model there."
    return Table(("attack", "before", "worst", "gated", "unguarded", "where"), rows, notes=[note])


def place(attack: AttackReport) -> str:
    """The variant and the x at which most came back."""
    summary = attack.summary
    if not summary["n_measurable"]:
        return "-"
    parts = (summary["worst_variant"], shown_x(summary["worst_x"]), unit(attack.attack))
    return " ".join(part for part in parts if part)


def unit(kind: str) -> str:
    """What the x of an attack's curve counts."""
    return ATTACKS[kind].unit if kind in ATTACKS else "x"


def shown_x(x: float | str) -> str:
    """The x of a point."""
    return x if isinstance(x, str) else f"{x:g}"


def beside(section: PublishedSection, results: Json) -> list[Json]:
    """`[{bench, side, metric, published, measured, difference}]`; null where nothing was measured.

    `results` are an evaluation's: bench -> side -> metric -> value.
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


def published_table(rows: Sequence[Json]) -> Table:
    """The same as a table: shares with four digits after the point, other metrics with two."""
    cells = []
    for row in rows:
        n_digits = 4 if row["metric"].startswith("acc") else 2
        signs = {"published": "", "measured": "", "difference": "+"}
        numbers = ["-" if row[key] is None else f"{row[key]:{sign}.{n_digits}f}" for key, sign in signs.items()]
        cells.append([row["bench"], SIDES[row["side"]], row["metric"], *numbers])
    return Table(("", "side", "metric", "published", "measured", "difference"), cells)
