"""A report's plain summary: what was unlearned, how well, at what cost, and what it does not protect against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dsg_cli.attacks import ATTACKS
from dsg_cli.lab.data import PHRASINGS
from dsg_cli.methods import finetunes
from dsg_cli.report.comparison import costs_compared, quality_compared, relearning_compared, subject_compared
from dsg_cli.report.evaluations import NOT_MEASURABLE, benches_of, place, ranking, refusals, shown_metrics
from dsg_cli.report.gather import UNLEARNING, Gathered
from dsg_cli.report.rendering import interval, number, share
from dsg_cli.report.studies import accuracies_studied, costs_studied, study_headline
from dsg_cli.report.tables import clamp_line
from dsg_cli.workspace.artifacts import Guardrail, ModelWeights, Threshold, Wrapper
from dsg_cli.workspace.results import AttackReport, Comparison, EvalReport, StudyReport
from dsg_cli.workspace.store import Stored


@dataclass(frozen=True)
class Sentence:
    """A sentence, and the ids of the artifacts that its numbers are from; none for what holds of any guardrail."""

    text: str
    artifacts: tuple[str, ...] = ()


STANDING = (
    "The knowledge stays in the weights. Whoever holds them, or can fine-tune them without the guardrail, gets it "
    "back: it protects a model behind an interface, not one that is given away."
)

MOST_METRICS = 4  # Of a bench on free text in a sentence; the table has them all.


def findings(gathered: Gathered) -> dict[str, list[Sentence]]:
    """Heading -> sentences."""
    comparisons = [(stored.id, stored.body_as(Comparison)) for stored in gathered.of("compare")]
    studies = [(stored.id, stored.body_as(StudyReport)) for stored in gathered.of("study")]

    def compared(sentences: Callable[[Comparison], Iterator[str]]) -> list[Sentence]:
        return [Sentence(sentence, (name,)) for name, body in comparisons for sentence in sentences(body)]

    def studied(sentences: Callable[[StudyReport], Iterator[str]]) -> list[Sentence]:
        return [Sentence(sentence, (name,)) for name, body in studies for sentence in sentences(body)]

    quality = [*_quality(gathered), *compared(quality_compared), *studied(accuracies_studied)]
    costs = [*_costs(gathered), *compared(costs_compared), *studied(costs_studied)]
    return {
        "What was unlearned": [*_unlearned(gathered)] or [Sentence("Nothing yet: dsg apply.")],
        "How well": quality or [Sentence("No evaluation is part of this report: dsg eval.")],
        "At what cost": costs or [Sentence("Nothing was measured.")],
        "What it does not protect against": [*_attacks(gathered), *compared(relearning_compared), Sentence(STANDING)],
    }


def _unlearned(gathered: Gathered) -> Iterator[Sentence]:
    for stored in gathered.artifacts:
        body, model = stored.body, stored.header.model.source
        if isinstance(body, Guardrail | ModelWeights | Wrapper):
            topics = ", ".join(body.forget) or "what its features stand for"
            is_taught = isinstance(body, ModelWeights) and finetunes(body.method)
            aim = f"{model} was taught" if is_taught else f"{model} is to stop answering about {topics}"
            yield Sentence(f"{aim}: {_means(stored)}.", (stored.id,))
            if isinstance(body, Guardrail) and not body.effect:
                yield Sentence("It was never tried on text that it should catch.", (stored.id,))
    ids = {stored.id for stored in gathered.artifacts}
    for stored in gathered.of("compare"):
        comparison = stored.body_as(Comparison)
        yield Sentence(subject_compared(comparison, stored.header.model.source), (stored.id,))
        detailed = dict.fromkeys(row["method"] for row in comparison.rows if ids & set(row["artifacts"]))
        if detailed:
            yield Sentence(f"Of these, {', '.join(detailed)} is shown in detail.", (stored.id,))
    for stored in gathered.of("study"):
        study = stored.body_as(StudyReport)
        yield Sentence(f"Study {study_headline(study)}; varied: {', '.join(study.grid)}.", (stored.id,))


def _means(stored: Stored) -> str:
    body = stored.body
    if isinstance(body, Guardrail):
        sae = stored.header.sae.source if stored.header.sae else "unknown"
        gate = f"once the {body.gate} gate exceeds {body.threshold:.4g}"
        gate = "wherever one of them fires" if body.gate == "token" else gate
        return (
            f"{body.method} clamps {clamp_line(body).removeprefix(f'{body.method}: ')} (SAE {sae}, {body.hook}), {gate}"
        )
    if isinstance(body, ModelWeights):
        n = f"{body.trained['n_changed']:,} of {body.trained['n_parameters']:,} free parameters"
        return f"{body.method} changed {n} ({'an adapter' if body.form == 'adapter' else 'the whole model'})"
    assert isinstance(body, Wrapper)
    return f"{body.method}, by {body.rule} on the {body.side}"


def _quality(gathered: Gathered) -> Iterator[Sentence]:
    corpora_by_digest = {
        stored.json["sha256"]: stored.body.forget
        for stored in gathered.artifacts
        if isinstance(stored.body, Guardrail | ModelWeights | Wrapper)
    }
    for stored in gathered.of("eval"):
        body = stored.body_as(EvalReport)
        forget = {name for used in stored.header.inputs for name in corpora_by_digest.get(used.sha256, [])}
        benches = benches_of(stored)
        with_accuracy = [bench for bench in benches if "acc" in body.results[bench]["unlearned"]]
        forgotten = [bench for bench in with_accuracy if _domain(bench) in forget]
        sentences = [_forgotten(gathered, stored, bench) for bench in forgotten]
        if kept := [_change(body, bench) for bench in with_accuracy if bench not in forgotten]:
            sentences.append(f"{'To keep' if forget else 'Asked'}: {'; '.join(kept)}.")
        sentences += [f"{_text_metrics(body, bench)}." for bench in benches if bench not in with_accuracy]
        sentences += [f"{line}." for line in refusals(body.refused)]
        if missed := [outcome["expect"] for outcome in body.expected if not outcome["met"]]:
            sentences.append(f"Expected, and not met: {', '.join(missed)}.")
        yield from (Sentence(sentence, (stored.id,)) for sentence in sentences)


def _domain(bench: str) -> str:
    """What a bench asks about, without how it asks."""
    for way in ("paper", *PHRASINGS):
        bench = bench.removesuffix(f"-{way}")
    return bench


def _forgotten(gathered: Gathered, stored: Stored, bench: str) -> str:
    """Against chance, where that is known: guessing is as far down as forgetting goes."""
    body = stored.body_as(EvalReport)
    unlearned, chance = body.results[bench]["unlearned"], gathered.chance(stored, bench)
    change = f"To forget: {_change(body, bench)}, {body.results[bench]['base']['n']:,} {body.split} questions"
    if chance is None:
        return f"{change}."
    if "acc_low" not in unlearned or "acc_high" not in unlearned:
        return f"{change}; guessing gives {chance:.2f}."
    is_more, is_less = unlearned["acc_low"] > chance, unlearned["acc_high"] < chance
    verdict = "more than guessing" if is_more else "less than guessing" if is_less else "not to be told from guessing"
    return f"{change}: {verdict}, which gives {chance:.2f}."


def _change(body: EvalReport, bench: str) -> str:
    base, unlearned = (body.results[bench][side] for side in ("base", "unlearned"))
    bounds = interval(unlearned, "acc")
    known = f" (95 %: {bounds})" if bounds != "-" else ""
    return f"{bench} {share(base.get('acc'))} before, {share(unlearned.get('acc'))} after{known}"


def _text_metrics(body: EvalReport, bench: str) -> str:
    sides = body.results[bench]
    metrics = shown_metrics(sides)
    changes = [
        f"{metric} {number(sides['base'].get(metric))} before, {number(sides['unlearned'].get(metric))} after"
        for metric in metrics[:MOST_METRICS]
    ]
    more = len(metrics) - MOST_METRICS
    return f"{bench}: {'; '.join(changes)}" + (f"; {more} further numbers in the table" if more > 0 else "")


def _costs(gathered: Gathered) -> Iterator[Sentence]:
    for stored in gathered.of("threshold"):
        body = stored.body_as(Threshold)
        if body.false_positive_rate is not None:
            rate = f"{body.false_positive_rate:.1%} of {body.n_fresh:,} fresh pieces of retain text are gated"
            bounds = f"95 %: {body.low:.1%} to {body.high:.1%}"
            yield Sentence(f"{rate} ({bounds}); {_promise(stored, body)}.", (stored.id,))
    for stored in gathered.of("eval"):
        rates = [f"{bench} {gate['rate']:.2f}" for bench, gate in stored.body_as(EvalReport).gate.items()]
        if rates:
            yield Sentence(f"Share of questions gated: {', '.join(rates)}.", (stored.id,))
    for stored in (*gathered.of("guardrail"), *gathered.of("wrapper")):
        paths = [path for path in (stored.path, stored.path.with_suffix(".safetensors")) if path.is_file()]
        yield Sentence(f"{sum(path.stat().st_size for path in paths) / 1000:,.0f} kB beside the model.", (stored.id,))
    makers = [stored for kind in ("threshold", *UNLEARNING) for stored in gathered.of(kind)]
    used = {item.id for stored in makers for item in stored.header.inputs}
    steps = [
        stored
        for stored in (*gathered.of("features"), *makers)
        if stored.header.kind in UNLEARNING or stored.id in used
    ]
    if steps:
        seconds = ", ".join(f"{stored.header.seconds:,.1f} s for {stored.id}" for stored in steps)
        devices = ", ".join(dict.fromkeys(stored.header.device for stored in steps))
        yield Sentence(f"Making it took {seconds}, on {devices}.", tuple(stored.id for stored in steps))


def _promise(stored: Stored, body: Threshold) -> str:
    settings = stored.header.settings
    if settings.get("threshold") is not None:
        return "its threshold was given, and promises nothing"
    how = ", as a percentile that promises nothing" if settings.get("quantile") == "percentile" else ""
    return f"it was set for {body.alpha:.1%}{how}"


def _attacks(gathered: Gathered) -> Iterator[Sentence]:
    """Attacks that got past it one by one, the one that brought back most first; then all others."""
    ids = {id(stored.body): stored.id for stored in gathered.of("attack")}
    bodies = ranking([stored.body_as(AttackReport) for stored in gathered.of("attack")])
    resisted, unknown = [], []
    for body in bodies:
        summary = body.summary
        if not summary["n_measurable"]:
            unknown.append(body)
        elif summary["forget_acc_worst"] <= summary["evades_above"]:
            resisted.append(body)
        else:
            before, after = share(summary["forget_acc_before"]), share(summary["forget_acc_worst"])
            accuracy = f"accuracy on {body.bench} {before} before, {after} after ({place(body)})"
            unguarded = f"{share(summary['unguarded_at_worst'])} without the guard"
            sentence = f"{body.attack} gets past it: {accuracy}; {unguarded}. {body.threat_model}"
            yield Sentence(sentence, (ids[id(body)],))
    if resisted:
        worst = ", ".join(f"{body.attack} {share(body.summary['forget_acc_worst'])}" for body in resisted)
        yield Sentence(f"These brought back at most: {worst}.", tuple(ids[id(body)] for body in resisted))
    if unknown:
        names = ", ".join(body.attack for body in unknown)
        yield Sentence(f"{NOT_MEASURABLE.capitalize()}: {names}.", tuple(ids[id(body)] for body in unknown))
    if bodies:
        n = sum(body.summary["n_points"] for body in bodies)
        untried = [kind for kind in ATTACKS if kind not in {body.attack for body in bodies}]
        is_one_composition = len({repr(body.composition) for body in bodies}) == 1
        rest = f" Not tried: {', '.join(untried)}." if untried and is_one_composition else ""
        yield Sentence(
            f"Accuracies are the worst of {n} points tried. That one fails is no proof that none succeeds.{rest}"
        )
    elif not gathered.of("compare"):
        yield Sentence("No attack is part of this report: dsg attack --kind all.")
