"""A report's plain summary: what was unlearned, how well, at what cost, and what it does not protect against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dsg_cli.attacks import ATTACKS
from dsg_cli.lab.data import PHRASINGS
from dsg_cli.methods import finetunes
from dsg_cli.report.comparison import costs_compared, how_well_compared, relearned, what_compared
from dsg_cli.report.evaluations import NOT_MEASURABLE, place, ranking, refusals, shown_benches, shown_metrics
from dsg_cli.report.gather import UNLEARNING, Gathered
from dsg_cli.report.rendering import interval_markup as interval
from dsg_cli.report.rendering import number, share
from dsg_cli.report.studies import costs_varied, how_well_varied, study_headline
from dsg_cli.report.tables import clamp_line
from dsg_cli.workspace.artifacts import Guardrail, ModelWeights, Threshold, Wrapper
from dsg_cli.workspace.results import AttackReport, Comparison, EvalReport, StudyReport
from dsg_cli.workspace.store import Stored


@dataclass(frozen=True)
class Finding:
    """A sentence, and the ids of the artifacts that its numbers are from; none for what holds of any guardrail."""

    text: str
    artifacts: tuple[str, ...] = ()


STANDING = (
    "The knowledge stays in the weights. Whoever holds them, or can fine-tune them without the guardrail, gets it "
    "back: it protects a model behind an interface, not one that is given away."
)

MOST_METRICS = 4
"""Of a bench on free text in a sentence; the table has them all."""


def findings(gathered: Gathered) -> dict[str, list[Finding]]:
    """Heading -> sentences."""
    rows = [(stored.id, stored.body_as(Comparison)) for stored in gathered.of("compare")]
    points = [(stored.id, stored.body_as(StudyReport)) for stored in gathered.of("study")]

    def compared(said: Callable[[Comparison], Iterator[str]]) -> list[Finding]:
        return [Finding(line, (name,)) for name, body in rows for line in said(body)]

    def studied(said: Callable[[StudyReport], Iterator[str]]) -> list[Finding]:
        return [Finding(line, (name,)) for name, body in points for line in said(body)]

    answers = [*_how_well(gathered), *compared(how_well_compared), *studied(how_well_varied)]
    costs = [*_costs(gathered), *compared(costs_compared), *studied(costs_varied)]
    return {
        "What was unlearned": [*_unlearned(gathered)] or [Finding("Nothing yet: dsg apply.")],
        "How well": answers or [Finding("No evaluation is part of this report: dsg eval.")],
        "At what cost": costs or [Finding("Nothing was measured.")],
        "What it does not protect against": [*_open(gathered), *compared(relearned), Finding(STANDING)],
    }


def _unlearned(gathered: Gathered) -> Iterator[Finding]:
    for stored in gathered.artifacts:
        body, model = stored.body, stored.header.model.source
        if isinstance(body, Guardrail | ModelWeights | Wrapper):
            what = ", ".join(body.forget) or "what its features stand for"
            is_taught = isinstance(body, ModelWeights) and finetunes(body.method)
            aim = f"{model} was taught" if is_taught else f"{model} is to stop answering about {what}"
            yield Finding(f"{aim}: {_how(stored)}.", (stored.id,))
            if isinstance(body, Guardrail) and not body.effect:
                yield Finding("It was never tried on text that it should catch.", (stored.id,))
    ids = {stored.id for stored in gathered.artifacts}
    for stored in gathered.of("compare"):
        comparison = stored.body_as(Comparison)
        yield Finding(what_compared(comparison, stored.header.model.source), (stored.id,))
        detailed = [row["method"] for row in comparison.rows if ids & set(row["artifacts"])]
        if detailed:
            yield Finding(f"Of these, {', '.join(dict.fromkeys(detailed))} is shown in detail.", (stored.id,))
    for stored in gathered.of("study"):
        study = stored.body_as(StudyReport)
        settings = ", ".join(study.grid)
        yield Finding(f"Study {study_headline(study)}; varied: {settings}.", (stored.id,))


def _how(stored: Stored) -> str:
    body = stored.body
    if isinstance(body, Guardrail):
        where = f"(SAE {stored.header.sae.source if stored.header.sae else 'unknown'}, {body.hook})"
        gate = (
            "wherever one of them fires"
            if body.gate == "token"
            else f"once the {body.gate} gate exceeds {body.threshold:.4g}"
        )
        return f"{body.method} clamps {clamp_line(body).removeprefix(f'{body.method}: ')} {where}, {gate}"
    if isinstance(body, ModelWeights):
        n = f"{body.trained['n_changed']:,} of {body.trained['n_parameters']:,} free parameters"
        return f"{body.method} changed {n} ({'an adapter' if body.form == 'adapter' else 'the whole model'})"
    assert isinstance(body, Wrapper)
    return f"{body.method}, by {body.rule} on the {body.side}"


def _how_well(gathered: Gathered) -> Iterator[Finding]:
    forgotten = {
        stored.json["sha256"]: stored.body.forget
        for stored in gathered.artifacts
        if isinstance(stored.body, Guardrail | ModelWeights | Wrapper)
    }
    for stored in gathered.of("eval"):
        body = stored.body_as(EvalReport)
        forget = {name for used in stored.header.inputs for name in forgotten.get(used.sha256, [])}
        shown = shown_benches(body, stored.header.settings.get("benches", []))
        asked = [bench for bench in shown if "acc" in body.results[bench]["unlearned"]]
        gone = [bench for bench in asked if _domain(bench) in forget]
        yield from (Finding(_forgotten(gathered, stored, bench), (stored.id,)) for bench in gone)
        kept = [_change(body, bench) for bench in asked if bench not in gone]
        if kept:
            yield Finding(f"{'To keep' if forget else 'Asked'}: {'; '.join(kept)}.", (stored.id,))
        yield from (Finding(f"{_of_text(body, bench)}.", (stored.id,)) for bench in shown if bench not in asked)
        yield from (Finding(f"{line}.", (stored.id,)) for line in refusals(body.refused))
        missed = [one["expect"] for one in body.expected if not one["met"]]
        if missed:
            yield Finding(f"Expected, and not met: {', '.join(missed)}.", (stored.id,))


def _domain(bench: str) -> str:
    """What a bench asks about, without how it asks."""
    for way in ("paper", *PHRASINGS):
        bench = bench.removesuffix(f"-{way}")
    return bench


def _forgotten(gathered: Gathered, stored: Stored, bench: str) -> str:
    """Against chance, where that is known: guessing is as far down as forgetting goes."""
    body = stored.body_as(EvalReport)
    after, chance = body.results[bench]["unlearned"], gathered.chance(stored, bench)
    said = f"To forget: {_change(body, bench)}, {body.results[bench]['base']['n']:,} {body.split} questions"
    if chance is None:
        return f"{said}."
    if "acc_low" not in after or "acc_high" not in after:
        return f"{said}; guessing gives {chance:.2f}."
    verdict = (
        "more than guessing" if after["acc_low"] > chance
        else "less than guessing" if after["acc_high"] < chance
        else "not to be told from guessing"
    )  # fmt: skip
    return f"{said}: {verdict}, which gives {chance:.2f}."


def _change(body: EvalReport, bench: str) -> str:
    base, after = (body.results[bench][side] for side in ("base", "unlearned"))
    bounds = interval(after, "acc")
    return f"{bench} {share(base.get('acc'))} before, {share(after.get('acc'))} after" + (
        f" (95 %: {bounds})" if bounds != "-" else ""
    )


def _of_text(body: EvalReport, bench: str) -> str:
    sides = body.results[bench]
    metrics = shown_metrics(sides)
    said = [
        f"{metric} {number(sides['base'].get(metric))} before, {number(sides['unlearned'].get(metric))} after"
        for metric in metrics[:MOST_METRICS]
    ]
    more = len(metrics) - MOST_METRICS
    return f"{bench}: {'; '.join(said)}" + (f"; {more} further numbers in the table" if more > 0 else "")


def _costs(gathered: Gathered) -> Iterator[Finding]:
    for stored in gathered.of("threshold"):
        body = stored.body_as(Threshold)
        if body.false_positive_rate is not None:
            said = f"{body.false_positive_rate:.1%} of {body.n_fresh:,} fresh pieces of retain text are gated"
            bounds = f"95 %: {body.low:.1%} to {body.high:.1%}"
            yield Finding(f"{said} ({bounds}); {_promise(stored, body)}.", (stored.id,))
    for stored in gathered.of("eval"):
        rates = [f"{bench} {one['rate']:.2f}" for bench, one in stored.body_as(EvalReport).gate.items()]
        if rates:
            yield Finding(f"Share of questions gated: {', '.join(rates)}.", (stored.id,))
    for stored in (*gathered.of("guardrail"), *gathered.of("wrapper")):
        yield Finding(f"{_bytes(stored) / 1000:,.0f} kB beside the model.", (stored.id,))
    used = {one.id for kind in ("threshold", *UNLEARNING) for made in gathered.of(kind) for one in made.header.inputs}
    candidates = [one for kind in ("features", "threshold", *UNLEARNING) for one in gathered.of(kind)]
    made = [one for one in candidates if one.header.kind in UNLEARNING or one.id in used]
    if made:
        seconds = ", ".join(f"{stored.header.seconds:,.1f} s for {stored.id}" for stored in made)
        yield Finding(
            f"Making it took {seconds}, on {', '.join(dict.fromkeys(one.header.device for one in made))}.",
            tuple(one.id for one in made),
        )


def _promise(stored: Stored, body: Threshold) -> str:
    settings = stored.header.settings
    if settings.get("threshold") is not None:
        return "its threshold was given, and promises nothing"
    how = ", as a percentile that promises nothing" if settings.get("quantile") == "percentile" else ""
    return f"it was set for {body.alpha:.1%}{how}"


def _bytes(stored: Stored) -> int:
    paths = (stored.path, stored.path.with_suffix(".safetensors"))
    return sum(path.stat().st_size for path in paths if path.is_file())


def _open(gathered: Gathered) -> Iterator[Finding]:
    """Attacks that got past it one by one, the one that brought back most first; then all others."""
    attacks = {id(stored.body): stored for stored in gathered.of("attack")}
    bodies = ranking([stored.body_as(AttackReport) for stored in attacks.values()])
    held: list[tuple[str, str]] = []
    for body in bodies:
        name, found = attacks[id(body)].id, body.summary
        if found["n_measurable"] and found["forget_acc_worst"] > found["evades_above"]:
            before, after = share(found["forget_acc_before"]), share(found["forget_acc_worst"])
            said = f"accuracy on {body.bench} {before} before, {after} after ({place(body)})"
            unguarded = f"{share(found['unguarded_at_worst'])} without the guard"
            yield Finding(f"{body.attack} gets past it: {said}; {unguarded}. {body.threat_model}", (name,))
        elif found["n_measurable"]:
            held.append((f"{body.attack} {share(found['forget_acc_worst'])}", name))
    if held:
        yield Finding(f"These brought back at most: {', '.join(line for line, _ in held)}.", tuple(n for _, n in held))
    unknown = [body for body in bodies if not body.summary["n_measurable"]]
    if unknown:
        names = tuple(attacks[id(body)].id for body in unknown)
        yield Finding(f"{NOT_MEASURABLE.capitalize()}: {', '.join(body.attack for body in unknown)}.", names)
    if bodies:
        n = sum(body.summary["n_points"] for body in bodies)
        untried = [kind for kind in ATTACKS if kind not in {body.attack for body in bodies}]
        is_one = len({repr(body.composition) for body in bodies}) == 1
        rest = f" Not tried: {', '.join(untried)}." if untried and is_one else ""
        yield Finding(
            f"Accuracies are the worst of {n} points tried. That one fails is no proof that none succeeds.{rest}"
        )
    elif not gathered.of("compare"):
        yield Finding("No attack is part of this report: dsg attack --kind all.")
