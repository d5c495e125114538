"""Base and unlearned model side by side on free text, and a model that never saw what is to be forgotten."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dsg_cli.artifacts import Json
from dsg_cli.benches.text import Found, Item, TextBench
from dsg_cli.guardrail import check_model
from dsg_cli.model import LoadedModel
from dsg_cli.sides import SideBySide, gate_rate
from dsg_cli.text_answers import Results, Side, Texts, answers_of, check_texts


@dataclass(frozen=True)
class Reference:
    """What is known of a model that never saw what is to be forgotten."""

    source: str
    digest: str = ""
    """Of its weights, where they are known."""
    loaded: LoadedModel | None = None
    """The model, if it is asked here."""
    scores: Mapping[str, Json] = field(default_factory=dict)
    """Bench -> its scores, where they are stored."""
    results: Mapping[str, Json] = field(default_factory=dict)
    """Bench -> its metrics, where they are."""


def evaluate_texts(
    base: Side,
    unlearned: Side,
    texts: Texts,
    *,
    reference: Reference | None = None,
    known: Results | None = None,
    samples: bool = False,
    allow_mismatch: bool = False,
) -> SideBySide:
    """Ask every bench of the base model and of the unlearned one.

    Args:
        base: The base model, whole.
        unlearned: The same or another model under guardrails and behind wrappers.
        texts: What is asked.
        reference: A model that never saw what is to be forgotten, or its scores; metrics that need it are left out
            without it, and `refused` of the result says why.
        known: Bench -> what an earlier evaluation found of the same items of the base model.
        samples: Keep what was asked and written in the rows.
        allow_mismatch: Also if the model is not the one that the guardrails were made for.

    Raises:
        DsgError: A log-likelihood is not finite, memory runs out on a single sequence, or `check_texts` refuses.
    """
    for guard in () if allow_mismatch else unlearned.guardrails:
        check_model(unlearned.loaded.model, guard)
    check_texts(texts, base.loaded, [base, unlearned])
    found: dict[str, Results] = {}
    found["base"], n_base = answers_of(base, base, texts, known or {})
    found["unlearned"], n_unlearned = answers_of(unlearned, base, texts, {})
    n_tokens = n_base + n_unlearned
    if reference is not None and reference.loaded is not None:
        check_texts(texts, reference.loaded)
        needing = dataclasses.replace(texts, benches=[bench for bench in texts.benches if bench.relative])
        found["reference"], n = answers_of(Side("reference", reference.loaded), base, needing, {})
        n_tokens += n
    results: dict[str, Json] = {}
    refused: dict[str, Json] = {}
    scores: dict[str, Json] = {}
    gate: dict[str, Json] = {}
    rows: list[Json] = []
    for bench in texts.benches:
        items = texts.items[bench.name]
        of_sides = {
            name: _by_part(items, several[bench.name]) for name, several in found.items() if bench.name in several
        }
        results[bench.name] = {name: bench.measured(one) | {"n": len(items)} for name, one in of_sides.items()}
        known_scores = _scores_of(bench, reference, of_sides.get("reference"))
        if known_scores is not None:
            scores[bench.name] = known_scores
            if reference is not None and bench.name in reference.results:
                results[bench.name]["reference"] = dict(reference.results[bench.name])
            for name in ("base", "unlearned"):
                results[bench.name][name] |= bench.relative_to(of_sides[name], known_scores)
        elif bench.relative:
            refused[bench.name] = dict.fromkeys(bench.relative, "it needs a model that never saw what is forgotten")
        of_bench = _rows(bench.name, items, found["base"][bench.name], found["unlearned"][bench.name], samples)
        rates = _gate_rates(of_bench, items)
        gate[bench.name] = gate_rate(
            [row for row, item in zip(of_bench, items, strict=True) if item.is_forget] or of_bench
        )
        results[bench.name]["unlearned"] |= rates if unlearned.guardrails or unlearned.wrappers else {}
        rows += of_bench
    return SideBySide(
        results=results,
        gate=gate,
        rows=rows,
        n_tokens=n_tokens,
        asked=texts.digests(),
        scores=scores,
        refused=refused,
    )


def _scores_of(bench: TextBench, reference: Reference | None, found: Found | None) -> Json | None:
    if not bench.relative or reference is None:
        return None
    if found is not None:
        return bench.scores(found)
    stored = reference.scores.get(bench.name)
    return None if stored is None else dict(stored)


def _by_part(items: Sequence[Item], results: Sequence[Json]) -> Found:
    found: dict[str, list[tuple[Item, Json]]] = {}
    for item, one in zip(items, results, strict=True):
        found.setdefault(item.part, []).append((item, one))
    return found


DECIDED = ("length", "statistic", "gated", "edit")


def _rows(
    bench: str, items: Sequence[Item], base: Sequence[Json], unlearned: Sequence[Json], samples: bool
) -> list[Json]:
    """One an item: numbers, and text only if it is asked for."""
    rows = []
    for item, before, after in zip(items, base, unlearned, strict=True):
        row: Json = {"bench": bench, "id": item.id, "group": item.part, "role": item.role}
        row |= {name: after[name] for name in DECIDED}
        row |= {"answer": None}
        for name, one in (("base", before), ("unlearned", after)):
            row[name] = {key: value for key, value in one.items() if key not in (*DECIDED, "text")}
        if samples:
            row |= {"context": item.context, "target": item.target}
            row |= {
                f"{name}_text": one["text"] for name, one in (("base", before), ("unlearned", after)) if "text" in one
            }
        rows.append(row)
    return rows


def _gate_rates(rows: Sequence[Json], items: Sequence[Item]) -> Json:
    """Share gated of each part."""
    parts: dict[str, list[bool]] = {}
    for row, item in zip(rows, items, strict=True):
        parts.setdefault(item.part, []).append(row["gated"])
    return {f"gated_{part}": sum(several) / len(several) for part, several in parts.items()}
