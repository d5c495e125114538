"""A new guardrail is tried on forget text before it is written: one that does nothing there is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Sequence

from torch import Tensor

from dsg_cli.artifacts import Guardrail, Header, Json, Threshold
from dsg_cli.corpora import Corpus, check_disjoint, load_corpora
from dsg_cli.effect import Effect, measure_effect
from dsg_cli.errors import DsgError
from dsg_cli.guardrail import module_from_artifact
from dsg_cli.model import LoadedModel, context_length
from dsg_cli.prompting import prompts
from dsg_cli.recipe import Recipe
from dsg_cli.stages.calibration_text import dev_questions
from dsg_cli.stages.tuning import tuning_questions
from dsg_cli.tokens import encode
from dsg_cli.workspace import Stored

ROWS = 64
"""Of forget text, on which the guardrail is tried."""
UNSEEN = (
    "No text on what is to be forgotten is known, so the guardrail was not tried: nobody has seen it fire. Try it with "
    "--forget CORPUS, or on dev questions (--set guardrail.tuning_bench=NAME)."
)


@dataclasses.dataclass(frozen=True)
class Trial:
    """On what a guardrail is tried, and whether it must do something there."""

    forget: Sequence[Corpus]
    longest: int
    """Tokens of a row, at most, BOS apart."""
    must_act: bool
    hint: str = "Select other features, calibrate at a higher --alpha or another --gate, or pass --allow-ineffective."
    """What to do about one that does nothing."""


def tried(
    loaded: LoadedModel, header: Header, body: Guardrail, tensors: dict[str, Tensor], trial: Trial
) -> tuple[Guardrail, int]:
    """The guardrail with what it did, and how many tokens it was tried on; as it is, if there is no text for that.

    Args:
        loaded: The model it was made for, whole or cut after the layer that it writes to.
        header: Its own; the seed says which rows are drawn.
        body: The guardrail.
        tensors: Its own.
        trial: On what.

    Raises:
        DsgError: It does nothing, and must.
    """
    if not trial.forget:
        return body, 0
    module = module_from_artifact(body, header.model, tensors, where="The new guardrail").to(loaded.model.device)
    rows = _rows(loaded, trial.forget, bos=body.bos, longest=trial.longest, seed=header.seed)
    effect = measure_effect(loaded, module, rows)
    if trial.must_act:
        check_effect(effect, trial.hint)
    return dataclasses.replace(body, effect=dataclasses.asdict(effect)), sum(map(len, rows))


def check_effect(effect: Effect, hint: str = "") -> None:
    """Refuse a guardrail that does nothing.

    Raises:
        DsgError: Its gate never fires on forget text, or its edit changes nothing there.
    """
    if effect.gate_rate and effect.changed_rate and effect.edit:
        return
    what = "its edit changes nothing" if effect.gate_rate else "its gate never fires"
    raise DsgError(f"The guardrail would guard nothing: on {effect.n_rows} rows of the forget corpus {what}.", hint)


def forget_text(made: Stored, names: Sequence[str]) -> tuple[list[Corpus], list[str]]:
    """The forget corpora of select as they are now, and a note on each that has changed since, or that there are none.

    Args:
        made: Features or a threshold, whose settings say how they were read.
        names: Of the corpora.

    Raises:
        DsgError: One cannot be read any more.
    """
    if not names:
        return [], [UNSEEN]
    settings = made.header.settings
    # Thresholds of earlier versions have only the names.
    described: dict[str, Json] = {name: {} for name in names}
    described |= {one["name"]: one for one in settings.get("forget", [])}
    forget = load_corpora(
        list(described),
        role="forget",
        limit=settings.get("forget_limit", settings["limit"]),
        seed=settings.get("forget_seed", made.header.seed),
        revisions={name: one["revision"] for name, one in described.items() if "revision" in one},
    )
    changed = [one.name for one in forget if one.sha256 != described[one.name].get("sha256", one.sha256)]
    return forget, [f"The forget corpus {name} has changed since select." for name in changed]


def text_instead(recipe: Recipe, threshold: Stored) -> tuple[list[Corpus], list[str]]:
    """What a guardrail is tried on if its features were picked without forget text, and notes.

    The forget corpora that apply is given; else dev questions, of the bench that a strength would be tuned on or of
    those that calibrate asked about; else nothing.

    Args:
        recipe: Names corpora and bench.
        threshold: Whose settings say which dev questions calibrate asked.

    Raises:
        DsgError: A corpus or bench cannot be read, or is retained.
    """
    names, settings = recipe.corpora.forget, threshold.header.settings
    if names:
        check_disjoint(names, threshold.body_as(Threshold).retain)
        return load_corpora(names, role="forget", limit=recipe.corpora.limit, seed=recipe.seed), []
    asked: dict[str, list[str]] = {}
    if recipe.guardrail.tuning_bench is not None:
        questions = tuning_questions(recipe, [])
        asked = {recipe.guardrail.tuning_bench: [question.context for question in questions]}
    elif settings.get("questions"):
        asked = dev_questions(dataclasses.replace(recipe.calibrate, questions=settings["questions"]), [])
    if not asked:
        return [], [UNSEEN]
    found = [
        Corpus(bench, texts, hashlib.sha256("\0".join(texts).encode()).hexdigest()) for bench, texts in asked.items()
    ]
    return found, [f"Tried on dev questions of {', '.join(asked)}, for want of a forget corpus."]


def _rows(
    loaded: LoadedModel, forget: Sequence[Corpus], *, bos: int | None, longest: int, seed: int
) -> list[list[int]]:
    """The beginnings of up to `ROWS` forget documents, those first that selection has not seen."""
    rng = random.Random(seed)
    texts: list[str] = []
    for part in ("calibrate", "fresh", "select"):
        more = [text for corpus in forget for text in prompts(loaded.tokenizer, corpus, part)]
        rng.shuffle(more)
        texts += more
        if len(texts) >= ROWS:
            break
    room = min(longest, context_length(loaded.model.config) - 1) + (bos is not None)
    return [row[:room] for row in encode(loaded.tokenizer, texts[:ROWS], bos=bos)]
