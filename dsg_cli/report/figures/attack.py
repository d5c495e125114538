"""An attack's curve, guarded and unguarded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsg_cli.artifacts import AttackReport, Json
from dsg_cli.report.attacks import place, share, unit
from dsg_cli.report.figures.style import CYCLE, DASHES, GREY, MARKERS, Drawn, drawing, key_above, short

MOST_TICKS, WIDELY = 9, 30
MOST_VARIANTS = 5
"""Lines in one figure; the table has them all."""


def draw(artifact: str, body: AttackReport) -> Drawn | None:
    """Lines where the attack has a scale, else a point each; nothing for an attack that could not be measured."""
    if not body.curve or not body.summary["n_measurable"]:
        return None
    variants: dict[str, list[Json]] = {}
    for point in body.curve:
        variants.setdefault(point["variant"], []).append(point)
    worst = sorted(variants, key=lambda name: -max(point["guarded"]["forget_acc"] for point in variants[name]))
    xs = {point["x"] for point in body.curve}
    is_scale = len(xs) > 1 and all(isinstance(x, int | float) for x in xs)
    points = [point for name in worst[:MOST_VARIANTS] for point in variants[name]]
    with drawing(height=3.6 if is_scale else 1.1 + 0.28 * len(points)) as (figure, axes):
        if is_scale:
            _lines(axes, {name: variants[name] for name in worst[:MOST_VARIANTS]}, body)
        else:
            _points(axes, [(_name(point), point["guarded"], point["unguarded"]) for point in points])
        key_above(axes)
    more = (
        f" The {MOST_VARIANTS} variants of {len(worst)} that brought back most." if len(worst) > MOST_VARIANTS else ""
    )
    shades = (
        " The shade is the 95\N{NO-BREAK SPACE}% interval of what brought back most."
        if is_scale and "forget_low" in points[0]["guarded"]
        else ""
    )
    title = f"Attack {body.attack} on {body.bench}: what comes back, guarded and unguarded.{shades}{more}"
    before, found = body.before["guarded"]["forget_acc"], body.summary
    said = f"Guarded {before:.2f} before, at most {share(found['forget_acc_worst'])} at {place(body)}"
    said += f", where the unguarded model has {share(found['unguarded_at_worst'])}."
    return Drawn(f"{artifact}-curve", artifact, title, said, figure)


def draw_all(attacks: Sequence[tuple[str, AttackReport]]) -> Drawn | None:
    """All attacks in one figure, each at the point where most came back."""
    found = [(name, body, _worst(body)) for name, body in attacks if body.summary["n_measurable"]]
    found = sorted(found, key=lambda one: -(one[1].summary["forget_acc_worst"] or 0))
    if not found:
        return None
    with drawing(height=1.1 + 0.28 * len(found)) as (figure, axes):
        _points(
            axes, [(f"{body.attack} ({name})", point["guarded"], point["unguarded"]) for name, body, point in found]
        )
        key_above(axes)
    title = (
        "All attacks at their worst: accuracy on what is to be forgotten where most came back, guarded and unguarded."
    )
    said = "; ".join(f"{body.attack} {body.summary['forget_acc_worst']:.2f} at {place(body)}" for _, body, _ in found)
    return Drawn("attacks-worst", "", title, f"Guarded: {said}.", figure)


def _worst(body: AttackReport) -> Json:
    found = body.summary
    points = [p for p in body.curve if (p["x"], p["variant"]) == (found["worst_x"], found["worst_variant"])]
    return max(points or body.curve, key=lambda point: point["guarded"]["forget_acc"])


def _name(point: Json) -> str:
    return " ".join(str(part) for part in (point["variant"], point["x"]) if part != "")


def _lines(axes: Any, variants: dict[str, list[Json]], body: AttackReport) -> None:
    """The first variant brought back most."""
    for number, (name, points) in enumerate(variants.items()):
        points = sorted(points, key=lambda point: point["x"])
        xs = [point["x"] for point in points]
        colour, dash = CYCLE[number % len(CYCLE)], DASHES[number % len(DASHES)]
        guarded = [point["guarded"] for point in points]
        axes.plot(xs, [one["forget_acc"] for one in guarded], dash, marker=MARKERS[number], color=colour,
                  label=f"guarded{f', {short(name, 36)}' if name else ''}")  # fmt: skip
        if number == 0 and all("forget_low" in one and "forget_high" in one for one in guarded):
            low, high = ([one[f"forget_{end}"] for one in guarded] for end in ("low", "high"))
            axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
        unguarded = [point["unguarded"]["forget_acc"] for point in points]
        axes.plot(xs, unguarded, dash, color=GREY, linewidth=1.1, label="unguarded" if number == 0 else None)
    _scale(axes, sorted({point["x"] for points in variants.values() for point in points}))
    axes.set_ylim(-0.03, 1.05)
    axes.set_xlabel(unit(body.attack) or "x")
    axes.set_ylabel(f"accuracy on {short(body.bench, 32)}")
    axes.grid(axis="y")


def _scale(axes: Any, xs: Sequence[float]) -> None:
    """Ticks where something was measured; widely spread numbers from 0 on in proportion to their logarithm."""
    positive = [x for x in xs if x > 0]
    if positive and xs[0] >= 0 and positive[-1] / positive[0] >= WIDELY:
        axes.set_xscale("symlog", linthresh=positive[0], linscale=0.6)
    if len(xs) <= MOST_TICKS:
        axes.set_xticks(xs, [f"{x:g}" for x in xs])
        axes.minorticks_off()


def _points(axes: Any, lines: Sequence[tuple[str, Json, Json]]) -> None:
    """A line each: its name, and what both sides answer."""
    for at, (_, guarded, unguarded) in enumerate(reversed(lines)):
        if "forget_low" in guarded and "forget_high" in guarded:
            axes.plot([guarded["forget_low"], guarded["forget_high"]], [at, at], color=CYCLE[0], linewidth=1.2)
        axes.plot(unguarded["forget_acc"], at, "s", color=GREY, label="unguarded" if at == 0 else None)
        axes.plot(guarded["forget_acc"], at, "o", color=CYCLE[0], label="guarded" if at == 0 else None)
    axes.set_yticks(range(len(lines)), [short(name, 44) for name, _, _ in reversed(lines)])
    axes.set_ylim(-0.6, len(lines) - 0.4)
    axes.set_xlim(-0.03, 1.05)
    axes.set_xlabel("accuracy; bars are 95 % intervals")
    axes.grid(axis="x")
