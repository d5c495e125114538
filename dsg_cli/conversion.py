"""Plain values from YAML, JSON and the command line to the typed fields of a dataclass."""

from __future__ import annotations

import dataclasses
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from dsg_cli.errors import nearest

WHOLE_NUMBERS = range(-(2**63), 2**63)
"""What fits where numbers go: into tensors, and seeds."""


def build_section(cls: type[Any], data: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    """A dataclass from a mapping, nested sections included; what is wrong is appended to `problems`.

    Args:
        cls: The dataclass.
        data: Keys and values as YAML or the command line gave them.
        prefix: Of the keys' dotted names, for messages.
        problems: One sentence a problem.
    """
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in data.items():
        name = f"{prefix}{key}" if isinstance(key, str) else f"{prefix}{shown(key)}"
        if key not in hints:
            problems.append(f"unknown key {name[:200]}. {nearest(name.removeprefix(prefix)[:200], hints)}")
        elif dataclasses.is_dataclass(hints[key]):
            if isinstance(value, Mapping):
                values[key] = build_section(typing.cast(type, hints[key]), value, f"{name}.", problems)
            else:
                problems.append(f"{name} must be a section (key: value), not {shown(value)}.")
        else:
            found = _convert(hints[key], value)
            if found is _WRONG:
                problems.append(f"{name} must be {_describe(hints[key])}, not {shown(value)}.")
            else:
                values[key] = found
    required = [field.name for field in dataclasses.fields(cls) if _is_required(field)]
    problems += [f"{prefix}{name} is missing." for name in required if name not in data]
    return cls(**values) if all(name in values for name in required) else None


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


_WRONG = object()


def _convert(hint: Any, value: Any) -> Any:
    """The value as its field's type, or `_WRONG`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return next((v for v in (_convert(a, value) for a in arguments) if v is not _WRONG), _WRONG)
    if origin is Literal:
        return value if value in arguments else _WRONG
    if origin is list:
        items = [_convert(arguments[0], item) for item in (value if isinstance(value, list | tuple) else [value])]
        return _WRONG if any(item is _WRONG for item in items) else items
    if origin is dict:
        if not isinstance(value, Mapping):
            return _WRONG
        inner = {_convert(str, key): _convert(arguments[1], item) for key, item in value.items()}
        return _WRONG if any(item is _WRONG for item in (*inner, *inner.values())) else inner
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        problems: list[str] = []
        made = build_section(hint, value, "", problems) if isinstance(value, Mapping) else None  # type: ignore[arg-type]
        return _WRONG if problems or made is None else made
    if isinstance(value, int) and value not in WHOLE_NUMBERS:
        return _WRONG
    if hint is types.NoneType:
        return None if value is None else _WRONG
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads 1e-5, without a dot, as text.
        try:
            return float(value)
        except ValueError:
            return _WRONG
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value if type(value) is hint else _WRONG


def shown(value: Any) -> str:
    """A value for a message, shortened; of a number with thousands of digits, that it is one."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 3, 200, 200
    try:
        return short.repr(value)
    except ValueError:
        return "a number with too many digits"


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or dataclasses.is_dataclass(hint) or (origin is dict and arguments[1] is Any):
        return "a mapping"
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is list:
        return f"a list of {_describe(arguments[0])}"
    if origin is dict:
        return f"a mapping of names to {_describe(arguments[1])}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(argument) for argument in arguments)
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}[hint]
