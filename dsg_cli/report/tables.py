"""Artifacts as terminal tables of at most 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from dsg_cli.artifacts import (
    Comparison,
    EvalReport,
    FeatureSet,
    Guardrail,
    Inspection,
    Json,
    ModelWeights,
    StudyReport,
    Threshold,
    Wrapper,
)
from dsg_cli.catalogue import CATALOGUE
from dsg_cli.errors import DsgError
from dsg_cli.lab import data as lab
from dsg_cli.report.attacks import attack_headline, curve_table
from dsg_cli.report.comparison import comparison_table
from dsg_cli.report.console import captioned
from dsg_cli.report.evaluations import evaluation_table, first_metric
from dsg_cli.report.guardrails import clamp_line, guardrail_rows
from dsg_cli.report.inspections import inspection_view
from dsg_cli.report.methods import model_rows, rate_row, wrapper_rows
from dsg_cli.report.picked import picked_table
from dsg_cli.report.plain import visible
from dsg_cli.report.studies import study_headline, study_table
from dsg_cli.workspace import Stored, Workspace

if TYPE_CHECKING:
    from dsg_cli.stages.verify import Finding


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
        table = curve_table(body)
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
    return attack_headline(body)


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
