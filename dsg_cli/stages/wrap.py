"""`dsg apply --method` for methods that leave the model as it is: a text in front of prompts, or a filter.

Takes corpora and model from a selection or from the recipe, makes the wrapper (methods/), and writes wrapper-NNN.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsg_cli.data.corpora import COMPOSED
from dsg_cli.data.readers import read_prompts
from dsg_cli.data.tokens import encode
from dsg_cli.errors import DsgError
from dsg_cli.evals.benches import Question, commits, load_tasks, questions_of
from dsg_cli.inference.wrappers import read_keywords
from dsg_cli.lab import data as lab
from dsg_cli.methods import check_method, load_method, section_of
from dsg_cli.methods.wrappers import Made, Material, topic_of
from dsg_cli.models.language_model import LoadedModel, context_length, read_config, text_config
from dsg_cli.settings import Filter, InContext, Recipe
from dsg_cli.stages.calibrate import lengths_of
from dsg_cli.stages.inputs import Material as Sources
from dsg_cli.stages.inputs import find_material, identify, load_whole, taken_from
from dsg_cli.stages.stage import QUIET, RunOptions, new_header, settle
from dsg_cli.workspace.files import file_digest
from dsg_cli.workspace.provenance import Clock
from dsg_cli.workspace.results import Json
from dsg_cli.workspace.store import Stored, Workspace


def run(
    recipe: Recipe, workspace: Workspace, method: str, *, origin: Stored | None = None, options: RunOptions = QUIET
) -> Stored:
    """Make a wrapper and write it.

    Args:
        recipe: Settings.
        workspace: Where it is written.
        method: `prompt`, `in-context`, `input-filter` or `output-filter`.
        origin: Features or a model, whose model and corpora are taken.
        options: How it is run.
    """
    assert check_method(method).form == "wrapper"
    return options.write(workspace, lambda: _made(recipe, workspace, method, origin, options))


@dataclass(frozen=True)
class _Read:
    """All that was read before the model."""

    material: Sources
    questions: dict[str, list[list[Question]]] = field(default_factory=dict)
    settings: Json = field(default_factory=dict)
    """What the header says of it."""
    notes: list[str] = field(default_factory=list)


def _made(recipe: Recipe, workspace: Workspace, method: str, origin: Stored | None, options: RunOptions) -> Stored:
    clock = Clock()
    settings: Any = getattr(recipe.methods, section_of(method))
    workspace.check_writable()
    recipe = taken_from(recipe, origin)
    sources = find_material(recipe, workspace, method, origin, reads_text=isinstance(settings, Filter))
    read = _read(recipe, method, settings, sources)
    recipe = settle(recipe, origin.header if origin is not None else None)
    loaded = load_whole(sources, recipe, dtype=recipe.model.dtype)
    header = new_header(
        "wrapper",
        recipe,
        settings={"method": method, **dataclasses.asdict(settings), **read.settings},
        model=identify(loaded, loaded.n_layers - 1),
        sae=None,
        inputs=sources.inputs,
        notes=[*sources.notes, *read.notes],
    )
    if options.reuse and (stored := workspace.matching(header)) is not None:
        return stored
    made: Made = load_method(method)(settings, _material(recipe, read, loaded, options))
    options.report("wrapper", 1, 1)
    header = dataclasses.replace(header, notes=[*header.notes, *made.notes])
    return workspace.write(clock.close(header, n_tokens=made.n_tokens), made.body, tensors=made.tensors)


def _read(recipe: Recipe, method: str, settings: Any, sources: Sources) -> _Read:
    """Questions, as far as the method needs them; everything checked that needs no weights."""
    if isinstance(settings, Filter):
        return _for_filter(recipe, method, settings, sources)
    if isinstance(settings, InContext):
        return _for_examples(recipe, settings, sources)
    topic_of(settings, _topic(sources.names["forget"]))
    return _Read(sources, settings=dict(sources.names))


def _for_filter(recipe: Recipe, method: str, settings: Filter, sources: Sources) -> _Read:
    config = read_config(sources.model, recipe.model)
    n_layers = int(text_config(config).num_hidden_layers)
    if settings.layer is not None and settings.layer >= n_layers:
        raise DsgError(
            f"methods.{section_of(method)}.layer is {settings.layer} (counted from 0), but the model has {n_layers} "
            "layers."
        )
    said: Json = {"lengths": recipe.calibrate.lengths, "max_pieces": recipe.calibrate.max_pieces}
    if settings.keywords_file is not None:
        read_keywords(settings.keywords_file)
        said["keywords_sha256"] = file_digest(Path(settings.keywords_file))
    if recipe.calibrate.lengths_from is not None:
        read_prompts((), Path(recipe.calibrate.lengths_from))
        said["lengths_sha256"] = file_digest(Path(recipe.calibrate.lengths_from))
    return _Read(sources, settings={**said, **sources.described(), "limit": recipe.corpora.limit})


def _for_examples(recipe: Recipe, settings: InContext, sources: Sources) -> _Read:
    """Questions to be shown, and a note where they are ones that may be reported."""
    said: Json = dict(sources.names)
    forget = [settings.forget_bench] if settings.forget_bench else _benches(sources.names["forget"])[:1]
    retain = (settings.retain_benches or _benches(sources.names["retain"])) if settings.n_retain else []
    wanted = ((forget, "forget", "forget_bench=NAME"), (retain, "retain", "retain_benches=[NAME]"))
    for benches, role, setting in wanted[: 1 + bool(settings.n_retain)]:
        if not benches:
            raise DsgError(
                f"No bench says which {role} questions are shown in context.",
                f"Give --set methods.in_context.{setting}, or name a corpus of the lab with --{role}.",
            )
    questions: dict[str, list[list[Question]]] = {"forget": [], "retain": []}
    read: dict[str, str] = {}
    for role, benches in (("forget", forget), ("retain", retain)):
        for bench in benches:
            tasks = load_tasks([bench], split="dev", include_path=recipe.eval.include_path)
            questions[role].append([question for task in tasks for question in questions_of(task)])
            read |= commits(tasks)
    shown = [bench for bench in (*forget, *retain) if bench not in lab.bench_names()]
    notes = [f"Questions of {', '.join(shown)} are in its text; they should not be reported."] if shown else []
    said = {**said, "forget_bench": forget[0], "retain_benches": list(retain), "commits": read}
    return _Read(sources, questions=questions, settings=said, notes=notes)


def _benches(names: Sequence[str]) -> list[str]:
    """The lab's benches named like corpora, or like what they are composed of."""
    return [part for name in names for part in COMPOSED.get(name, (name,)) if part in lab.bench_names()]


def _topic(names: Sequence[str]) -> str:
    """What corpora are about, as far as their names say it: of files and data sets the last part of the name."""
    stems = [re.split(r"[:#@]", name.removeprefix("hf:"))[0].rsplit("/", 1)[-1] for name in names]
    return " and ".join(Path(stem).stem for stem in stems)


def _material(recipe: Recipe, read: _Read, loaded: LoadedModel, options: RunOptions) -> Material:
    sources = read.material
    return Material(
        loaded=loaded,
        bos=sources.bos,
        topic=_topic(sources.names["forget"]),
        forget=sources.forget,
        retain=sources.retain,
        forget_names=sources.names["forget"],
        retain_names=sources.names["retain"],
        forget_questions=read.questions.get("forget", [[]])[0],
        retain_questions=read.questions.get("retain", []),
        lengths=_lengths(recipe, loaded, sources.bos) if sources.forget else (),
        max_pieces=recipe.calibrate.max_pieces,
        batch_size=recipe.eval.batch_size,
        seed=recipe.seed,
        report=options.report,
    )


def _lengths(recipe: Recipe, loaded: LoadedModel, bos: int | None) -> list[int]:
    """Of pieces, as `dsg calibrate` cuts them, as far as the model can read them."""
    settings = dataclasses.replace(recipe.calibrate, gate="mean")  # No window, which pieces would have to fill.
    prompts = read_prompts((), Path(settings.lengths_from)) if settings.lengths_from else []
    lengths = lengths_of(settings, encode(loaded.tokenizer, prompts, bos=None))
    room = context_length(loaded.model.config) - (bos is not None)
    if min(lengths) > room:
        raise DsgError(f"Pieces of {min(lengths)} tokens do not fit: the model reads {room}.", "Lower --lengths.")
    return [min(length, room) for length in lengths]
