"""Expectations of an evaluation beside the numbers that they were held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from dsg_cli.artifacts import AttackReport, EvalReport
from dsg_cli.expect import GATE, parse_expected
from dsg_cli.workspace import Stored


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
                base=number(None if is_gate else sides["base"].get(asked.metric)),
                unlearned=number(one["value"]),
                bound=number(one.get("bound")),
                n="-" if n is None else f"{n:,}",
            )
        )
    return shown


def verdicts_of_attack(body: AttackReport) -> list[Verdict]:
    """Every expectation of an attack; `unlearned` is what came back where most did."""
    base, n = body.before["unguarded"]["forget_acc"], body.before["guarded"].get("n")
    return [
        Verdict(
            expect=one["expect"].strip(),
            is_met=one["met"],
            base=number(base),
            unlearned=number(one["value"]),
            bound=number(one.get("bound")),
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


def number(value: float | None) -> str:
    """Five digits: enough to see on which side of a bound a share of thousands of questions lies."""
    return "-" if value is None else f"{value:.5g}"
