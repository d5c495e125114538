"""Artifacts as terminal tables of at most 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from dsg_cli.data.catalogue import CATALOGUE
from dsg_cli.errors import DsgError
from dsg_cli.guardrail.runtime.spec import NEVER
from dsg_cli.lab import data as lab
from dsg_cli.methods import finetunes
from dsg_cli.report.comparison import comparison_table
from dsg_cli.report.evaluations import attack_headline, curve_table, evaluation_table, first_metric
from dsg_cli.report.inspections import inspection_view
from dsg_cli.report.rendering import captioned, visible
from dsg_cli.report.studies import study_headline, study_table
from dsg_cli.workspace.artifacts import FeatureSet, Guardrail, Header, ModelWeights, Threshold, Wrapper
from dsg_cli.workspace.results import AttackReport, Comparison, EvalReport, Inspection, Json, StudyReport
from dsg_cli.workspace.store import Stored, Workspace

if TYPE_CHECKING:
    from dsg_cli.inspection.descriptions import Candidates
    from dsg_cli.workspace.store import Finding


def clamp_line(body: Guardrail) -> str:
    """What it is about, in one line."""
    n = len(body.indices)
    what = f"{n} features" if n != 1 else f"feature {body.indices[0]}"
    where = f" where one of {len(body.detectors)} others fires" if body.gate == "token" and body.detectors else ""
    return f"{'' if body.method == 'dsg' else body.method + ': '}{what} to {_targets(body)}{where}"


def guardrail_rows(body: Guardrail) -> list[tuple[str, str]]:
    """All that there is to say, as names and values."""
    watched = [("watches", " ".join(map(str, body.detectors)))] if body.detectors and body.gate == "token" else []
    return [
        *([("method", body.method)] if body.method != "dsg" else []),
        ("features", " ".join(map(str, body.indices))),
        *watched,
        ("gate", "none: every hot token is clamped" if body.gate == "token" else f"{body.gate} > {body.threshold:.4f}"),
        (
            "clamp",
            f"to {_targets(body, '.4g')} ({body.strength_setting}; "
            f"median residual norm {body.median_residual_norm:.4g})",
        ),
        *([("hot above", _above(body))] if body.above else []),
        *([("sets", "each feature where it is itself above that")] if body.clamp == "each" else []),
        ("at", body.hook),
        ("tried on", _effect(body.effect)),
    ]


def _targets(body: Guardrail, digits: str = ".3g") -> str:
    """What features are set to: one number, or those of all."""
    if not body.coefficients:
        return f"-{body.strength:{digits}}"
    different = list(dict.fromkeys(body.coefficients))
    shown = [f"{one:{digits}}" for one in (different if len(different) == 1 else body.coefficients)]
    return " ".join(shown) if digits == ".4g" or len(shown) <= 2 else f"{shown[0]} ... {shown[-1]}"


def _above(body: Guardrail) -> str:
    """The activations above which features make a token hot, without those that never do."""
    said = [one for one in body.above if one < NEVER]
    different = list(dict.fromkeys(said))
    return " ".join(f"{one:.4g}" for one in (different if len(different) == 1 else said)) or "nothing"


def _effect(effect: Json) -> str:
    if not effect:
        return "nothing"
    return (
        f"{effect['n_rows']} forget rows: gated {effect['gate_rate']:.2f}, changed {effect['changed_rate']:.2f}, "
        f"largest edit {effect['edit']:.2g} residual norms"
    )


SHOWN_KEYWORDS = 12


def model_rows(body: ModelWeights) -> list[tuple[str, str]]:
    """Of changed weights: what was trained, how the loss went, what it cost."""
    cost = body.cost
    rows = [
        ("method", body.method + (", which taught it; nothing is unlearned" if finetunes(body.method) else "")),
        *([("trained on", ", ".join(body.trained["corpora"]))] if "corpora" in body.trained else []),
        ("weights", "an adapter of the base model" if body.form == "adapter" else "a whole model"),
        ("free to change", f"{body.trained['n_parameters']:,} parameters in {len(body.trained['modules'])} modules"),
        ("changed", f"{body.trained['n_changed']:,}"),
    ]
    if body.losses:
        first, last = body.losses[0], body.losses[-1]
        rows += [(f"loss, step {one['step']}", _terms(one)) for one in (first, last)]
    if body.diverged_at is not None:
        rows.append(("diverged", f"at step {body.diverged_at}; the weights are those of the step above"))
    passes = f"{cost['forward_passes']:,} forward, {cost['backward_passes']:,} backward"
    tokens = f"{cost['forward_tokens']:,} and {cost['backward_tokens']:,} tokens"
    rows.append(("passes", f"{passes}; {tokens}"))
    if body.features:
        rows.append(("guided by", " ".join(map(str, body.features))))
    return rows


def wrapper_rows(body: Wrapper) -> list[tuple[str, str]]:
    """Of a wrapper: its rule, and what it refuses."""
    rows = [("method", body.method), ("acts on", f"the {body.side}, by {body.rule}")]
    if body.rule == "prefix":
        return [*rows, ("text", body.text)]
    if body.keywords:
        more = len(body.keywords) - SHOWN_KEYWORDS
        rows.append(("keywords", ", ".join(body.keywords[:SHOWN_KEYWORDS]) + (f" and {more} more" if more > 0 else "")))
    if body.layer is not None:
        rows.append(("reads", f"the residual stream after layer {body.layer}"))
    rows += [("refuses above", f"{body.threshold:.4f}"), ("with", body.refusal)]
    return [*rows, *(rate_row(one) for one in body.rates)]


def rate_row(rate: Json) -> tuple[str, str]:
    """One rate of a kind of text, with its interval."""
    what = f"{'caught' if rate['is_forget'] else 'gated'}: {rate['what']}"
    return what, f"{rate['rate']:.3f} of {rate['n']} (95 %: {rate['low']:.3f} to {rate['high']:.3f})"


def _terms(losses: Json) -> str:
    rest = ", ".join(f"{name} {value:.3g}" for name, value in losses.items() if name not in ("step", "loss"))
    return f"{losses['loss']:.3g}" + (f" ({rest})" if rest else "")


SHOWN = 40
"""Candidates in a table, at most."""


def candidates_table(candidates: Candidates) -> Table:
    """What a query found, the best first, before any text is read."""
    table = Table("rank", "feature", "score", "description", box=None, pad_edge=False)
    for rank, match in enumerate(candidates.ranking[:SHOWN], start=1):
        table.add_row(str(rank), str(match.index), f"{match.score:.3f}", Text(visible(candidates.texts[match.index])))
    n = len(candidates.ranking)
    more = f", of which {SHOWN} are shown" if n > SHOWN else ""
    table.caption = Text(f"{n} match {candidates.described['query']!r}{more}.")
    return table


def picked_table(body: FeatureSet) -> Table:
    """What was taken, with what was measured."""
    found = {row["index"]: row for row in body.described.get("ranking", [])}
    measured = ["forget"] if body.forget_tokens else []
    said = ["description"] if any("description" in row for row in found.values()) else []
    scored = ["score"] if found else []
    table = Table("rank", "feature", *scored, *measured, "retain", *said, box=None, pad_edge=False)
    for rank, feature in enumerate(body.features, start=1):
        row = found.get(feature.index, {"score": 0.0})
        values = [row["score"]] * len(scored) + [feature.forget_score or 0.0] * len(measured) + [feature.retain_score]
        cells = [f"{value:.4g}" for value in values]
        table.add_row(str(rank), str(feature.index), *cells, *(Text(visible(row.get("description", ""))) for _ in said))
    table.caption = Text(visible(_caption(body)))
    return table


def _caption(body: FeatureSet) -> str:
    unread = "" if body.forget_tokens else "; no forget text was read"
    if not body.described:
        return f"Named by hand{unread}."
    described = body.described
    n = described.get("n_matched", len(described["ranking"]))
    return (
        f"{n} match {described['query']!r} ({described['ranker']}, {described['source']}), "
        f"{body.n_passed} are rare enough on retain text{unread}."
    )


def artifact_table(stored: Stored, view: Any = None) -> Group:
    """One artifact: what it found (`view`, where there is more to show than it holds), and where it came from."""
    body = stored.body
    if view is not None:
        table: Any = view
    elif isinstance(body, FeatureSet):
        table = _features(body)
    elif isinstance(body, Threshold):
        table = _pairs(_threshold(body, stored.header.settings["lengths"]))
    elif isinstance(body, Guardrail):
        table = _pairs(guardrail_rows(body))
    elif isinstance(body, EvalReport):
        table = evaluation_table(body, stored.header.settings.get("benches", []))
    elif isinstance(body, Comparison):
        table = comparison_table(body)
    elif isinstance(body, StudyReport):
        table = study_table(body)
    elif isinstance(body, Inspection):
        table = inspection_view(stored)
    elif isinstance(body, ModelWeights):
        table = _pairs(model_rows(body))
    elif isinstance(body, Wrapper):
        table = _pairs(wrapper_rows(body))
    else:
        table = curve_table(stored.body_as(AttackReport))
    if isinstance(table, Table):
        table = captioned(table)
    notes = [Text(visible(f"note: {note}")) for note in stored.header.notes]
    return Group(Text(stored.id, style="bold"), table, *notes, Text(provenance_line(stored), style="dim"))


def provenance_line(stored: Stored) -> str:
    """Model, SAE, inputs, time and cost in one sentence."""
    header = stored.header
    made_from = ", ".join(item.id for item in header.inputs) or "corpora"
    sae = f", SAE {header.sae.source} at {header.sae.hook}" if header.sae else ""
    return (
        f"model {header.model.source}{sae}; from {made_from}; {header.created}; {header.device}, {header.dtype}; "
        f"{header.seconds:.1f} s, {header.n_tokens:,} tokens"
    )


def list_table(workspace: Workspace) -> Table:
    """What a workspace holds; what cannot be read is said, not hidden."""
    table = Table("artifact", "what it found", "made from", box=None, pad_edge=False)
    for artifact_id in workspace.ids():
        try:
            stored = workspace.read(artifact_id)
        except DsgError as error:
            table.add_row(Text(artifact_id, style="bold"), Text(error.message, style="red"), "")
            continue
        made_from = ", ".join(item.id for item in stored.header.inputs) or "corpora"
        table.add_row(Text(stored.id, style="bold"), headline(stored), made_from)
    return table


def verify_table(findings: Sequence[Finding]) -> Group:
    """What was verified, and in one line whether all is well."""
    table = Table("", "state", "", box=None, pad_edge=False, show_header=False)
    styles = {"ok": "green", "broken": "red", "unfinished": "yellow"}
    for finding in findings:
        state = Text(finding.state, style=styles[finding.state])
        table.add_row(Text(finding.name, style="bold"), state, finding.remark)
    counts = {state: sum(finding.state == state for finding in findings) for state in styles}
    return Group(table, Text(", ".join(f"{n} {state}" for state, n in counts.items() if n) or "nothing there"))


def corpora_table() -> Group:
    """Names of corpora, and where each comes from."""
    table = Table("corpus", "from", box=None, pad_edge=False)
    for name in lab.CORPORA:
        table.add_row(name, "the lab")
    for name, hub in CATALOGUE.items():
        table.add_row(name, f"{hub}{', in the chat template' if hub.is_chat else ''}")
    table.caption = Text("Also hf:org/name[:config][#split][@column], files and folders.")
    return captioned(table)


def headline(stored: Stored) -> str:
    """The one number or two that an artifact is about."""
    body = stored.body
    if isinstance(body, FeatureSet):
        return f"{len(body.features)} features of {stored.header.sae.n_features if stored.header.sae else '?'}"
    if isinstance(body, Threshold):
        return f"{body.gate} > {body.threshold:.3f}, alpha {body.alpha:g}"
    if isinstance(body, Guardrail):
        return clamp_line(body)
    if isinstance(body, EvalReport):
        shown = [f"{bench} {first_metric(sides)}" for bench, sides in body.results.items()]
        return ", ".join(shown[:3]) + (", ..." if len(shown) > 3 else "")
    if isinstance(body, Comparison):
        return f"{len({row['method'] for row in body.rows})} methods, {len(body.trials)} trials"
    if isinstance(body, StudyReport):
        return study_headline(body)
    if isinstance(body, Inspection):
        return f"{len(body.features)} features of {body.inspected}"
    if isinstance(body, ModelWeights):
        return f"{body.method}, {body.form}, {len(body.losses)} steps"
    if isinstance(body, Wrapper):
        return f"{body.method}, {body.rule} on the {body.side}"
    return attack_headline(stored.body_as(AttackReport))


def _pairs(rows: Sequence[tuple[str, str]]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, value in rows:
        table.add_row(name, value)
    return table


def _features(body: FeatureSet) -> Table:
    if body.percentiles_over is None:
        return picked_table(body)
    table = Table("rank", "feature", "forget", "retain", "ratio", box=None, pad_edge=False)
    for rank, feature in enumerate(body.features, start=1):
        table.add_row(
            str(rank),
            str(feature.index),
            *(f"{one:.4g}" for one in (feature.forget_score or 0, feature.retain_score, feature.ratio or 0)),
        )
    over = "of the live features only: nearly all are dead" if body.percentiles_over == "live" else "of all features"
    table.caption = f"{body.n_live} live; {body.n_passed} passed the percentiles {over}{_probe(body.probe)}"
    return table


def _probe(probe: Json) -> str:
    """What is worth knowing of a probe; the accuracy is on the tokens that it was fitted on."""
    if not probe:
        return ""
    indices = " ".join(str(one["index"]) for one in probe["features"])
    return f"; probe over {indices}: tells {probe['path'][-1]['balanced_accuracy']:.2f} of tokens apart"


def _threshold(body: Threshold, lengths: Sequence[int]) -> list[tuple[str, str]]:
    if body.false_positive_rate is None:
        rate = "not measured: no fresh piece of retain text"
    else:
        interval = f"95 %: {body.low:.3f} to {body.high:.3f}"
        rate = f"{body.false_positive_rate:.3f} of {body.n_fresh} ({interval})"
    return [
        ("gate", body.gate),
        ("threshold", f"{body.threshold:.4f}"),
        ("alpha", f"{body.alpha:g}, for {'each retain corpus' if body.guarantee == 'each' else 'all retain text'}"),
        ("set on", f"{body.n_calibration} pieces of {body.n_documents} documents"),
        ("for text of", f"{lengths[0]} to {lengths[1]} tokens"),
        *([("the paper's percentile", f"{body.percentile:.4f}")] if body.percentile is not None else []),
        *([("watches", " ".join(map(str, body.detectors)))] if body.detectors else []),
        ("false positives, fresh retain text", rate),
        *(rate_row(one) for one in body.rates),
    ]


def provenance_tree(stored: Stored) -> Tree:
    """An artifact, below it its inputs, and below those what they were computed from: model, SAE, corpora, versions.

    What differs from the artifact above is said; what lies elsewhere, is missing or is damaged too.
    """
    return _grown(Tree(Text(f"{stored.id}  {headline(stored)}"), guide_style="dim"), stored, None)


def _grown(tree: Tree, stored: Stored, above: Header | None) -> Tree:
    header = stored.header
    for line in facts(header, above):
        tree.add(Text(line, style="dim"))
    for named in header.inputs:
        if named.is_elsewhere:
            tree.add(Text(f"{named.id}, which lay elsewhere ({named.sha256[:12]})"))
            continue
        try:
            below = Workspace(stored.path.parent).read(str(stored.path.with_name(f"{named.id}.json")))
        except DsgError as error:
            tree.add(Text(f"{named.id}  {error.message}", style="red"))
            continue
        _grown(tree.add(Text(f"{below.id}  {headline(below)}")), below, header)
    return tree


def facts(header: Header, above: Header | None = None) -> list[str]:
    """What it was made with; of an input, only what is not as it is for the artifact above it."""
    known = _made_with(above) if above is not None else {}
    lines = [f"{name}: {text}" for name, text in _made_with(header).items() if known.get(name) != text]
    roles = [role for role in ("forget", "retain") if header.settings.get(role)]
    return [f"made {header.created}", *lines, *(f"{role}: {_corpora(header.settings[role])}" for role in roles)]


def _made_with(header: Header) -> dict[str, str]:
    git, sae = header.git, header.sae
    commit = f", commit {git['commit'][:12]}{' with changes' if git['dirty'] else ''}" if git else ""
    packages = ", ".join(f"{name} {version}" for name, version in header.packages.items())
    return {
        "model": f"{header.model.source}, fingerprint {header.model.fingerprint[:12]}",
        "SAE": f"{sae.source} at {sae.hook}, weights {sae.sha256[:12]}" if sae else "none",
        "versions": f"dsg-cli {header.dsg_version}{commit}, {packages}",
        "run": f"{header.device}, {header.dtype}, seed {header.seed}",
    }


def _corpora(described: dict[str, str] | list[str] | list[Json]) -> str:
    if isinstance(described, dict):
        return ", ".join(f"{name} ({digest[:12]})" for name, digest in described.items())
    if any(isinstance(one, str) for one in described):
        return ", ".join(map(str, described))  # Of a method that read no text.
    known = [one for one in described if isinstance(one, dict)]
    counts = [f"{one['documents']} documents, " if "documents" in one else "" for one in known]
    return ", ".join(f"{one['name']} ({n}{one['sha256'][:12]})" for one, n in zip(known, counts, strict=True))
