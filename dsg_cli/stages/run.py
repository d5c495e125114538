"""`dsg run` and `dsg demo`: the whole chain from one recipe, through the same stage functions as the commands.

`--dry-run` says what would be done, after the same checks and without a download.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from dsg_cli.attacks import expand_attacks
from dsg_cli.data.catalogue import HubText
from dsg_cli.data.corpora import check_disjoint, check_named, parse_name
from dsg_cli.data.hub import REPOSITORY, download_size
from dsg_cli.errors import DsgError, close_to
from dsg_cli.evals import PAPER, is_free, known_benches, task_name
from dsg_cli.evals.benches import load_free, load_tasks, metrics_of, task_index
from dsg_cli.evals.expect import check_metrics, parse_expected
from dsg_cli.evals.paper_protocol import load_paper_questions
from dsg_cli.evals.questions import check_bench
from dsg_cli.inspection.neuronpedia import INSTEAD, place_of
from dsg_cli.lab import data as lab
from dsg_cli.models.language_model import SMALL_FILES, WEIGHT_FILES
from dsg_cli.models.releases import locate_release
from dsg_cli.models.sae import check_name
from dsg_cli.settings import Recipe
from dsg_cli.stages import apply, attack, calibrate, evaluate, select, unlearn
from dsg_cli.stages.stage import QUIET, RunOptions
from dsg_cli.workspace.files import is_file, is_folder
from dsg_cli.workspace.store import Stored, Workspace


def run(
    recipe: Recipe, workspace: Workspace, *, options: RunOptions = QUIET, done: Callable[[Stored], Any] = lambda _: None
) -> list[Stored]:
    """Select, calibrate, apply, evaluate and attack; each stage reads the artifact that the one before it wrote.

    If the recipe says what to finetune on (`methods.finetune.corpora`), the model is trained on that first, and all
    that follows is on the result. A run that goes on takes the artifacts that are there; `done` is called with each.
    """
    check_recipe(recipe)
    check_data(recipe)
    chain: list[Stored] = []

    def keep(stored: Stored) -> str:
        chain.append(stored)
        done(stored)
        return str(stored.path)

    options = dataclasses.replace(options, reuse=options.reuse or options.resume)
    if recipe.methods.finetune.corpora:
        check_name(recipe.sae.source)  # Now, not after the training.
        keep(unlearn.run(recipe, workspace, "finetune", options=options))
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, source=chain[-1].id))
    features = keep(select.run(recipe, workspace, options=options))
    threshold = keep(calibrate.run(recipe, workspace, source=features, options=options))
    guardrail = keep(apply.run(recipe, workspace, source=threshold, options=options))
    keep(evaluate.run(recipe, workspace, sources=[guardrail], options=options))
    if recipe.attack.kinds:
        for stored in attack.run(recipe, workspace, recipe.attack.kinds, sources=[guardrail], options=options):
            keep(stored)
    return chain


def check_recipe(recipe: Recipe) -> None:
    """Refuse what no stage could do, without a download."""
    for role, names in (("forget", recipe.corpora.forget), ("retain", recipe.corpora.retain)):
        if names or role == "retain" or not select.is_picked(recipe.select):
            check_named(names, role=role)
    for name in recipe.methods.finetune.corpora:
        parse_name(name)
    check_disjoint(recipe.corpora.forget, recipe.corpora.retain)
    if not recipe.eval.benches:
        raise DsgError("The recipe names no bench.", "Add eval.benches.")
    for bench in recipe.eval.benches:
        # Others may be lm-eval's, or in a folder of the user's own.
        alike = close_to(bench, known_benches())
        is_unknown = bench not in known_benches() and not is_free(bench) and not recipe.eval.include_path
        if is_unknown and alike and task_name(bench) not in task_index((), True).all_tasks:
            raise DsgError(f"There is no bench named {bench}.", f"Did you mean {' or '.join(alike)}?")
    kinds = expand_attacks(recipe.attack.kinds) if recipe.attack.kinds else []
    for text in recipe.attack.expect:
        parse_expected(text, kinds)
    apply.check_strength(recipe.guardrail)
    for text in recipe.eval.expect:
        parse_expected(text, recipe.eval.benches)


def check_data(recipe: Recipe) -> None:
    """Load the questions of every bench, and refuse conditions on what they do not measure."""
    settings = recipe.eval
    of_attacks = {name for name in (recipe.attack.bench, recipe.attack.utility_bench) if name}
    for name in of_attacks:
        check_bench(name)
    benches = [*settings.benches, *sorted(of_attacks - set(settings.benches))]
    tasks = load_tasks(
        [bench for bench in benches if bench not in PAPER and not is_free(bench)],
        split=settings.split,
        include_path=settings.include_path,
        can_generate=recipe.calibrate.gate != "mean",
    )
    free, _ = load_free(
        settings.benches, split=settings.split, limit=settings.limit, holdout=settings.holdout, seed=recipe.seed
    )
    expected = [parse_expected(text, settings.benches) for text in settings.expect]
    check_metrics(expected, metrics_of(tasks) | {bench.name: set(bench.metrics) for bench in free})
    for bench in settings.benches:
        if bench in PAPER:
            load_paper_questions(bench)


UNKNOWN = "size unknown: the hub cannot be reached"

QUESTIONS = {
    "wmdp-bio": 1273,
    "wmdp-cyber": 1987,
    "wmdp-chem": 408,
    "mmlu": 14042,
    "wmdp-bio-paper": 1273,
    "wmdp-cyber-paper": 1987,
    "mmlu-paper": 725,
    "mmlu-paper-cyber": 769,
}
"""Questions of the benches with names of ours, as published."""


@dataclass(frozen=True)
class Step:
    """One thing that a run would do."""

    stage: str
    verb: Literal["read", "compute", "write"]
    what: str
    size: str

    def line(self) -> str:
        return f"{self.stage:<10} {self.verb:<8} {self.what}  [{self.size}]"


def plan(recipe: Recipe) -> list[Step]:
    """Every step of a run, after the checks that need no download."""
    check_recipe(recipe)
    return list(_steps(recipe))


def _steps(recipe: Recipe) -> Iterator[Step]:
    model, corpora = recipe.model.source, recipe.corpora
    finetune = recipe.methods.finetune
    if finetune.corpora:
        yield Step("finetune", "read", f"model {model}", _model_size(model))
        for name in finetune.corpora:
            yield Step("finetune", "read", f"corpus {name}", _corpus_size(name, finetune.limit))
        length = f"{finetune.steps:,} steps" if finetune.steps else f"{finetune.epochs:g} epochs"
        yield Step("finetune", "compute", f"training of {'adapters' if finetune.lora else finetune.trained}", length)
        size = "an adapter" if finetune.lora else "as large as the model"
        yield Step("finetune", "write", "model-NNN: what all that follows is on", size)

    yield Step("select", "read", f"model {model}, up to the SAE's layer", _model_size(model))
    yield Step("select", "read", f"SAE {recipe.sae.source}", _sae_size(recipe.sae.source))
    if recipe.select.describe is not None:
        yield Step("select", "read", *_descriptions(recipe))
    for role, names in (("forget", corpora.forget), ("retain", corpora.retain)):
        for name in names:
            yield Step("select", "read", f"{role} corpus {name}", _corpus_size(name, corpora.limit))
    n_tokens = recipe.select.max_rows * recipe.select.seq_len * (2 if corpora.forget else 1)
    yield Step("select", "compute", "one pass over each corpus's select part", f"at most {n_tokens:,} tokens")
    yield Step("select", "write", "features-NNN: six statistics of every feature", "48 bytes a feature of the SAE")

    gate, lengths, n_rows = recipe.calibrate.gate, recipe.calibrate.lengths, 2 * recipe.calibrate.max_pieces
    pieces = f"gate {gate} on pieces of {lengths[0]} to {lengths[1]} tokens"
    yield Step("calibrate", "compute", pieces, f"about {n_rows * sum(lengths) // 2:,} tokens at most")
    yield Step("calibrate", "write", "threshold-NNN, a row a piece", f"at most {n_rows:,} rows")

    n_detectors = recipe.calibrate.n_detectors if gate == "window" else 0
    n_features = (len(recipe.select.features) or recipe.select.n_features) + n_detectors
    what = f"guardrail-NNN: {n_features} features, clamped to -{recipe.guardrail.strength}"
    yield Step("apply", "write", what, f"{8 * n_features} bytes times the model's width, about")

    for bench in recipe.eval.benches:
        n = QUESTIONS.get(bench)
        if bench in lab.bench_names():
            n = len(lab.read_questions(bench, recipe.eval.split))
        size = "size unknown before it is read" if n is None else f"{min(n, recipe.eval.limit or n):,} questions"
        how = "24 orders until one fails, chat prompt" if bench in PAPER else "through lm-eval"
        how = "written and read" if is_free(bench) else how
        yield Step("eval", "compute", f"{bench}, base and guarded, {how}", size)
    yield Step("eval", "write", "eval-NNN, a row a question, and lm-eval's own results", "about 300 bytes a question")

    for kind in expand_attacks(recipe.attack.kinds) if recipe.attack.kinds else ():
        yield Step("attack", "compute", f"{kind}, guarded and unguarded", "every forget question at every point")
        yield Step("attack", "write", "attack-NNN", "a few kB")


def _descriptions(recipe: Recipe) -> tuple[str, str]:
    what, file = f"descriptions of features, for {recipe.select.describe!r}", recipe.select.descriptions
    if file is not None:
        size = _local_size(Path(file)) if is_file(Path(file)) else "not there yet: dsg describe makes it"
        return f"{what}: {file}", size
    name = place_of(recipe.sae.source)
    if name is None:
        raise DsgError(f"Nobody is known to have described the features of {recipe.sae.source}.", INSTEAD)
    return f"{what}: neuronpedia:{name}", "a few MB, unless they are in the cache"


def _model_size(source: str) -> str:
    if re.fullmatch(r"model-\d+", source):
        return "size unknown before it is there"
    if source in lab.MODEL_DIRS or is_folder(Path(source)):
        return _local_size(lab.MODEL_DIRS.get(source, Path(source)))
    if not REPOSITORY.fullmatch(source):
        raise DsgError(f"No model folder at {source}.", "Give a folder, org/name on the hub, or `lab`.")
    return _reached(lambda: download_size(source, (*SMALL_FILES, *WEIGHT_FILES)))


def _sae_size(source: str) -> str:
    if source in lab.SAE_DIRS or is_folder(Path(source)):
        return _local_size(lab.SAE_DIRS.get(source, Path(source)))
    repo, folder = locate_release(source)
    return _reached(lambda: download_size(repo, [f"{folder}/*"] if folder else ["*"]))


def _corpus_size(name: str, limit: int | None) -> str:
    named = parse_name(name)
    at_most = "" if limit is None else f"at most {limit:,} documents; "
    if named.path is not None:
        return at_most + _local_size(named.path)
    hub: HubText | None = named.hub
    assert hub is not None
    size = partial(download_size, hub.repo, kind="dataset")
    own = [f"{hub.config}*"] if hub.config else []
    return at_most + _reached(lambda: (size(own) if own else 0) or size(["*"]))


def _local_size(path: Path) -> str:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return _spelled(sum(file.stat().st_size for file in files))


def _reached(measure: Callable[[], int]) -> str:
    """A size in words; that the hub cannot be reached is no error here, all else is."""
    try:
        return _spelled(measure())
    except DsgError as error:
        if "cannot be reached" in error.message:
            return UNKNOWN
        raise


def _spelled(n_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000 or unit == "GB":
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    raise AssertionError
