"""What other methods than a guardrail made, as rows of a table."""

from __future__ import annotations

from collections.abc import Sequence

from dsg_cli.artifacts import Json, ModelWeights, Wrapper
from dsg_cli.methods.names import teaches

SHOWN_KEYWORDS = 12


def model_rows(body: ModelWeights) -> list[tuple[str, str]]:
    """Of changed weights: what was trained, how the loss went, what it cost."""
    cost = body.cost
    rows = [
        ("method", body.method + (", which taught it; nothing is unlearned" if teaches(body.method) else "")),
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


def composed(composition: Sequence[Json]) -> str:
    """What acted, in its order."""
    return " + ".join(
        f"{one['id']} ({one['method']}{', taught' if teaches(one['method']) else ''})" for one in composition
    )
