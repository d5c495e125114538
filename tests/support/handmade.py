"""An evaluation and an attack made by hand: for tables, summaries and what the command line does with them."""

from __future__ import annotations

from test_workspace import BODY
from test_workspace import HEADER as GUARDRAIL

from dsg_cli.attacks.target import summarise
from dsg_cli.evals.expect import check_expected, parse_expected
from dsg_cli.workspace.artifacts import InputArtifact, ModelIdentity, SaeIdentity
from dsg_cli.workspace.results import AttackReport, EvalReport
from dsg_cli.workspace.store import Stored, Workspace

HEADER = GUARDRAIL.replace(
    kind="eval",
    schema_number=EvalReport.schema_number,
    dsg_version="0.1.0",
    git={"commit": "0123456789abcdef", "dirty": True},
    settings={"benches": ["lab-hexes", "a|b", "gsm"]},
    model=ModelIdentity(source="org/mo|del", architecture="X", n_layers=4, width=8, last_layer=1, fingerprint="f"),
    sae=SaeIdentity(
        source="lab",
        architecture="jumprelu",
        hook="blocks.1.hook_resid_post",
        width=8,
        n_features=16,
        prepend_bos=True,
        config_sha256="c",
        sha256="s",
    ),
    inputs=[InputArtifact(id="guardrail-001", sha256="0" * 64)],
)


RESULTS = {
    "lab-hexes": {
        "base": {"acc": 0.8, "acc_stderr": 0.1, "n": 50, "n_asked": 60},
        "unlearned": {"acc": 0.7, "acc_stderr": 0.1, "n": 50, "acc_count": 35, "acc_low": 0.56, "acc_high": 0.81},
    },
    "a|b": {"base": {"acc": 1.0, "n": 1000}, "unlearned": {"acc": 0.5, "n": 1000}},
    "gsm": {"base": {"exact_match": 0.25, "n": 4}, "unlearned": {"exact_match": 0.5, "n": 4}},
    "part-of-gsm": {"base": {"exact_match": 0.25, "n": 4}, "unlearned": {"exact_match": 0.5, "n": 4}},
}


GATE = {"lab-hexes": {"rate": 0.98, "n": 50}, "a|b": {"rate": 0.25, "n": 900}}


CONDITIONS = ["lab-hexes<=0.75", "a|b>=0.99*base-0.01", "a|b.gate<=0.05", "gsm.exact_match>=base"]


def judged(*conditions):
    return check_expected([parse_expected(text, list(RESULTS)) for text in conditions], RESULTS, GATE)


def report(*conditions):
    return EvalReport(split="test", results=RESULTS, gate=GATE, expected=judged(*conditions))


def attack(kind="dilution"):
    curve = [
        {"x": x, "variant": "", "unlearned": {"forget_acc": x / 100, "gate_rate": 1.0}, "base": {"forget_acc": 0.9}}
        for x in (0, 48)
    ]
    before = {side: curve[0][side] for side in ("unlearned", "base")}
    return AttackReport(
        attack=kind,
        threat_model="anyone",
        bench="a|b",
        before=before,
        curve=curve,
        summary=summarise(before, curve, on_prompts=True),
    )


def write(workspace: Workspace) -> list[Stored]:
    """An evaluation that misses two conditions, and an attack."""
    return [
        workspace.write(HEADER, report(*CONDITIONS)),
        workspace.write(HEADER.replace(kind="attack", schema_number=AttackReport.schema_number), attack()),
    ]


def chain(workspace: Workspace) -> list[Stored]:
    """The same with the guardrail before them, as a run leaves it."""
    return [workspace.write(GUARDRAIL, BODY), *write(workspace)]
