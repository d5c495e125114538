"""Methods side by side: what each forgets against what it keeps, and how requests one after another went."""

from __future__ import annotations

from dsg_cli.artifacts import Comparison, Json
from dsg_cli.report.figures.style import DASHES, INK, Drawn, chance_line, drawing, look


def draw(artifact: str, body: Comparison) -> list[Drawn]:
    """The trade-off on test and on dev questions, and the sequence."""
    return [one for one in (_trade_off(artifact, body), _sequence(artifact, body)) if one is not None]


def _trade_off(artifact: str, body: Comparison) -> Drawn | None:
    """Forget accuracy against utility: chosen rows large on test questions, trials small on dev questions."""
    rows = [(row, _utility(row, body)) for row in body.rows]
    known = [(row, utility) for row, utility in rows if utility is not None and _forget(row, body) is not None]
    if not known:
        return None
    methods = list(dict.fromkeys(row["method"] for row, _ in known))
    looks = {name: look(number) for number, name in enumerate(methods)}
    said: dict[str, str] = {}
    with drawing(7.4, 4.6) as (figure, axes):
        for trial in body.trials:
            if trial["forget"] is not None and trial["utility"] is not None and trial["method"] in looks:
                of_method = looks[trial["method"]]
                axes.plot(trial["utility"], trial["forget"], alpha=0.4, markersize=3.2, linestyle="", **of_method)
        for row, utility in known:
            forget = _forget(row, body)
            label = row["method"][:30] if row["method"] not in said else None
            axes.plot(
                utility, forget, markersize=8, markeredgecolor=INK, label=label, linestyle="", **looks[row["method"]]
            )
            said.setdefault(row["method"], f"{row['method']} forget {forget:.2f}, utility {utility:.2f}")
        chance_line(axes, body.chance)
        axes.set_ylim(-0.03, 1.07)
        axes.set_xlabel("utility: mean accuracy on everything else  (better to the right)")
        axes.set_ylabel(f"accuracy on {body.benches['forget'][:40]}  (better below)")
        axes.grid()
        figure.legend(loc="outside right upper", fontsize=8)
    title = "Forgetting against utility. Large: chosen settings on test questions; small: all trials on dev questions."
    return Drawn(
        f"{artifact}-trade-off", artifact, title, f"{'; '.join(said.values())}. Chance is {body.chance:.2f}.", figure
    )


def _sequence(artifact: str, body: Comparison) -> Drawn | None:
    """Accuracy on the first request and on the rest, after each request."""
    sequences = [one for one in body.sequences if len(one["curve"]) > 1]
    if not sequences:
        return None
    requests = list(dict.fromkeys(point["request"] for one in sequences for point in one["curve"]))
    forgotten = [body.benches["forget"], *requests[1:]]
    kept = [name for name in (*body.benches["near"], *body.benches["other"]) if name not in forgotten]
    said = []
    with drawing(7.4, 3.6, ncols=2, sharey=True) as (figure, (left, right)):
        for number, one in enumerate(sequences):
            style = look(number) | {"linestyle": DASHES[number % len(DASHES)]}
            steps = range(1, len(one["curve"]) + 1)
            gone = [_mean(point["results"], forgotten[:step]) for step, point in zip(steps, one["curve"], strict=True)]
            rest = [_mean(point["results"], kept) for point in one["curve"]]
            left.plot(steps, gone, label=one["method"][:30], **style)
            right.plot(steps, rest, **style)
            said.append(f"{one['method']} {_said(gone[-1])} and {_said(rest[-1])}")
        chance_line(left, body.chance)
        for axes, name in ((left, "of what is to be forgotten by then"), (right, "of what is never to be forgotten")):
            axes.set_ylim(-0.03, 1.07)
            axes.set_xticks(range(1, len(requests) + 1))
            axes.set_xlabel("requests")
            axes.set_title(name)
            axes.grid(axis="y")
        left.set_ylabel("mean accuracy")
        figure.legend(loc="outside right upper", fontsize=8)
    title = "Requests one after another: accuracy on all that was to be forgotten so far, and on the rest."
    return Drawn(f"{artifact}-sequence", artifact, title, f"After the last request: {'; '.join(said)}.", figure)


def _forget(row: Json, body: Comparison) -> float | None:
    value: float | None = row["results"].get(body.benches["forget"], {}).get("acc")
    return value


def _utility(row: Json, body: Comparison) -> float | None:
    found = {bench: sides.get("acc") for bench, sides in row["results"].items()}
    return _mean(found, [*body.benches["near"], *body.benches["other"]])


def _mean(found: Json, benches: list[str]) -> float | None:
    known = [found[bench] for bench in benches if found.get(bench) is not None]
    return sum(known) / len(known) if known else None


def _said(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
