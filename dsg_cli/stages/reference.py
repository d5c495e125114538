"""A model that never saw what is to be forgotten: asked here, or its scores from where they are stored."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsg_cli.artifacts import EvalReport, Json
from dsg_cli.errors import DsgError, nearest
from dsg_cli.integrity import is_file, parse_json
from dsg_cli.model import LoadedModel, load_model, load_tokenizer, whole_digest
from dsg_cli.recipe import Recipe
from dsg_cli.stages.material import named_model
from dsg_cli.text_evaluation import Reference
from dsg_cli.workspace import Workspace

FORM = 'Write {"muse-news": {"auc": 0.47}} or {"tofu-forget10": {"truth_ratios": [0.8, ...]}}.'


def find_reference(recipe: Recipe, workspace: Workspace, asked: Mapping[str, str]) -> Reference | None:
    """What `eval.reference` means; no weights are loaded yet.

    Args:
        recipe: Names it.
        workspace: Where evaluations and models are.
        asked: Bench that needs a reference -> digest of all that is asked.

    Raises:
        DsgError: It is named and no bench needs it; no such model or file; scores of another form, for other benches,
            or of other questions.
    """
    named = recipe.eval.reference
    if named is None:
        return None
    if not asked:
        raise DsgError("No bench that is run needs eval.reference.", "Leave it out, or add a bench of MUSE or TOFU.")
    if named.startswith("eval-") or named.endswith(".json"):
        return _stored(named, workspace, asked)
    source = named_model(workspace, named)
    try:
        load_tokenizer(source, trust_remote_code=recipe.model.trust_remote_code)
    except DsgError as error:
        hint = "Give --reference a model, an evaluation (eval-NNN) or a .json file of scores."
        raise DsgError(f"The reference {named} cannot be read. {error.message}", hint) from error
    return Reference(source)


def load_reference(reference: Reference, recipe: Recipe, like: LoadedModel) -> Reference:
    """The reference with its model, where it is one.

    Raises:
        DsgError: It cannot be loaded, or reads other tokens than the model that is evaluated.
    """
    if reference.scores:
        return reference
    loaded = load_model(
        reference.source,
        device=recipe.model.device,
        dtype=recipe.model.dtype,
        device_map=recipe.model.device_map,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    if loaded.tokenizer.get_vocab() != like.tokenizer.get_vocab():
        raise DsgError(
            f"{reference.source} and {like.source} read different tokens, so that their scores cannot be compared.",
            "Name a model that was trained from the same base.",
        )
    return dataclasses.replace(reference, loaded=loaded, digest=whole_digest(loaded.model))


def _stored(named: str, workspace: Workspace, asked: Mapping[str, str]) -> Reference:
    path = Path(named)
    held: Any = None
    report: EvalReport | None
    if not named.endswith(".json"):
        report = workspace.find("eval", named).body_as(EvalReport)
    else:
        if not is_file(path):
            raise DsgError(f"There is no file {named} (eval.reference).")
        try:
            held = parse_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DsgError(f"The reference scores in {named} cannot be read: {error}.") from error
        if not isinstance(held, dict):
            raise DsgError(f"{named} holds no scores of a reference.", FORM)
        report = workspace.read(named).body_as(EvalReport) if held.get("kind") == "eval" else None
    if report is None:
        return Reference(named, scores={bench: _checked(named, bench, held) for bench in asked})
    if not report.reference:
        raise DsgError(f"{named} was made without a reference.", "Name an evaluation that asked one, or a model.")
    for bench, digest in asked.items():
        if bench in report.asked and report.asked[bench] != digest:
            raise DsgError(
                f"{named} asked other questions of {bench}: another limit, split, prompt or revision of the data.",
                "Ask the reference model itself: --reference MODEL.",
            )
    scores = {bench: _checked(named, bench, report.reference["scores"]) for bench in asked}
    results = {bench: sides["reference"] for bench, sides in report.results.items() if "reference" in sides}
    return Reference(report.reference["source"], report.reference["digest"], None, scores, results)


def _checked(where: str, bench: str, held: Mapping[str, Any]) -> Json:
    """The scores of a bench.

    Raises:
        DsgError: There are none, or they are no scores.
    """
    if bench not in held:
        raise DsgError(f"{where} has no scores for {bench}.", nearest(bench, map(str, held)))
    scores = held[bench]
    values = [scores.get("auc")] if isinstance(scores, dict) and "auc" in scores else []
    if not values and isinstance(scores, dict) and isinstance(scores.get("truth_ratios"), list):
        values = scores["truth_ratios"] or [None]
    wanted = "truth_ratios" if "tofu" in bench else "auc"
    is_fine = all(isinstance(one, int | float) and 0 < one < math.inf for one in values)
    if not values or not is_fine or wanted not in scores:
        raise DsgError(f"The scores for {bench} in {where} are not positive numbers called {wanted}.", FORM)
    return dict(scores)
