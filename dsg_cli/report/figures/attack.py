"""An attack's curve, guarded and unguarded."""

from __future__ import annotations

from typing import Any

from dsg_cli.artifacts import AttackReport, Json
from dsg_cli.report.attacks import place, share, unit
from dsg_cli.report.figures.style import CYCLE, DASHES, GREY, MARKERS, Drawn, drawing, short

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
    is_scale = all(isinstance(point["x"], int | float) for point in body.curve)
    points = [point for name in worst[:MOST_VARIANTS] for point in variants[name]]
    with drawing(height=3.4 if is_scale else 0.9 + 0.34 * len(points)) as (figure, axes):
        if is_scale:
            _lines(axes, {name: variants[name] for name in worst[:MOST_VARIANTS]}, body)
        else:
            _points(axes, points)
        axes.legend(fontsize=8)
    left_out = len(worst) - MOST_VARIANTS
    more = f" The {MOST_VARIANTS} variants of {len(worst)} that brought back most." if left_out > 0 else ""
    title = f"Attack {body.attack} on {body.bench}: what comes back, guarded and unguarded.{more}"
    before, found = body.before["guarded"]["forget_acc"], body.summary
    said = f"Guarded {before:.2f} before, at most {share(found['forget_acc_worst'])} at {place(body)}"
    said += f", where the unguarded model has {share(found['unguarded_at_worst'])}."
    return Drawn(f"{artifact}-curve", artifact, title, said, figure)


def _lines(axes: Any, variants: dict[str, list[Json]], body: AttackReport) -> None:
    for number, (name, points) in enumerate(variants.items()):
        points = sorted(points, key=lambda point: point["x"])
        xs = [point["x"] for point in points]
        colour, dash = CYCLE[number % len(CYCLE)], DASHES[number % len(DASHES)]
        guarded = [point["guarded"] for point in points]
        axes.plot(xs, [one["forget_acc"] for one in guarded], dash, marker=MARKERS[number], color=colour,
                  label=f"guarded{f', {short(name, 48)}' if name else ''}")  # fmt: skip
        if all("forget_low" in one and "forget_high" in one for one in guarded):
            low, high = ([one[f"forget_{end}"] for one in guarded] for end in ("low", "high"))
            axes.fill_between(xs, low, high, color=colour, alpha=0.13, linewidth=0)
        unguarded = [point["unguarded"]["forget_acc"] for point in points]
        axes.plot(xs, unguarded, dash, color=GREY, linewidth=1.1, label="unguarded" if number == 0 else None)
    axes.set_ylim(-0.03, 1.05)
    axes.set_xlabel(unit(body.attack) or "x")
    axes.set_ylabel(f"accuracy on {short(body.bench, 40)}")
    axes.grid(axis="y")


def _points(axes: Any, points: list[Json]) -> None:
    for at, point in enumerate(reversed(points)):
        guarded, unguarded = point["guarded"], point["unguarded"]
        if "forget_low" in guarded and "forget_high" in guarded:
            axes.plot([guarded["forget_low"], guarded["forget_high"]], [at, at], color=CYCLE[0], linewidth=1.2)
        axes.plot(guarded["forget_acc"], at, "o", color=CYCLE[0], label="guarded" if at == 0 else None)
        axes.plot(unguarded["forget_acc"], at, "s", color=GREY, label="unguarded" if at == 0 else None)
    names = [" ".join(str(part) for part in (point["variant"], point["x"]) if part != "") for point in points]
    axes.set_yticks(range(len(points)), [short(name, 44) for name in reversed(names)])
    axes.set_xlim(-0.03, 1.05)
    axes.set_xlabel("accuracy; bars are 95 % intervals")
    axes.grid(axis="x")
