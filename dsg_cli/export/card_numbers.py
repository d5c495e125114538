"""What a model card says was measured: evaluations, false positives, and what attacks brought back."""

from __future__ import annotations

from collections.abc import Iterator

from dsg_cli.artifacts import AttackReport, EvalReport, Json
from dsg_cli.attacks.names import KINDS
from dsg_cli.benches.names import PAPER
from dsg_cli.export.card_facts import CardFacts, CardGuard, split_of
from dsg_cli.export.card_metadata import named
from dsg_cli.export.light import without_path
from dsg_cli.report.attacks import NOT_MEASURABLE, place, ranking
from dsg_cli.report.markdown import code, escaped, table
from dsg_cli.report.metrics import number, shown_metrics
from dsg_cli.workspace import Stored

NO_EVALUATION = """No evaluation of it was at hand. This makes one; a further export puts it here:

```bash
{commands}
```"""
ABOUT = (
    "Base: the same model without the guardrail, asked the same. Brackets: 95 % intervals. Gated: share of what was "
    "asked on which the gate opened. Accuracy, unless a metric is named. From: the artifact that holds the number."
)
ABOUT_PAPER = (
    "Benches of the paper's protocol ask only what the base model answers rightly in every order of the options: "
    "its accuracy there is 1 by construction."
)
ABOUT_ATTACKS = "Accuracy on what was to be forgotten, where most came back; base: without the guardrail, there too."


def measured_section(facts: CardFacts) -> str:
    """The section, with what is missing and how to make it."""
    if facts.is_mismatched:
        evaluations = "It was put on other weights than those it was made for. Nothing was measured on these."
        return f"## What was measured\n\n{evaluations}\n\n{_false_positives(facts)}"
    parts = [_evaluations(facts), "### False positives", _false_positives(facts), "### Attacks", _attacks(facts)]
    return "\n\n".join(["## What was measured", *parts])


def _evaluations(facts: CardFacts) -> str:
    found = named(facts)
    if not found:
        return NO_EVALUATION.format(commands=f"dsg eval{_sources(facts)} --bench BENCH")
    rows = [row for bench, stored in found for row in _bench_rows(bench, stored)]
    used = {stored.id: stored for _, stored in found}
    parts = [
        table(["bench", "split", "base", "guarded", "gated", "n", "from"], rows),
        ABOUT + (f" {ABOUT_PAPER}" if any(bench in PAPER for bench, _ in found) else ""),
        "\n".join(f"- {code(name)}: {_asked(stored)}" for name, stored in used.items()),
    ]
    return "\n\n".join(parts)


def _bench_rows(bench: str, stored: Stored) -> Iterator[list[str]]:
    """A row a metric."""
    body = stored.body_as(EvalReport)
    sides, gate = body.results[bench], body.gate.get(bench)
    for metric in shown_metrics(sides):
        yield [
            code(bench if metric == "acc" else f"{bench}.{metric}", in_table=True),
            code(body.split, in_table=True),
            _with_interval(sides["base"], metric),
            _with_interval(sides["unlearned"], metric),
            _share(gate["rate"] if gate else None),
            str(sides["unlearned"].get("n", "-")),
            code(stored.id, in_table=True),
        ]


def _asked(stored: Stored) -> str:
    """How an evaluation asked, in words."""
    settings, body = stored.header.settings, stored.body_as(EvalReport)
    limit, n_shots = settings.get("limit"), settings.get("num_fewshot")
    said = [
        f"made {code(stored.header.created)} in {code(stored.header.dtype)}",
        {"test": "test questions", "dev": "dev questions, on which settings may have been chosen"}.get(body.split, ""),
        f"the first {limit} of each bench" if limit else "",
        f"{n_shots} examples in front" if n_shots else "",
        "in the chat template" if settings.get("apply_chat_template") else "",
    ]
    return ", ".join(one for one in said if one) + "."


def _false_positives(facts: CardFacts) -> str:
    return "\n\n".join(_rates(guard, len(facts.guards) > 1) for guard in facts.guards)


def _rates(guard: CardGuard, is_one_of_several: bool) -> str:
    """How often the gate opens on text that is not to be forgotten, and on text that is."""
    said = f"{code(guard.stored.id)}: " if is_one_of_several else ""
    if guard.body.gate == "token":
        return f"{said}There is no gate: every token on which a feature is hot is clamped, in any text."
    found = guard.calibration
    if found is None or guard.threshold is None:
        return f"{said}Not known here: the threshold that it was made from was not at hand."
    lengths = guard.threshold.header.settings.get("lengths")
    at = f" of {lengths[0]} to {lengths[1]} tokens" if lengths else ""
    each = "each retain corpus" if found.guarantee == "each" else "all retain corpora together"
    settings = guard.threshold.header.settings
    promise = f"The threshold was set so that {found.alpha:g} of further texts{at} like those of {each} are gated. "
    if settings.get("threshold") is not None:
        promise = "The threshold was given, not calibrated: nothing promises how much is gated. "
    elif settings.get("quantile") == "percentile":
        promise = f"The threshold is the percentile of retain text that {found.alpha:g} exceeded; it promises nothing. "
    promise = f"{said}{promise}What it gates of fresh documents (from {code(guard.threshold.id)}):"
    rows = [
        [
            code(without_path(one["what"]), in_table=True),
            "to forget" if one["is_forget"] else "to keep",
            f"{one['rate']:.3f} [{one['low']:.3f}, {one['high']:.3f}]",
            str(one["n"]),
        ]
        for one in found.rates
    ]
    if found.false_positive_rate is not None:
        together = f"{found.false_positive_rate:.3f} [{found.low:.3f}, {found.high:.3f}]"
        rows.insert(0, ["all retain text", "to keep", together, str(found.n_fresh)])
    return f"{promise}\n\n{table(['text', '', 'gated', 'n'], rows)}" if rows else f"{promise} nothing was measured."


def _attacks(facts: CardFacts) -> str:
    """The point of each attack at which most came back, and the attacks that were not tried."""
    newest = {id(stored.body): stored for stored in facts.newest_attacks()}
    bodies = [stored.body_as(AttackReport) for stored in newest.values()]
    tried = {body.attack for body in bodies}
    command = f"dsg attack{_sources(facts)} --kind all"
    if not bodies:
        return f"None was tried, as far as is known here. This tries all:\n\n```bash\n{command}\n```"
    rows = [_attack_row(body, newest[id(body)]) for body in ranking(bodies)]
    by = {body.attack: f"- {code(body.attack)}: {escaped(body.threat_model)}" for body in bodies}
    missing = [kind for kind in KINDS if kind not in tried]
    parts = [
        table(["attack", "bench", "split", "before", "worst", "at", "base there", "n", "from"], rows),
        ABOUT_ATTACKS,
        "\n".join(by.values()),
        f"Not tried: {', '.join(map(code, missing))} (`dsg attack`)." if missing else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _attack_row(body: AttackReport, stored: Stored) -> list[str]:
    found = body.summary
    worst: Json = next(
        (p["guarded"] for p in body.curve if (p["x"], p["variant"]) == (found["worst_x"], found["worst_variant"])), {}
    )
    n = worst.get("n", body.before["guarded"].get("n"))
    return [
        code(body.attack, in_table=True),
        code(body.bench, in_table=True),
        code(split_of(stored), in_table=True),
        _share(found["forget_acc_before"]),
        _with_interval(worst, "forget") if found["n_measurable"] else NOT_MEASURABLE,
        code(place(body), in_table=True),
        _share(found["unguarded_at_worst"]),
        "-" if n is None else str(n),
        code(stored.id, in_table=True),
    ]


def _with_interval(side: Json, metric: str) -> str:
    """A value and its 95 % interval."""
    shown = _share if metric in ("acc", "forget") else number
    value = side.get("forget_acc" if metric == "forget" else metric)
    low, high = side.get(f"{metric}_low"), side.get(f"{metric}_high")
    has_interval = value is not None and low is not None and high is not None
    return shown(value) + (f" [{shown(low)}, {shown(high)}]" if has_interval else "")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _sources(facts: CardFacts) -> str:
    """`--from` of what is exported."""
    return "".join(f" --from {guard.stored.id}" for guard in facts.guards)
