"""A recipe: every setting of a run, one frozen dataclass a YAML section. No torch here.

Precedence: command-line flag, then `--set section.key=value`, then the recipe file, then the defaults below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from dsg_cli.conversion import build_section
from dsg_cli.errors import DsgError, nearest

RECIPES = Path(__file__).parent / "recipes"
"""Where an installed package keeps its recipes; in a checkout they lie beside the package."""
if not RECIPES.is_dir():
    RECIPES = Path(__file__).parent.parent / "recipes"


@dataclass(frozen=True)
class ModelSection:
    """Which language model."""

    source: str = "lab"
    """`lab`, a Hugging Face model folder, or org/name[@revision] on the hub."""
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    instead: str | None = None
    """For a guardrail: the model to put it on, if the one that it was made for now lies elsewhere."""
    allow_mismatch: bool = False
    """Put a guardrail on another model than the one it was made for, such as a fine-tuned one; reports say so."""


@dataclass(frozen=True)
class SaeSection:
    """Which sparse autoencoder."""

    source: str = "lab"
    """`lab`, `lab-1`, `lab-2`, or a folder in sae-lens's format."""


@dataclass(frozen=True)
class CorporaSection:
    """What is to be forgotten and what retained: names of lab corpora, or .jsonl or .txt files."""

    forget: list[str] = field(default_factory=list)
    retain: list[str] = field(default_factory=list)
    limit: int | None = None
    """At most so many documents of each corpus."""


@dataclass(frozen=True)
class SelectSection:
    """Which features."""

    n_features: int = 20
    ratio_percentile: float = 95.0
    score: Literal["mean-square", "squared-mean"] = "mean-square"
    """`mean-square` is the paper's Fisher diagonal, `squared-mean` what its code computes."""
    seq_len: int = 1024
    """Longer documents are read in rows of so many tokens."""


@dataclass(frozen=True)
class CalibrateSection:
    """When the gate fires."""

    gate: Literal["window", "causal-mean", "mean"] = "window"
    """`window` decides while text is written; `mean` is the paper's, for scoring whole sequences."""
    window: int = 4
    """Counted tokens in a window, and in the shortest prefix of `causal-mean`."""
    n_detectors: int = 5
    """Features that a `window` gate watches, chosen like those of select but at `detector_percentile`."""
    detector_percentile: float = 98.0
    alpha: float = 0.05
    """Promised rate of false positives on retain text."""
    lengths: list[int] = field(default_factory=lambda: [8, 128])
    """Retain text is cut to pieces of random lengths from the first to the second, in counted tokens."""
    retain: list[str] = field(default_factory=list)
    """Other retain corpora than the ones of select."""


@dataclass(frozen=True)
class GuardrailSection:
    """What happens when it fires."""

    strength: str = "4r"
    """c: a number, or a multiple of the median residual norm such as `4r`."""


@dataclass(frozen=True)
class EvalSection:
    """What is measured."""

    benches: list[str] = field(default_factory=list)
    split: Literal["dev", "test"] = "test"
    include_path: str | None = None
    """Folder with lm-eval tasks of your own."""
    batch_size: int = 32
    limit: int | None = None
    expect: list[str] = field(default_factory=list)
    """Conditions on the unlearned model, such as `lab-hexes<=0.30`."""
    samples: bool = False
    """Keep question texts in the rows."""


@dataclass(frozen=True)
class GenerateSection:
    """What is written."""

    side: Literal["both", "base", "guarded"] = "both"
    max_new_tokens: int = 64
    temperature: float = 0.0
    """0 takes the likeliest token."""
    chat: bool = False
    """Ask in the tokenizer's chat template."""
    on_trigger: Literal["clamp", "refuse"] = "clamp"
    """Where a gate opens: go on with clamped features, or end with `refusal`."""
    refusal: str = "I cannot help with that."


@dataclass(frozen=True)
class AttackSection:
    """How it is attacked."""

    kinds: list[str] = field(default_factory=list)
    bench: str | None = None
    """Questions on the forgotten knowledge; by default the bench named like the forget corpus."""
    utility_bench: str | None = None
    """Questions that must stay answered, shown beside the attack."""
    dilution_lengths: list[int] = field(default_factory=lambda: [0, 4, 16, 48, 96])
    """Benign tokens put in front of each question."""
    relearn_questions: int = 16
    """Forget questions that the attacker fine-tunes on; the others are asked."""
    relearn_steps: list[int] = field(default_factory=lambda: [0, 5, 10, 20, 40])
    relearn_learning_rate: float = 3e-4


@dataclass(frozen=True)
class Recipe:
    """All settings of a run."""

    model: ModelSection = ModelSection()
    sae: SaeSection = SaeSection()
    corpora: CorporaSection = CorporaSection()
    select: SelectSection = SelectSection()
    calibrate: CalibrateSection = CalibrateSection()
    guardrail: GuardrailSection = GuardrailSection()
    eval: EvalSection = EvalSection()
    generate: GenerateSection = GenerateSection()
    attack: AttackSection = AttackSection()
    seed: int = 0


def recipe_names() -> list[str]:
    """Recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """A recipe file by path, or one of the package's by name.

    Raises:
        DsgError: There is none.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = RECIPES / f"{path.name.removesuffix('.yaml')}.yaml"
    if shipped.is_file() and path.parent in (Path(), Path("recipes")):
        return shipped
    raise DsgError(
        f"There is no recipe {name}.", f"{nearest(path.stem, recipe_names())} Or give the path of a YAML file."
    )


def load_recipe(name: str | None = None, *, sets: Sequence[str] = (), flags: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe from a file, with `--set` and flags on top.

    Args:
        name: Path or name; None for the defaults alone.
        sets: `section.key=value` strings, the value in YAML.
        flags: Dotted keys and values; None means that the flag was not given.

    Raises:
        DsgError: All unknown keys and ill-typed values in one message.
    """
    data: dict[str, Any] = {}
    where = "the settings"
    if name is not None:
        path = find_recipe(name)
        where = str(path)
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise DsgError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(data, dict):
            raise DsgError(f"{path} must hold sections (key: value), not a {type(data).__name__}.")
    for item in sets:
        key, separator, text = item.partition("=")
        if not separator:
            raise DsgError(f"--set {item}: expected section.key=value.")
        try:
            _put(data, key, yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise DsgError(f"--set {item}: the value is not valid YAML.") from error
    for key, value in (flags or {}).items():
        if value is not None:
            _put(data, key, value)
    problems: list[str] = []
    recipe: Recipe = build_section(Recipe, data, "", problems)
    problems += _out_of_range(recipe)
    if problems:
        raise DsgError(f"In {where}:\n  " + "\n  ".join(problems))
    return recipe


def _out_of_range(recipe: Recipe) -> list[str]:
    """What has the right type and still makes no sense, so that it is said before anything runs."""
    select, calibrate, asked, attack = recipe.select, recipe.calibrate, recipe.eval, recipe.attack
    written = recipe.generate
    lengths = calibrate.lengths
    points = {"dilution_lengths": attack.dilution_lengths, "relearn_steps": attack.relearn_steps}
    ascending = "give ascending whole numbers that begin with 0, the state before the attack."
    checks = (
        (select.n_features >= 1, f"select.n_features is {select.n_features}; take at least 1."),
        (
            0 <= select.ratio_percentile < 100,
            f"select.ratio_percentile is {select.ratio_percentile:g}; it must be at least 0 and below 100.",
        ),
        (select.seq_len >= 2, f"select.seq_len is {select.seq_len}; it must be at least 2."),
        (calibrate.window >= 1, f"calibrate.window is {calibrate.window}; it must be at least 1."),
        (calibrate.n_detectors >= 1, f"calibrate.n_detectors is {calibrate.n_detectors}; take at least 1."),
        (
            0 <= calibrate.detector_percentile < 100,
            f"calibrate.detector_percentile is {calibrate.detector_percentile:g}; it must be at least 0 and below 100.",
        ),
        (0 < calibrate.alpha < 1, f"calibrate.alpha is {calibrate.alpha:g}; it must lie between 0 and 1."),
        (
            len(lengths) == 2 and 1 <= lengths[0] <= lengths[-1],
            f"calibrate.lengths is {lengths}; give the shortest and the longest, such as 8:128.",
        ),
        (asked.batch_size >= 1, f"eval.batch_size is {asked.batch_size}; it must be at least 1."),
        (asked.limit is None or asked.limit >= 1, f"eval.limit is {asked.limit}; it must be at least 1."),
        (written.max_new_tokens >= 1, f"generate.max_new_tokens is {written.max_new_tokens}; write at least 1."),
        (
            0 <= written.temperature < math.inf,
            f"generate.temperature is {written.temperature:g}; it must be 0 or a positive number.",
        ),
        (attack.relearn_questions >= 1, "attack.relearn_questions must be at least 1."),
        (
            0 < attack.relearn_learning_rate < math.inf,
            f"attack.relearn_learning_rate is {attack.relearn_learning_rate}; it must be a positive number.",
        ),
        *((_rises_from_zero(values), f"attack.{name} is {values}; {ascending}") for name, values in points.items()),
    )
    return [words for is_fine, words in checks if not is_fine]


def _rises_from_zero(values: list[int]) -> bool:
    return bool(values) and values[0] == 0 and sorted(set(values)) == values


def _put(data: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = data.setdefault(section, {})
        if not isinstance(inner, dict):
            raise DsgError(f"{key}: {section} is not a section.")
        data = inner
    data[last] = value
