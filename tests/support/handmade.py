"""Artifacts made by hand, by keyword: for what writes and reads them, for tables, summaries and the command line."""

from __future__ import annotations

from dsg_cli.attacks.target import summarise
from dsg_cli.evals.expect import check_expected, parse_expected
from dsg_cli.workspace.artifacts import (
    KINDS,
    Guardrail,
    Header,
    InputArtifact,
    ModelIdentity,
    ModelWeights,
    SaeIdentity,
    Wrapper,
)
from dsg_cli.workspace.results import AttackReport, EvalReport
from dsg_cli.workspace.store import Stored, Workspace

SITE = "blocks.1.hook_resid_post"
MODEL = ModelIdentity(source="lab", architecture="X", n_layers=4, width=8, last_layer=1, fingerprint="f")
COMMON = {"special_ids": [0, 1], "bos": None, "forget": ["a"], "retain": ["b"]}
FIELDS = {
    Guardrail: {
        "indices": [1, 2], "gate": "mean", "threshold": 0.1 + 0.2, "strength": 1e-3, "strength_setting": "2r",
        "median_residual_norm": 3.0, "hook": SITE, "hook_out": SITE, "activation": "jumprelu", **COMMON,
    },
    ModelWeights: {
        "method": "npo", "form": "whole", "result": MODEL, "losses": [], "diverged_at": None, "features": [], **COMMON,
        "trained": {"n_parameters": 1, "n_changed": 1, "modules": []},
        "cost": dict.fromkeys(("forward_passes", "backward_passes", "forward_tokens", "backward_tokens"), 1),
    },
    Wrapper: {
        "method": "prompt", "rule": "prefix", "side": "input", "text": "Say nothing.", "keywords": [], "layer": None,
        "threshold": 0.0, "refusal": "", "rates": [], **COMMON,
    },
}  # fmt: skip


def made(kind, **changes):
    """A body of a kind."""
    return kind(**(FIELDS[kind] | changes))


def header(kind="guardrail", **changes):
    """A header of a kind of artifact."""
    fields = {
        "created": "2026-01-01T00:00:00+00:00", "dsg_version": "0", "git": {}, "packages": {"torch": "2"},
        "device": "cpu", "dtype": "float32", "seed": 0, "settings": {"strength": "2r"}, "model": MODEL, "sae": None,
        "inputs": [InputArtifact(id="threshold-001", sha256="0" * 64)],
    }  # fmt: skip
    return Header(kind=kind, schema=KINDS[kind].schema_number, id="", **(fields | changes))


def judged_header(kind="eval", **changes):
    """That of an evaluation or an attack of a guardrail."""
    sae = SaeIdentity(
        source="lab", architecture="jumprelu", hook=SITE, width=8, n_features=16, prepend_bos=True,
        config_sha256="c", sha256="s",
    )  # fmt: skip
    fields = {
        "dsg_version": "0.1.0",
        "git": {"commit": "0123456789abcdef", "dirty": True},
        "settings": {"benches": ["lab-hexes", "a|b", "gsm"]},
        "model": MODEL.replace(source="org/mo|del"),
        "sae": sae,
        "inputs": [InputArtifact(id="guardrail-001", sha256="0" * 64)],
    }
    return header(kind, **(fields | changes))


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
        workspace.write(judged_header(), report(*CONDITIONS)),
        workspace.write(judged_header("attack"), attack()),
    ]


def chain(workspace: Workspace) -> list[Stored]:
    """The same with the guardrail before them, as a run leaves it."""
    return [workspace.write(header(), made(Guardrail)), *write(workspace)]
