"""Recipes: files of settings, with what the command line says on top. No torch here.

Precedence: command-line flag, then `--set section.key=value`, then the recipe file, then the defaults (settings.py).
"""

from __future__ import annotations

import dataclasses
import functools
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from dsg_cli.errors import DsgError, nearest, reason_of
from dsg_cli.settings import Recipe
from dsg_cli.studies import STUDIES
from dsg_cli.workspace.files import is_file

RECIPES = Path(__file__).parent / "recipes"
"""Where an installed package keeps its recipes; in a checkout they lie beside the package."""

if not RECIPES.is_dir():
    RECIPES = Path(__file__).parent.parent / "recipes"

RECIPE = TypeAdapter(Recipe)

UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden", "invalid_key")
"""How pydantic calls a key that a section does not have."""

WORDS = {
    "Input should be": "it should be",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "a valid integer": "a whole number",
    "a valid": "a",
    " after validation, not 0": "",
    "List should": "it should",
    "String should": "it should",
    "Value should": "it should",
}
"""Of pydantic's messages, and plainer ones."""

UNSPOKEN = ("(number)", "(metrics)", "[key]")
"""Of where a mistake is, what is no key: the branch of a union, and that a mapping's key is wrong, not its value."""


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
    return _checked(data, where)


def with_values(recipe: Recipe, values: Mapping[str, Any], where: str = "a grid") -> Recipe:
    """The recipe with other values, which are checked, at dotted keys; `where` they come from is named in errors."""
    data = dataclasses.asdict(recipe)
    for key, value in values.items():
        _put(data, key, value)
    return _checked(data, where)


def parse_yaml(text: str, what: str) -> Any:
    """What YAML holds."""
    try:
        return yaml.safe_load(text)
    except Exception as error:  # Of a text of the user's: the 45th of May is a ValueError, deep nesting another.
        raise DsgError(f"{what} not valid YAML: {reason_of(error)}") from error


def _checked(data: dict[str, Any], where: str) -> Recipe:
    """A recipe from its sections; all mistakes are reported together."""
    _name_sections(data, Recipe)
    try:
        return RECIPE.validate_python(data)
    except ValidationError as error:
        mistakes = map(_sentence, error.errors(include_url=False, include_context=False))
        raise DsgError(f"In {where}:\n  " + "\n  ".join(mistakes)) from None


def _name_sections(data: dict[str, Any], section: Any) -> None:
    """Add the sections that are left out, empty: the recipe's validator makes them; a default would need one more."""
    for known in dataclasses.fields(section):
        kind: Any = known.default_factory
        if dataclasses.is_dataclass(kind):
            inner = data.setdefault(known.name, {})
            if isinstance(inner, dict):
                _name_sections(inner, kind)


def _sentence(mistake: ErrorDetails) -> str:
    """What is wrong, with the dotted key and the value."""
    *section, last = [part for part in mistake["loc"] if part not in UNSPOKEN]
    key = ".".join(part if isinstance(part, str) else _shown(part) for part in (*section, last))[:200]
    if mistake["type"] in UNKNOWN:
        return f"unknown key {key}. {nearest(str(last)[:200], _keys_of(section)) if isinstance(last, str) else ''}"
    if mistake["type"] == "dataclass_type":
        return f"{key} must be a section (key: value), not {_shown(mistake['input'])}."
    value, words = mistake["input"], mistake["msg"].removeprefix("Value error, ")
    for theirs, ours in WORDS.items():
        words = words.replace(theirs, ours)
    end = "" if words.endswith("?") else "."
    if dataclasses.is_dataclass(value) or isinstance(value, dict):
        return f"{key}: {words}{end}"
    is_empty = value == [] or (isinstance(value, str) and not value.strip())
    return f"{key} is {'empty' if is_empty else _shown(value)}; {words}{end}"


def _shown(value: Any) -> str:
    """A value for a message, shortened; of a number with thousands of digits, that it is one."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 3, 200, 200
    try:
        return short.repr(value)
    except ValueError:
        return "a number with too many digits"


def _keys_of(section: Sequence[int | str]) -> list[str]:
    """What a section may hold."""
    if list(section[:2]) == ["study", "grids"]:
        return list(STUDIES[str(section[2])].axes) if section[2] in STUDIES else []
    return [known.name for known in dataclasses.fields(functools.reduce(getattr, map(str, section), Recipe()))]


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
