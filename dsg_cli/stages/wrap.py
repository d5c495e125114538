"""`dsg apply --method` for methods that leave the model as it is: a text in front of prompts, or a filter.

Takes corpora and model from a selection or from the recipe, makes the wrapper (methods/), and writes wrapper-NNN.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsg_cli.data.corpora import COMPOSED
from dsg_cli.data.readers import read_prompts
from dsg_cli.errors import DsgError
from dsg_cli.evals.benches import commits, load_tasks
from dsg_cli.evals.questions import Question, questions_of
from dsg_cli.inference.scoring import GuardedModel
from dsg_cli.inference.wrappers import read_keywords
from dsg_cli.lab import data as lab
from dsg_cli.methods import check_method, load_method, section_of
from dsg_cli.methods.wrappers import WrapperInputs, WrapperResult, topic_of
from dsg_cli.models.language_model import read_config, text_config
from dsg_cli.settings import Filter, InContext, Recipe
from dsg_cli.stages.calibrate import piece_lengths
from dsg_cli.stages.inputs import identify, load_whole, read_method_inputs, taken_from
from dsg_cli.stages.stage import QUIET, RunOptions, settle, stage
from dsg_cli.workspace.body import Json
from dsg_cli.workspace.files import file_digest
from dsg_cli.workspace.provenance import Clock
from dsg_cli.workspace.store import Stored, Workspace


def run(
    recipe: Recipe, workspace: Workspace, method: str, *, origin: Stored | None = None, options: RunOptions = QUIET
) -> Stored:
    """Make a wrapper and write it; model and corpora are those of `origin`, features or a model, if there is one."""
    assert check_method(method).form == "wrapper"
    if options.workers.n > 1:
        return options.by_first(workspace, lambda alone: run(recipe, workspace, method, origin=origin, options=alone))
    clock = Clock()
    settings: Any = getattr(recipe.methods, section_of(method))
    workspace.check_writable()
    recipe = taken_from(recipe, origin)
    inputs = read_method_inputs(recipe, workspace, method, origin, reads_text=isinstance(settings, Filter))
    topic = _topic(inputs.names["forget"])
    described: Json = dict(inputs.names)
    questions: dict[str, list[list[Question]]] = {"forget": [[]], "retain": []}
    lengths_from: list[str] = []
    notes = [*inputs.notes]
    if isinstance(settings, Filter):
        n_layers = int(text_config(read_config(inputs.model, recipe.model)).num_hidden_layers)
        if settings.layer is not None and settings.layer >= n_layers:
            raise DsgError(
                f"methods.{section_of(method)}.layer is {settings.layer} (counted from 0), but the model has "
                f"{n_layers} layers."
            )
        described = {"lengths": recipe.calibrate.lengths, "max_pieces": recipe.calibrate.max_pieces}
        if settings.keywords_file is not None:
            read_keywords(settings.keywords_file)
            described["keywords_sha256"] = file_digest(Path(settings.keywords_file))
        if recipe.calibrate.lengths_from is not None:
            lengths_from = read_prompts((), Path(recipe.calibrate.lengths_from))
            described["lengths_sha256"] = file_digest(Path(recipe.calibrate.lengths_from))
        described |= {**inputs.described(), "limit": recipe.corpora.limit}
    elif isinstance(settings, InContext):
        benches = _benches_to_show(settings, inputs.names)
        questions, shown_commits = _load_questions(recipe, benches)
        described |= {"forget_bench": benches["forget"][0], "retain_benches": benches["retain"]}
        described["commits"] = shown_commits
        others = [bench for names in benches.values() for bench in names if bench not in lab.bench_names()]
        if others:
            notes.append(f"Questions of {', '.join(others)} are in its text; they should not be reported.")
    else:
        topic_of(settings, topic)
    recipe = settle(recipe, origin.header if origin is not None else None)
    loaded = load_whole(inputs, recipe, dtype=recipe.model.dtype)
    header_settings: Json = {"method": method, **dataclasses.asdict(settings), **described}
    artifacts, model = inputs.artifacts, identify(loaded, loaded.n_layers - 1)
    with stage(
        "wrapper", recipe, workspace, options, clock, header_settings, inputs=artifacts, model=model, notes=notes
    ) as this:
        if this.existing:
            return this.existing
        # No window, which pieces would have to fill.
        calibrate = dataclasses.replace(recipe.calibrate, gate="mean")
        wrapper_inputs = WrapperInputs(
            model=GuardedModel(loaded.model, loaded.tokenizer, inputs.bos, batch_size=recipe.eval.batch_size),
            topic=topic,
            forget=inputs.corpora["forget"],
            retain=inputs.corpora["retain"],
            forget_names=inputs.names["forget"],
            retain_names=inputs.names["retain"],
            forget_questions=questions["forget"][0],
            retain_questions=questions["retain"],
            lengths=piece_lengths(calibrate, loaded, lengths_from, bos=inputs.bos) if inputs.corpora["forget"] else (),
            max_pieces=recipe.calibrate.max_pieces,
            seed=recipe.seed,
            job=this.job,
        )
        wrapper: WrapperResult = load_method(method)(wrapper_inputs, settings)
        this.job.progress("wrapper", 1, 1)
        return this.write(wrapper.body, n_tokens=wrapper.n_tokens, notes=wrapper.notes, tensors=wrapper.tensors)


def _topic(names: Sequence[str]) -> str:
    """What corpora are about, as far as their names say it: of files and data sets the last part of the name."""
    stems = [re.split(r"[:#@]", name.removeprefix("hf:"))[0].rsplit("/", 1)[-1] for name in names]
    return " and ".join(Path(stem).stem for stem in stems)


def _benches_to_show(settings: InContext, names: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Role -> the benches whose dev questions are shown in context: those named, or the lab's on the corpora."""
    forget = [settings.forget_bench] if settings.forget_bench else _lab_benches(names["forget"])[:1]
    retain = (settings.retain_benches or _lab_benches(names["retain"])) if settings.n_retain else []
    needed = (("forget", forget, "forget_bench=NAME"), ("retain", retain, "retain_benches=[NAME]"))
    for role, benches, setting in needed[: 1 + bool(settings.n_retain)]:
        if not benches:
            raise DsgError(
                f"No bench says which {role} questions are shown in context.",
                f"Give --set methods.in_context.{setting}, or name a corpus of the lab with --{role}.",
            )
    return {"forget": forget, "retain": list(retain)}


def _load_questions(
    recipe: Recipe, benches: Mapping[str, Sequence[str]]
) -> tuple[dict[str, list[list[Question]]], dict[str, str]]:
    """Role -> dev questions of each of its benches; and the commits of their data."""
    questions: dict[str, list[list[Question]]] = {role: [] for role in benches}
    data_commits: dict[str, str] = {}
    for role, names in benches.items():
        for bench in names:
            tasks = load_tasks([bench], split="dev", include_path=recipe.eval.include_path)
            questions[role].append([question for task in tasks for question in questions_of(task)])
            data_commits |= commits(tasks)
    return questions, data_commits


def _lab_benches(names: Sequence[str]) -> list[str]:
    """The lab's benches named like corpora, or like what they are composed of."""
    return [part for name in names for part in COMPOSED.get(name, (name,)) if part in lab.bench_names()]
