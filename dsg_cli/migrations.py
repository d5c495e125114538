"""Artifacts of earlier schemas, as the newest has them."""

from __future__ import annotations

from dsg_cli.artifacts import SCHEMAS, Json

ADDED: dict[tuple[str, int], Json] = {
    ("features", 2): {"probe": {}},
    ("features", 3): {"described": {}},
    ("threshold", 2): {"detectors": [], "window": 0},
    ("threshold", 3): {"weights": [], "bias": 0.0, "clip": 0.0, "guarantee": "pooled", "percentile": None, "rates": []},
    ("guardrail", 2): {"detectors": [], "window": 0, "slice": {"activation": "threshold"}},
    ("guardrail", 3): {"effect": {}},
    ("guardrail", 4): {"bias": 0.0, "clip": 0.0, "strength_trials": []},
    ("guardrail", 5): {"method": "dsg", "clamp": "all", "coefficients": [], "above": []},
    ("eval", 2): {"question_ids": {}, "base_from": {}},
    ("eval", 3): {"composition": []},
    ("eval", 4): {"asked": {}, "reference": {}, "refused": {}},
    ("attack", 2): {"expected": []},
    ("attack", 3): {"composition": []},
}
"""Kind and schema -> fields that it has and earlier ones have not, and what they would hold."""


def migrate(data: Json) -> Json:
    """An artifact's JSON object in the newest schema of its kind."""
    kind, schema = data["kind"], data["schema"]
    for later in range(schema + 1, SCHEMAS[kind] + 1):
        data = {**data, **ADDED.get((kind, later), {})}
    if schema == 1 and kind == "guardrail":
        data["hook_out"] = data["hook"]
    if schema == 1 and kind == "attack":
        curve = [{"variant": "", **point} for point in data["curve"]]
        before = {side: curve[0][side] for side in ("guarded", "unguarded")}
        data = {**data, "curve": curve, "before": before, "summary": _later_summary(data, before)}
    return data


def _later_summary(data: Json, before: Json) -> Json:
    """The summary of an attack of schema 1 as schema 2 has it."""
    n_points = len(data["curve"])
    base, begun = (before[side]["forget_acc"] for side in ("unguarded", "guarded"))
    of_base = {"base_acc": base, "n_points": n_points, "n_measurable": n_points}
    of_base |= {"evades_above": (base + begun) / 2, "evaded_at": {}}
    return {**of_base, "worst_variant": "", "gate_rate_at_worst": None, **data["summary"]}
