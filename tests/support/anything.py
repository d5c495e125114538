"""Strategies for whatever a file or an argument may hold, and what every reader must do with it."""

from __future__ import annotations

import json

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from dsg_cli.errors import DsgError


def tries(n):
    """So many examples, the same in every run."""
    return settings(
        max_examples=n,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
    )


def refused(read, *arguments, **options):
    """What `read` returns; None if it refuses, which it must do with words."""
    try:
        return read(*arguments, **options)
    except DsgError as error:
        assert str(error).strip()
        return None


ODD_TEXT = st.sampled_from(
    ["", " ", "..", "/", "a/b", "../x", "a" * 5000, "\x00", "\ud800", "[/b]", "9" * 5000, "nan", "1e999", "é", ":x:"]
)

TEXT = ODD_TEXT | st.text(max_size=20)

NUMBERS = (
    st.integers()
    | st.sampled_from([0, -1, 10**400, -(10**30), 2**63])
    | st.floats(allow_nan=False, allow_infinity=False)
)

PLAIN = st.none() | st.booleans() | NUMBERS | TEXT

VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8
)
"""Any JSON."""


@st.composite
def mutated(draw, content):
    """Bytes with a few changes, insertions and cuts."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        content = content[:at] + draw(st.binary(max_size=4)) + content[at + draw(st.integers(0, 8)) :]
    return content[: draw(st.integers(0, len(content)))] if draw(st.integers(0, 9)) == 0 else content


def places(value, path=()):
    """The paths to everything inside nested objects and lists."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield (*path, key)
        yield from places(inner, (*path, key))


def changed(data, path, *replacement):
    """A copy without what lies at a path, or with something else there."""
    copy = json.loads(json.dumps(data))
    *above, last = path
    inner = copy
    for key in above:
        inner = inner[key]
    if replacement:
        inner[last] = replacement[0]
    else:
        del inner[last]
    return copy
