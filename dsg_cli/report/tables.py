"""Every kind of artifact as a table and in a line; what a workspace holds, and what an artifact came from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text
from rich.tree import Tree

from dsg_cli.data.catalogue import CATALOGUE
from dsg_cli.errors import DsgError
from dsg_cli.guardrail.runtime.spec import NEVER
from dsg_cli.lab import data as lab
from dsg_cli.methods import finetunes
from dsg_cli.report.comparison import comparison_view
from dsg_cli.report.evaluations import attack_headline, curve_table, evaluation_headline, evaluation_table
from dsg_cli.report.inspections import inspection_table, inspection_view
from dsg_cli.report.rendering import Styled, Table, View, pairs, terminal, visible
from dsg_cli.report.studies import study_headline, study_table, study_view
from dsg_cli.workspace.artifacts import FeatureSet, Guardrail, Header, ModelWeights, Threshold, Wrapper
from dsg_cli.workspace.body import Json
from dsg_cli.workspace.results import StudyReport
from dsg_cli.workspace.store import Stored, Workspace

if TYPE_CHECKING:
    from dsg_cli.inspection.descriptions import Candidates
    from dsg_cli.workspace.store import Verdict

SHOWN_KEYWORDS = 12
SHOWN_CANDIDATES = 40


def clamp_line(body: Guardrail) -> str:
    """What it is about, in one line."""
    n = len(body.indices)
    what = f"{n} features" if n != 1 else f"feature {body.indices[0]}"
    where = f" where one of {len(body.detectors)} others fires" if body.gate == "token" and body.detectors else ""
    return f"{'' if body.method == 'dsg' else body.method + ': '}{what} to {_targets(body)}{where}"


def guardrail_rows(body: Guardrail) -> list[tuple[str, str]]:
    """All that there is to say, as names and values."""
    rows = [("method", body.method)] if body.method != "dsg" else []
    rows.append(("features", _listed(body.indices)))
    if body.detectors and body.gate == "token":
        rows.append(("watches", _listed(body.detectors)))
    gate = "none: every hot token is clamped" if body.gate == "token" else f"{body.gate} > {body.threshold:.4f}"
    residual = f"median residual norm {body.median_residual_norm:.4g}"
    rows += [("gate", gate), ("clamp", f"to {_targets(body, '.4g')} ({body.strength_setting}; {residual})")]
    if body.above:
        # Without those that never make a token active.
        rows.append(("hot above", " ".join(_once_if_equal([x for x in body.above if x < NEVER])) or "nothing"))
    if body.clamp == "each":
        rows.append(("sets", "each feature where it is itself above that"))
    effect, tried_on = body.effect, "nothing"
    if effect:
        tried_on = (
            f"{effect['n_rows']} forget rows: gated {effect['gate_rate']:.2f}, changed {effect['changed_rate']:.2f}, "
            f"largest edit {effect['edit']:.2g} residual norms"
        )
    return [*rows, ("at", body.hook), ("tried on", tried_on)]


def _targets(body: Guardrail, digits: str = ".3g") -> str:
    if not body.coefficients:
        return f"-{body.strength:{digits}}"
    targets = _once_if_equal(body.coefficients, digits)
    return " ".join(targets) if digits == ".4g" or len(targets) <= 2 else f"{targets[0]} ... {targets[-1]}"


def _once_if_equal(values: Sequence[float], digits: str = ".4g") -> list[str]:
    return [format(value, digits) for value in (values[:1] if len(set(values)) == 1 else values)]


def _listed(indices: Iterable[int]) -> str:
    return " ".join(map(str, indices))


def model_rows(body: ModelWeights) -> list[tuple[str, str]]:
    """Of changed weights: what was trained, how the loss went, what it cost."""
    cost, trained = body.cost, body.trained
    rows = [("method", body.method + (", which taught it; nothing is unlearned" if finetunes(body.method) else ""))]
    if "corpora" in trained:
        rows.append(("trained on", ", ".join(trained["corpora"])))
    rows += [
        ("weights", "an adapter of the base model" if body.form == "adapter" else "a whole model"),
        ("free to change", f"{trained['n_parameters']:,} parameters in {len(trained['modules'])} modules"),
        ("changed", f"{trained['n_changed']:,}"),
    ]
    if body.losses:
        rows += [(f"loss, step {losses['step']}", _terms(losses)) for losses in (body.losses[0], body.losses[-1])]
    if body.diverged_at is not None:
        rows.append(("diverged", f"at step {body.diverged_at}; the weights are those of the step above"))
    passes = f"{cost['forward_passes']:,} forward, {cost['backward_passes']:,} backward"
    rows.append(("passes", f"{passes}; {cost['forward_tokens']:,} and {cost['backward_tokens']:,} tokens"))
    return [*rows, ("guided by", _listed(body.features))] if body.features else rows


def _terms(losses: Json) -> str:
    rest = ", ".join(f"{name} {value:.3g}" for name, value in losses.items() if name not in ("step", "loss"))
    return f"{losses['loss']:.3g}" + (f" ({rest})" if rest else "")


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
    return [*rows, *map(_rate_row, body.rates)]


def _rate_row(rate: Json) -> tuple[str, str]:
    name = f"{'caught' if rate['is_forget'] else 'gated'}: {rate['what']}"
    return name, f"{rate['rate']:.3f} of {rate['n']} (95 %: {rate['low']:.3f} to {rate['high']:.3f})"


def threshold_table(body: Threshold, lengths: Sequence[int]) -> Table:
    """The gate, its threshold, and on which text it opens; `lengths` are those of calibration, in tokens."""
    rate = "not measured: no fresh piece of retain text"
    if body.false_positive_rate is not None:
        rate = f"{body.false_positive_rate:.3f} of {body.n_fresh} (95 %: {body.low:.3f} to {body.high:.3f})"
    rows = [
        ("gate", body.gate),
        ("threshold", f"{body.threshold:.4f}"),
        ("alpha", f"{body.alpha:g}, for {'each retain corpus' if body.guarantee == 'each' else 'all retain text'}"),
        ("set on", f"{body.n_calibration} pieces of {body.n_documents} documents"),
        ("for text of", f"{lengths[0]} to {lengths[1]} tokens"),
    ]
    if body.percentile is not None:
        rows.append(("the paper's percentile", f"{body.percentile:.4f}"))
    if body.detectors:
        rows.append(("watches", _listed(body.detectors)))
    rows += [("false positives, fresh retain text", rate), *map(_rate_row, body.rates)]
    return pairs(rows, "the gate, and on which text it opens")


def features_table(body: FeatureSet) -> Table:
    """The selected features with their scores, or with what they were picked by."""
    if body.percentiles_over is None:
        return _picked_table(body)
    rows = []
    for rank, feature in enumerate(body.features, start=1):
        scores = (feature.forget_score or 0, feature.retain_score, feature.ratio or 0)
        rows.append([str(rank), str(feature.index), *(f"{score:.4g}" for score in scores)])
    over = "of the live features only: nearly all are dead" if body.percentiles_over == "live" else "of all features"
    note = f"{body.n_live} live; {body.n_passed} passed the percentiles {over}"
    if body.probe:
        # The accuracy is on the tokens that it was fitted on.
        indices = _listed(feature["index"] for feature in body.probe["features"])
        accuracy = body.probe["path"][-1]["balanced_accuracy"]
        note += f"; probe over {indices}: tells {accuracy:.2f} of tokens apart"
    return Table(("rank", "feature", "forget", "retain", "ratio"), rows, "the selected features", [note])


def _picked_table(body: FeatureSet) -> Table:
    ranking = {row["index"]: row for row in body.described.get("ranking", [])}
    has_forget, has_texts = bool(body.forget_tokens), any("description" in row for row in ranking.values())
    columns = ["rank", "feature", *["score"] * bool(ranking), *["forget"] * has_forget, "retain"]
    columns += ["description"] * has_texts
    rows = []
    for rank, feature in enumerate(body.features, start=1):
        row = ranking.get(feature.index, {"score": 0.0})
        scores = [row["score"]] * bool(ranking) + [feature.forget_score or 0.0] * has_forget + [feature.retain_score]
        text = [visible(row.get("description", ""))] * has_texts
        rows.append([str(rank), str(feature.index), *(f"{score:.4g}" for score in scores), *text])
    unread = "" if body.forget_tokens else "; no forget text was read"
    note = f"Named by hand{unread}."
    if described := body.described:
        n = described.get("n_matched", len(described["ranking"]))
        note = f"{n} match {described['query']!r} ({described['ranker']}, {described['source']}), "
        note += f"{body.n_passed} are rare enough on retain text{unread}."
    return Table(columns, rows, "the selected features", [visible(note)])


def candidates_table(candidates: Candidates) -> Table:
    """What a query found, the best first, before any text is read."""
    rows = [
        [str(rank), str(match.index), f"{match.score:.3f}", visible(candidates.texts[match.index])]
        for rank, match in enumerate(candidates.ranking[:SHOWN_CANDIDATES], start=1)
    ]
    n = len(candidates.ranking)
    more = f", of which {SHOWN_CANDIDATES} are shown" if n > SHOWN_CANDIDATES else ""
    note = f"{n} match {candidates.described['query']!r}{more}."
    return Table(("rank", "feature", "score", "description"), rows, notes=[note])


@dataclass(frozen=True)
class KindView:
    """How a kind of artifact is shown."""

    heading: str  # Of its section of a report.
    headline: Callable[[Stored, Any], str]  # The one number or two that an artifact, with this body, is about.
    view: Callable[[Stored, Any], View]


KIND_VIEWS = {
    "compare": KindView(
        "Methods side by side",
        lambda _, body: f"{len({row['method'] for row in body.rows})} methods, {len(body.trials)} trials",
        lambda _, body: comparison_view(body),
    ),
    "eval": KindView(
        "What it answers",
        lambda _, body: evaluation_headline(body),
        lambda stored, _: [evaluation_table(stored)],
    ),
    "attack": KindView("Attacks", lambda _, body: attack_headline(body), lambda _, body: [curve_table(body)]),
    "threshold": KindView(
        "The gate",
        lambda _, body: f"{body.gate} > {body.threshold:.3f}, alpha {body.alpha:g}",
        lambda stored, body: [threshold_table(body, stored.header.settings["lengths"])],
    ),
    "study": KindView("Studies", lambda _, body: study_headline(body), lambda _, body: study_view(body)),
    "features": KindView(
        "Features",
        lambda stored, body: (
            f"{len(body.features)} features of {sae.n_features if (sae := stored.header.sae) else '?'}"
        ),
        lambda _, body: [features_table(body)],
    ),
    "guardrail": KindView(
        "Guardrails",
        lambda _, body: clamp_line(body),
        lambda _, body: [pairs(guardrail_rows(body), "what it clamps, and when")],
    ),
    "model": KindView(
        "Changed weights",
        lambda _, body: f"{body.method}, {body.form}, {len(body.losses)} steps",
        lambda _, body: [pairs(model_rows(body), "what was changed, and how")],
    ),
    "wrapper": KindView(
        "Wrappers",
        lambda _, body: f"{body.method}, {body.rule} on the {body.side}",
        lambda _, body: [pairs(wrapper_rows(body), "its rule, and what it refuses")],
    ),
    "inspect": KindView(
        "What the features are about",
        lambda _, body: f"{len(body.features)} features of {body.inspected}",
        lambda _, body: [inspection_table(body)],
    ),
}
"""Kind -> how it is shown, in the order of a report."""


def headline(stored: Stored) -> str:
    """The one number or two that an artifact is about."""
    return KIND_VIEWS[stored.header.kind].headline(stored, stored.body)


def artifact_view(stored: Stored) -> View:
    """What an artifact holds, and its notes."""
    notes = [visible(f"note: {note}") for note in stored.header.notes]
    return [*KIND_VIEWS[stored.header.kind].view(stored, stored.body), *notes]


def artifact_table(stored: Stored, view: RenderableType | None = None) -> Group:
    """One artifact for a terminal: what it holds (`view`, where there is more to show), and where it came from."""
    header, parts = stored.header, artifact_view(stored)
    if view is None and header.kind == "study":
        view = study_table(stored.body_as(StudyReport))
    elif view is None and header.kind == "inspect":
        view = inspection_view(stored)
    if view is not None:
        parts = parts[len(parts) - len(header.notes) :]
    sae = f", SAE {header.sae.source} at {header.sae.hook}" if header.sae else ""
    origin = (
        f"model {header.model.source}{sae}; from {_made_from(header)}; {header.created}; {header.device}, "
        f"{header.dtype}; {header.seconds:.1f} s, {header.n_tokens:,} tokens"
    )
    own = [] if view is None else [view]
    return Group(Text(stored.id, style="bold"), *own, terminal(parts), Text(origin, style="dim"))


def _made_from(header: Header) -> str:
    return ", ".join(used.id for used in header.inputs) or "corpora"


def list_table(workspace: Workspace) -> Table:
    """What a workspace holds; what cannot be read is said, not hidden."""
    rows = []
    for artifact_id in workspace.ids():
        try:
            stored = workspace.read(artifact_id)
            cells = [headline(stored), _made_from(stored.header)]
        except DsgError as error:
            cells = [Styled(error.message, "red"), ""]
        rows.append([Styled(artifact_id, "bold"), *cells])
    return Table(("artifact", "what it found", "made from"), rows)


def verify_table(verdicts: Sequence[Verdict]) -> Group:
    """What was verified, and in one line whether all is well."""
    styles = {"ok": "green", "broken": "red", "unfinished": "yellow"}
    rows = [[Styled(each.name, "bold"), Styled(each.state, styles[each.state]), each.remark] for each in verdicts]
    counts = {state: sum(verdict.state == state for verdict in verdicts) for state in styles}
    summary = ", ".join(f"{n} {state}" for state, n in counts.items() if n) or "nothing there"
    return terminal([Table(("", "state", ""), rows, has_head=False), summary])


def corpora_table() -> Table:
    """Names of corpora, and where each comes from."""
    rows = [[name, "the lab"] for name in lab.CORPORA]
    rows += [[name, f"{hub}{', in the chat template' if hub.is_chat else ''}"] for name, hub in CATALOGUE.items()]
    return Table(("corpus", "from"), rows, notes=["Also hf:org/name[:config][#split][@column], files and folders."])


def provenance_tree(stored: Stored) -> Tree:
    """An artifact, below it its inputs, and below those what they were computed from: model, SAE, corpora, versions.

    What differs from the artifact above is said; what lies elsewhere, is missing or is damaged too.
    """
    tree = Tree(Text(f"{stored.id}  {headline(stored)}"), guide_style="dim")
    _grow(tree, stored, None)
    return tree


def _grow(tree: Tree, stored: Stored, above: Header | None) -> None:
    header = stored.header
    for line in facts(header, above):
        tree.add(Text(line, style="dim"))
    for used in header.inputs:
        if used.is_elsewhere:
            tree.add(Text(f"{used.id}, which lay elsewhere ({used.sha256[:12]})"))
            continue
        try:
            below = Workspace(stored.path.parent).read(str(stored.path.with_name(f"{used.id}.json")))
        except DsgError as error:
            tree.add(Text(f"{used.id}  {error.message}", style="red"))
            continue
        _grow(tree.add(Text(f"{below.id}  {headline(below)}")), below, header)


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


def _corpora(corpora: dict[str, str] | list[str] | list[Json]) -> str:
    if isinstance(corpora, dict):
        return ", ".join(f"{name} ({digest[:12]})" for name, digest in corpora.items())
    if any(isinstance(corpus, str) for corpus in corpora):
        return ", ".join(map(str, corpora))  # Of a method that read no text.
    parts = []
    for corpus in (corpus for corpus in corpora if isinstance(corpus, dict)):
        n = f"{corpus['documents']} documents, " if "documents" in corpus else ""
        parts.append(f"{corpus['name']} ({n}{corpus['sha256'][:12]})")
    return ", ".join(parts)
