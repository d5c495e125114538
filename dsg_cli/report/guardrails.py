"""What a guardrail does, in words and rows."""

from __future__ import annotations

from dsg_cli.artifacts import Guardrail, Json
from dsg_cli.runtime.spec import NEVER


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
