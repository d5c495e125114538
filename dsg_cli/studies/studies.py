"""One function a study: the rows of one point of its grid.

cost: a guarded and a plain forward pass take turns on the same tokens in one process, so that whatever else the machine
does falls on both; what is reported is the median of the ratios of pairs.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dsg_cli.data.batches import pad_rows
from dsg_cli.data.corpora import Corpus
from dsg_cli.data.tokens import special_ids
from dsg_cli.errors import DsgError
from dsg_cli.guardrail.guarded import guarded
from dsg_cli.guardrail.runtime.guardrail import GuardrailModule
from dsg_cli.lab.world import DOMAINS, build_world
from dsg_cli.models.language_model import context_length
from dsg_cli.studies import AXES
from dsg_cli.studies.sweep import (
    Statistics,
    Sweep,
    accuracy_row,
    accuracy_rows,
    gate_rows,
    guardrail_rows,
    median_row,
    rate_row,
    row_of,
)
from dsg_cli.workspace.body import Json

WARM_UP = 2
"""Pairs that are not counted."""


def rows_of_cost(point: Json, sweep: Sweep) -> list[Json]:
    """Seconds of both, and by how much of the plain one the guarded one takes longer."""
    loaded, length, batch_size = sweep.loaded, point["length"], point["batch_size"]
    longest = context_length(loaded.model.config)
    n_body = length - (sweep.base_at({}).bos is not None)
    if n_body < 1 or length > longest:
        raise DsgError(f"A pass over {length} tokens is not possible: the model reads {longest}, BOS among them.")
    rows = [piece.ids for piece in sweep.pieces("fresh", n_body, is_packed=True)]
    if not rows:
        raise DsgError(f"The retain text has no {length} tokens in a row.", "Give shorter lengths.")
    tokenizer, device = loaded.tokenizer, str(loaded.model.device)
    batch = pad_rows(
        [rows[i % len(rows)] for i in range(batch_size)], tokenizer.pad_token_id or 0, special_ids(tokenizer), device
    )
    module = sweep.guardrail(point).module
    plain, guarded_seconds = paired_seconds(
        loaded.model, module, batch.ids_BL, batch.mask_BL, repeats=sweep.recipe.study.repeats
    )
    return [
        median_row(point, "plain_seconds", plain),
        median_row(point, "guarded_seconds", guarded_seconds),
        median_row(point, "overhead", [b / a - 1 for a, b in zip(plain, guarded_seconds, strict=True)]),
    ]


@torch.inference_mode()
def paired_seconds(
    model: nn.Module, guard: GuardrailModule, ids_BL: Tensor, mask_BL: Tensor, *, repeats: int
) -> tuple[list[float], list[float]]:
    """Seconds of plain and of guarded forward passes over the same tokens, pair by pair; each goes first in turn."""

    def forward() -> float:
        begun = _now(ids_BL)
        model(input_ids=ids_BL, attention_mask=mask_BL.long(), use_cache=False)
        return _now(ids_BL) - begun

    def guarded_forward() -> float:
        # Putting hooks on is no part of a pass.
        with guarded(model, guard, allow_mismatch=True):
            return forward()

    plain: list[float] = []
    guarded_seconds: list[float] = []
    pairs: list[tuple[Callable[[], float], list[float]]] = [(forward, plain), (guarded_forward, guarded_seconds)]
    for number in range(WARM_UP + repeats):
        for run, seconds in pairs if number % 2 else reversed(pairs):
            seconds.append(run())
    return plain[WARM_UP:], guarded_seconds[WARM_UP:]


def _now(on: Tensor) -> float:
    """A clock that has waited for the device."""
    if on.is_cuda:
        torch.cuda.synchronize(on.device)
    return time.perf_counter()


@dataclass(frozen=True)
class Kept:
    """A share of the forget text."""

    corpora: list[Corpus]
    entities: list[str]
    """Those that it may name; all of them, by documents."""

    @property
    def n_documents(self) -> int:
        """Documents that select reads."""
        return sum(len(corpus.part("select")) for corpus in self.corpora)


def rows_of_data_efficiency(point: Json, sweep: Sweep) -> list[Json]:
    """The guardrail made with a share of the forget text; by entities, also on questions that name them."""
    seed = point.get("seed", sweep.recipe.seed)
    kept = share_of(sweep.forget, point["by"], point["share"], seed=seed, names=sweep.entities)
    point = point | {"n_documents": kept.n_documents, "n_entities": len(kept.entities)}
    base = sweep.base_on(kept.corpora)
    guardrail = sweep.guardrail({}, base)
    answers = sweep.accuracy([guardrail], base.bos)
    rows = [*accuracy_rows(point, answers), *gate_rows(point, guardrail)]
    if point["by"] == "documents":
        return rows
    naming = _naming(kept.entities)
    pairs = list(zip(answers[sweep.forget_bench], sweep.questions[sweep.forget_bench], strict=True))
    for metric, is_named in (("acc_named", True), ("acc_not_named", False)):
        if own := [outcome for outcome, question in pairs if bool(naming.search(question.context)) == is_named]:
            rows.append(accuracy_row(point, sweep.forget_bench, own, metric=metric))
    return rows


def share_of(corpora: Sequence[Corpus], by: str, share: float, *, seed: int, names: Sequence[str]) -> Kept:
    """A share of forget corpora, in percent of their `documents` or `entities`; at least one of them is kept.

    The seed is of the order in which they are taken. Names that no document has do not count as entities.
    """
    texts = [text for corpus in corpora for text in corpus.part("select")]
    named = {text: set(_naming(names).findall(text)) for text in texts} if names else {}
    entities = sorted(set().union(*named.values()))
    if by == "entities":
        if not entities:
            raise DsgError(
                "No document names an entity that is known.",
                "Give their names, one a line: --set study.entities_file=FILE.",
            )
        entities = _taken(entities, share, seed)
        left = {text for text in texts if named[text] and named[text] <= set(entities)}
    else:
        left = {text for corpus in corpora for text in _taken(corpus.part("select"), share, f"{seed}/{corpus.name}")}
    if not left:
        raise DsgError(
            f"At {share:g} % of the {by} no document is left.", "Take a larger share, or give more forget text."
        )
    kept = []
    for corpus in corpora:
        if texts := [text for text in corpus.texts if text in left]:
            digests = "".join(hashlib.sha256(text.encode()).hexdigest() for text in texts)
            kept.append(replace(corpus, texts=texts, sha256=hashlib.sha256(digests.encode()).hexdigest()))
    return Kept(kept, entities)


def known_names(corpora: Sequence[str]) -> list[str]:
    """Entities that corpora of the lab are about."""
    world = build_world()
    return [name for domain in DOMAINS if f"lab-{domain.name}" in corpora for name in world.entities(domain.name)]


def _taken(values: Sequence[str], share: float, seed: object) -> list[str]:
    order = list(dict.fromkeys(values))
    random.Random(f"share/{seed}").shuffle(order)
    return order[: max(1, math.ceil(round(len(order) * share / 100, 9)))]


def _naming(names: Sequence[str]) -> re.Pattern[str]:
    """What finds names in a text; the longer of two that begin alike."""
    return re.compile(r"\b(?:" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + r")\b")


def rows_of_seeds(point: Json, sweep: Sweep) -> list[Json]:
    """The guardrail on the SAE and the data of a point, on every bench; `hook` and `n_in_sae` say which SAE it is."""
    base = sweep.base_at({AXES[name].key: point[name] for name in ("sae", "seed") if name in point})
    identity = base.sae.identity
    return guardrail_rows(point | {"hook": identity.hook, "n_in_sae": identity.n_features}, sweep, base)


rows_of_layers = rows_of_seeds  # `hook` says which layer it is.


def rows_of_length(point: Json, sweep: Sweep) -> list[Json]:
    """What the gate does with text of one length; a length that can set no threshold of its own says why."""
    threshold = sweep.guardrail(point).threshold
    seen = {part: sweep.statistics(point, part, point["length"]) for part in ("calibrate", "fresh", "forget")}
    if not seen["fresh"]:
        raise DsgError(f"No document of the retain text has {point['length']} tokens.", "Give shorter lengths.")
    rows = [_share(point, "false_positive_rate", seen["fresh"], threshold)]
    if seen["forget"]:
        rows.append(_share(point, "forget_gate_rate", seen["forget"], threshold))
    try:
        own = sweep.threshold(point, seen["calibrate"], sweep.base_at({}))
    except DsgError as error:
        return [*rows, row_of(point, "threshold", error=error.message)]
    return [*rows, row_of(point, "threshold", value=own), _share(point, "own_false_positive_rate", seen["fresh"], own)]


def _share(point: Json, metric: str, seen: Statistics, threshold: float) -> Json:
    return rate_row(point, metric, sum(statistic > threshold for _, statistic in seen), len(seen))


def rows_of_sequential(point: Json, sweep: Sweep) -> list[Json]:
    """What acts after so many requests, on the bench of every request and on all others."""
    corpora, is_union = sweep.recipe.corpora, point["way"] == "union"
    requests = [*(name.partition("=")[0] for name in corpora.forget[:1]), *sweep.recipe.study.sequence]
    guardrails = []
    for number in [point["requests"]] if is_union else range(1, point["requests"] + 1):
        met = requests[:number]
        retain = [name for name in corpora.retain if name.partition("=")[0] not in met]
        base = sweep.base_at({"corpora.forget": met if is_union else met[-1:], "corpora.retain": retain})
        guardrails.append(sweep.guardrail(point, base))
    return accuracy_rows(point, sweep.accuracy(guardrails, guardrails[0].base.bos))


def rows_of_stability(point: Json, sweep: Sweep) -> list[Json]:
    """The guardrail of a point, on every bench."""
    return guardrail_rows(point, sweep, sweep.base_at({}))
