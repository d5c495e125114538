"""Recipes: files of settings, with what the command line says on top. No torch here.

Precedence: command-line flag, then `--set section.key=value`, then the recipe file, then the defaults (settings.py).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dsg_cli.errors import DsgError, nearest, reason_of
from dsg_cli.methods import compare_checks
from dsg_cli.settings import (
    AttackSection,
    Recipe,
    build_section,
    clamp_checks,
    select_checks,
    training_checks,
    wrapper_checks,
)
from dsg_cli.studies import study_checks
from dsg_cli.workspace.files import is_file

RECIPES = Path(__file__).parent / "recipes"
"""Where an installed package keeps its recipes; in a checkout they lie beside the package."""

if not RECIPES.is_dir():
    RECIPES = Path(__file__).parent.parent / "recipes"

SIDES = ("base", "unlearned")
"""Of a bench: the model that something is to be unlearned from, and what has."""


def recipe_names() -> list[str]:
    """Recipes that come with the package; those in a folder by its name and theirs, `paper/muse-news`."""
    return sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml"))


def find_recipe(name: str) -> Path:
    """A recipe file by path, or one of the package's by name."""
    path = Path(name)
    if is_file(path):
        return path
    wanted = path.as_posix().removeprefix("recipes/").removesuffix(".yaml")
    if wanted in recipe_names():
        return RECIPES / f"{wanted}.yaml"
    raise DsgError(
        f"There is no recipe {name[:200]}.",
        f"{nearest(wanted[:200], recipe_names())} Or give the path of a YAML file.",
    )


def load_recipe(name: str | None = None, *, sets: Sequence[str] = (), flags: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe from a file, with `--set` and flags on top.

    Args:
        name: Path or name; None for the defaults alone.
        sets: `section.key=value` strings, the value in YAML.
        flags: Dotted keys and values; None means that the flag was not given.
    """
    data: dict[str, Any] = {}
    where = "the settings"
    if name is not None:
        path = find_recipe(name)
        where = str(path)
        try:
            data = parse_yaml(path.read_text(encoding="utf-8"), f"{path} is") or {}
        except UnicodeDecodeError as error:
            raise DsgError(f"{path} is not valid YAML: {error}.") from error
        except OSError as error:
            raise DsgError(f"{path} cannot be read: {error.strerror}.") from error
        if not isinstance(data, dict):
            raise DsgError(f"{path} must hold sections (key: value), not a {type(data).__name__}.")
    for item in sets:
        key, separator, text = item.partition("=")
        if not separator:
            raise DsgError(f"--set {item[:200]}: expected section.key=value.")
        _put(data, key, parse_yaml(text, f"--set {item[:200]}: the value is"))
    for key, value in (flags or {}).items():
        if value is not None:
            _put(data, key, value)
    if _named(data, "model") == "lab" and _named(data, "sae") is None:
        _put(data, "sae.source", "lab")
    problems: list[str] = []
    recipe: Recipe = build_section(Recipe, data, "", problems)
    problems += _out_of_range(recipe)
    if problems:
        raise DsgError(f"In {where}:\n  " + "\n  ".join(problems))
    return recipe


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with other values at dotted keys."""
    data = dataclasses.asdict(recipe)
    for key, value in values.items():
        _put(data, key, value)
    problems: list[str] = []
    made: Recipe = build_section(Recipe, data, "", problems)
    problems += _out_of_range(made) if not problems else []
    if problems:
        raise DsgError("In a grid:\n  " + "\n  ".join(problems))
    return made


def values_at(recipe: Recipe, keys: Iterable[str]) -> dict[str, Any]:
    """The values at dotted keys, of the types that they have in a recipe."""
    return {key: functools.reduce(getattr, key.split("."), recipe) for key in keys}


def parse_yaml(text: str, what: str) -> Any:
    """What YAML holds."""
    try:
        return yaml.safe_load(text)
    except Exception as error:  # Of a text of the user's: the 45th of May is a ValueError, deep nesting another.
        raise DsgError(f"{what} not valid YAML: {reason_of(error)}") from error


def _out_of_range(recipe: Recipe) -> list[str]:
    """What has the right type and still makes no sense, so that it is said before anything runs."""
    calibrate, asked, attack = recipe.calibrate, recipe.eval, recipe.attack
    written = recipe.generate
    lengths = calibrate.lengths
    points = {
        "dilution_lengths": attack.dilution_lengths,
        "few_shot_counts": attack.few_shot_counts,
        "suffix_steps": attack.suffix_steps,
        "relearn_steps": attack.relearn_steps,
        "soft_prompt_steps": attack.soft_prompt_steps,
    }
    ascending = "give ascending whole numbers that begin with 0, the state before the attack."
    checks = (
        (calibrate.max_pieces >= 1, f"calibrate.max_pieces is {calibrate.max_pieces}; take at least 1."),
        (calibrate.window >= 1, f"calibrate.window is {calibrate.window}; it must be at least 1."),
        (
            calibrate.gate not in ("probe", "window", "causal-mean") or calibrate.window <= min(lengths, default=0),
            f"calibrate.window is {calibrate.window}, longer than the shortest piece of text ({lengths[:1]} tokens); "
            "lower it, or raise the first of calibrate.lengths.",
        ),
        (calibrate.n_detectors >= 1, f"calibrate.n_detectors is {calibrate.n_detectors}; take at least 1."),
        (
            0 <= calibrate.detector_percentile < 100,
            f"calibrate.detector_percentile is {calibrate.detector_percentile:g}; it must be at least 0 and below 100.",
        ),
        (
            calibrate.threshold is None or 0 <= calibrate.threshold < math.inf,
            f"calibrate.threshold is {calibrate.threshold}; it must be at least 0, or null to set one.",
        ),
        (0 < calibrate.alpha < 1, f"calibrate.alpha is {calibrate.alpha:g}; it must lie between 0 and 1."),
        (
            len(lengths) == 2 and 1 <= lengths[0] <= lengths[-1],
            f"calibrate.lengths is {lengths}; give the shortest and the longest, such as 8:128.",
        ),
        (asked.batch_size >= 1, f"eval.batch_size is {asked.batch_size}; it must be at least 1."),
        (asked.limit is None or asked.limit >= 1, f"eval.limit is {asked.limit}; it must be at least 1."),
        (
            asked.num_fewshot is None or asked.num_fewshot >= 0,
            f"eval.num_fewshot is {asked.num_fewshot}; it must be at least 0.",
        ),
        (written.max_new_tokens >= 1, f"generate.max_new_tokens is {written.max_new_tokens}; write at least 1."),
        (
            0 <= written.temperature < math.inf,
            f"generate.temperature is {written.temperature:g}; it must be 0 or a positive number.",
        ),
        (attack.known_questions >= 1, "attack.known_questions must be at least 1."),
        *((_rises_from(0, values), f"attack.{name} is {values}; {ascending}") for name, values in points.items()),
        (bool(attack.dilution_places), "attack.dilution_places is empty; name before, after or around."),
        (
            _rises_from(1, attack.split_parts),
            f"attack.split_parts is {attack.split_parts}; give ascending whole numbers that begin with 1, the whole "
            "question.",
        ),
        (
            attack.split_filler_tokens >= 1,
            f"attack.split_filler_tokens is {attack.split_filler_tokens}; put at least 1 between two parts.",
        ),
        (
            bool(attack.encode_forms) or attack.encode_file is not None,
            "attack.encode_forms is empty; name a form, or give attack.encode_file.",
        ),
        *(
            (side in SIDES, f"published.results.{bench} has the side {side}; there are {' and '.join(SIDES)}.")
            for bench, sides in recipe.published.results.items()
            for side in sides
        ),
        *_checks_of_weights(attack),
        *select_checks(recipe.select),
        *clamp_checks(recipe.methods),
        *wrapper_checks(recipe.methods),
        *training_checks(recipe.methods),
        *compare_checks(recipe.compare),
        *study_checks(recipe.study),
    )
    return [words for is_fine, words in checks if not is_fine]


def _checks_of_weights(attack: AttackSection) -> tuple[tuple[bool, str], ...]:
    """The settings of attacks by training and on weights."""
    rates, bits, shares = attack.relearn_learning_rates, attack.quantize_bits, attack.prune_shares
    lists = ("relearn_parameters", "relearn_guard", "relearn_data", "soft_prompt_objectives", "suffix_places")
    return (
        (
            _rises(rates) and rates[0] > 0 and rates[-1] < math.inf,
            f"attack.relearn_learning_rates is {rates}; give ascending positive numbers.",
        ),
        *(
            (value >= 1, f"attack.{name} is {value}; take at least 1.")
            for name in ("relearn_rank", "soft_prompt_tokens", "suffix_tokens", "suffix_candidates")
            for value in [getattr(attack, name)]
        ),
        *(
            (0 < value < math.inf, f"attack.{name} is {value}; it must be a positive number.")
            for name in ("soft_prompt_learning_rate", "soft_prompt_gate_weight", "suffix_gate_weight", "probe_ridge")
            for value in [getattr(attack, name)]
        ),
        (
            _are_different(bits) and all(2 <= one <= 16 for one in bits),
            f"attack.quantize_bits is {bits}; give different whole numbers from 2 to 16.",
        ),
        (
            _rises(shares) and shares[0] >= 0 and shares[-1] < 1,
            f"attack.prune_shares is {shares}; give ascending shares, at least 0 and below 1.",
        ),
        *(
            (_are_different(found), f"attack.{name} is {found}; give at least one, and each once.")
            for name in lists
            for found in [getattr(attack, name)]
        ),
    )


def _rises(values: Sequence[float]) -> bool:
    return bool(values) and sorted(set(values)) == values


def _are_different(values: Sequence[object]) -> bool:
    return 0 < len(values) == len(set(values))


def _rises_from(first: int, values: list[int]) -> bool:
    return _rises(values) and values[0] == first


def _named(data: Mapping[str, Any], section: str) -> Any:
    values = data.get(section)
    return values.get("source") if isinstance(values, Mapping) else None


def _put(data: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = data.setdefault(section, {})
        if not isinstance(inner, dict):
            raise DsgError(f"{key}: {section} is not a section.")
        data = inner
    data[last] = value
