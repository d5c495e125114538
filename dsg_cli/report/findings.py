"""A report's plain summary: what was unlearned, how well, at what cost, and what it does not protect against."""

from __future__ import annotations

from dsg_cli.artifacts import (
    AttackReport,
    Comparison,
    EvalReport,
    Guardrail,
    Json,
    ModelWeights,
    StudyReport,
    Threshold,
    Wrapper,
)
from dsg_cli.report.attacks import NOT_MEASURABLE, place, ranking, share
from dsg_cli.report.comparison import quality_rows
from dsg_cli.report.evaluations import shown_benches
from dsg_cli.report.guardrails import clamp_line
from dsg_cli.report.metrics import interval, number, refusals, shown_metrics
from dsg_cli.stages.gathering import Gathered
from dsg_cli.workspace import Stored

Finding = tuple[str, str]
"""A sentence, and the id of the artifact that its numbers are from; empty for what holds of any guardrail."""
STANDING = (
    "The knowledge stays in the weights. Whoever holds them, or can fine-tune them without the guardrail, gets it "
    "back: it protects a model behind an interface, not one that is given away."
)
NEAR_CHANCE, UNHARMED = 0.05, 0.02
"""Of accuracies: what counts as forgotten, and as kept."""


def findings(gathered: Gathered) -> dict[str, list[Finding]]:
    """Heading -> sentences."""
    return {
        "What was unlearned": _unlearned(gathered),
        "How well": _how_well(gathered),
        "At what cost": _costs(gathered),
        "What it does not protect against": _open(gathered),
    }


def _unlearned(gathered: Gathered) -> list[Finding]:
    found = []
    for stored in gathered.artifacts:
        body, header = stored.body, stored.header
        if not isinstance(body, Guardrail | ModelWeights | Wrapper):
            continue
        what = ", ".join(body.forget) or "what nobody named"
        where = f"{header.model.source}"
        if isinstance(body, Guardrail):
            gate = (
                "without a gate"
                if body.gate == "token"
                else f"where the gate `{body.gate}` exceeds {body.threshold:.4g}"
            )
            sae = f", SAE {header.sae.source}" if header.sae else ""
            how = f"{clamp_line(body)} at {body.hook}, {gate}{sae}"
        elif isinstance(body, ModelWeights):
            how = f"{body.method} changed its weights ({body.form})"
        else:
            how = f"{body.method}, {body.rule} on the {body.side}"
        found.append((f"{what} in {where}: {how}.", stored.id))
    for stored in gathered.of("compare"):
        comparison = stored.body_as(Comparison)
        n = len({row["method"] for row in comparison.rows})
        found.append((f"{comparison.benches['forget']} in {stored.header.model.source}, by {n} methods.", stored.id))
    for stored in gathered.of("study"):
        study = stored.body_as(StudyReport)
        named = ", ".join(study.benches["forget"]) or "a guardrail"
        found.append((f"{named} in {stored.header.model.source}, varied: study {study.study}.", stored.id))
    return found or [("Nothing yet: dsg apply.", "")]


def _how_well(gathered: Gathered) -> list[Finding]:
    forget = {
        name
        for stored in gathered.artifacts
        if isinstance(stored.body, Guardrail | ModelWeights | Wrapper)
        for name in stored.body.forget
    }
    found = []
    for stored in gathered.of("eval"):
        body = stored.body_as(EvalReport)
        for bench in shown_benches(body, stored.header.settings.get("benches", [])):
            role = "to forget" if bench in forget else "to keep"
            found.append((f"{bench} ({role}): {_change(body.results[bench], body.split)}.", stored.id))
        found += [(f"{line}.", stored.id) for line in refusals(body.refused)]
        missed = [one["expect"] for one in body.expected if not one["met"]]
        found += [(f"Not met: {', '.join(missed)}.", stored.id)] if missed else []
    for stored in gathered.of("compare"):
        found += [(line, stored.id) for line in _ranked(stored.body_as(Comparison))]
    return found or [("Nobody has asked yet: dsg eval.", "")]


def _change(sides: Json, split: str) -> str:
    metric = shown_metrics(sides)[0]
    base, after = sides["base"].get(metric), sides["unlearned"].get(metric)
    bounds = interval(sides["unlearned"], metric)
    shown = f" (95 %: {bounds})" if bounds != "-" else ""
    name = "accuracy" if metric == "acc" else metric
    return f"{name} {number(base)} before, {number(after)} after{shown}, {sides['base']['n']} {split} questions"


def _ranked(body: Comparison) -> list[str]:
    """Which methods forget and keep the rest, by what the table says of them on test questions."""
    good: list[str] = []
    weak: list[str] = []
    for row in quality_rows(body):
        if row[0].startswith("(") or row[1] == "-":
            continue
        kept = [float(one) for one in (row[3], row[4]) if one != "-"]
        is_forgotten = float(row[1]) <= body.chance + NEAR_CHANCE
        is_kept = all(one >= 1 - UNHARMED for one in kept) if kept else False
        (good if is_forgotten and is_kept else weak).append(f"{row[0]} ({row[1]}; {' / '.join(row[3:5])})")
    what = (
        f"forget accuracy within {NEAR_CHANCE} of chance, {body.chance:.2f}; near and other at least {1 - UNHARMED:.2f}"
    )
    lines = [f"{', '.join(good) or 'No method'}: {what}."]
    return lines + ([f"The others, as forget; near / other: {', '.join(weak)}."] if weak else [])


def _costs(gathered: Gathered) -> list[Finding]:
    found = []
    for stored in gathered.of("threshold"):
        body = stored.body_as(Threshold)
        if body.false_positive_rate is not None:
            said = f"{body.false_positive_rate:.1%} of {body.n_fresh} fresh pieces of retain text are gated"
            found.append((f"{said} (95 %: {body.low:.3f} to {body.high:.3f}).", stored.id))
    for stored in gathered.of("eval"):
        body_of = stored.body_as(EvalReport)
        rates = [f"{bench} {one['rate']:.2f}" for bench, one in body_of.gate.items()]
        if rates:
            found.append((f"Questions gated: {', '.join(rates)}.", stored.id))
    for stored in (*gathered.of("guardrail"), *gathered.of("wrapper")):
        found.append((f"{_bytes(stored) / 1000:,.0f} kB beside the model.", stored.id))
    made = [one for kind in ("features", "threshold", "guardrail", "model", "wrapper") for one in gathered.of(kind)]
    if made:
        seconds = ", ".join(f"{stored.id} {stored.header.seconds:.0f} s" for stored in made)
        found.append((f"Made in: {seconds}; on {made[-1].header.device}.", ""))
    return found or [("See the tables.", "")]


def _bytes(stored: Stored) -> int:
    paths = (stored.path, stored.path.with_suffix(".safetensors"))
    return sum(path.stat().st_size for path in paths if path.is_file())


def _open(gathered: Gathered) -> list[Finding]:
    attacks = {stored.body_as(AttackReport).attack: stored for stored in gathered.of("attack")}
    found = []
    for body in ranking([stored.body_as(AttackReport) for stored in attacks.values()]):
        summary = body.summary
        said = NOT_MEASURABLE
        if summary["n_measurable"]:
            before, worst = share(summary["forget_acc_before"]), share(summary["forget_acc_worst"])
            said = f"from {before} to at most {worst} ({place(body)}); unguarded {share(summary['unguarded_at_worst'])}"
        found.append((f"{body.attack}: {said}. {body.threat_model}", attacks[body.attack].id))
    if not attacks:
        found.append(("No attack was tried on it by itself: dsg attack --kind all.", ""))
    return [*found, (STANDING, "")]
