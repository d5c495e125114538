"""Methods that clamp features without a gate: static, conditional and refusal clamp, and steering files.

Each makes a `Clamping` from the statistics of select: `forget_rate` and `retain_rate` [F], the shares of tokens on
which a feature is active. A guardrail is made of it. `r` is the median residual norm, a unit of coefficients.

Steering files (Khoriaty et al., 2503.11127) say features and what they are set to as CSV: a row a feature, columns by
their names in any order: `latent_idx`; `hook_action`, which is `clamp`, `clamp_prime` or empty (f > 0 -> coefficient),
`conditional` (f > clamp_value -> coefficient) or `refusal` (f > clamp_value -> the latent `refuse_id` is set to the
coefficient); `steering_coefficient`; and `clamp_value`, `refuse_id`, `sae_release` and `sae_id` as needed. Other
columns, such as `description`, are left alone.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dsg_cli.errors import DsgError, nearest
from dsg_cli.guardrail.runtime.spec import NEVER
from dsg_cli.guardrail.selection import check_measured
from dsg_cli.models.releases import locate_release, releases
from dsg_cli.settings import ConditionalClamp, RefusalClamp, StaticClamp, parse_strength
from dsg_cli.workspace.files import is_file, read_bounded


@dataclass(frozen=True)
class Clamping:
    """What is clamped to what, and where; the fields of an artifacts.Guardrail of these names."""

    indices: list[int]
    """Features that are clamped."""
    detectors: list[int]
    """Features that are only watched."""
    coefficients: list[float]
    """What each clamped feature is set to."""
    above: list[float]
    """Of each feature, the clamped ones first, the activation above which a token is active."""
    clamp: Literal["all", "each"]
    setting: str
    """The coefficients as a person gave them."""
    notes: tuple[str, ...] = ()
    """What a person should know of the choice."""


def static_clamping(statistics: Mapping[str, Tensor], settings: StaticClamp, median_residual_norm: float) -> Clamping:
    """Static clamp (Farrell et al., 2410.19278): on every token, for every selected feature j: `f_j > 0 -> -c`.

    Khoriaty et al. (2503.11127) call the same with c = 300 and 5 features Clamp Prime.
    """
    return _clamp_each(statistics, settings, 0.0, median_residual_norm, section="static_clamp")


def conditional_clamping(
    statistics: Mapping[str, Tensor], settings: ConditionalClamp, median_residual_norm: float
) -> Clamping:
    """Conditional clamp (Khoriaty et al., 2503.11127): for every selected feature j: `f_j > above -> -c`."""
    return _clamp_each(statistics, settings, settings.above, median_residual_norm, section="conditional_clamp")


def _clamp_each(
    statistics: Mapping[str, Tensor],
    settings: StaticClamp | ConditionalClamp,
    above: float,
    median_residual_norm: float,
    *,
    section: str,
) -> Clamping:
    indices = frequent_features(statistics, settings, section=section)
    n, c = len(indices), _coefficient(settings.strength, median_residual_norm, key=f"{section}.strength")
    return Clamping(indices, [], [-c] * n, [above] * n, "each", setting=settings.strength)


def refusal_clamping(statistics: Mapping[str, Tensor], settings: RefusalClamp, median_residual_norm: float) -> Clamping:
    """Refusal clamp (Khoriaty et al., 2503.11127): where a harmful feature fires, a refusal feature is raised.

    On every token: `f_j > above` for any selected feature j `-> f_refusal = coefficient`.
    """
    selected = frequent_features(statistics, settings, section="refusal_clamp")
    refusal = settings.refusal_feature
    notes: tuple[str, ...] = ()
    if refusal is None:
        refusal = stand_in(statistics, selected)
        notes = (
            f"The refusal feature {refusal} is a stand-in: of the live features the one that is most frequent on "
            "retain text and rarest on forget text. It turns answers to something else rather than to a refusal.",
        )
    n_features = len(statistics["forget_rate"])
    if refusal >= n_features:
        raise DsgError(
            f"The SAE has {n_features} features; there is no {refusal} to be the refusal feature.",
            "Name another with methods.refusal_clamp.refusal_feature (--set).",
        )
    coefficient = _coefficient(settings.coefficient, median_residual_norm, key="refusal_clamp.coefficient")
    above = [settings.above] * len(selected)
    return _raise_refusal(
        selected, above, refusal, coefficient, settings.clamps_features, setting=settings.coefficient, notes=notes
    )


def frequent_features(
    statistics: Mapping[str, Tensor], settings: StaticClamp | ConditionalClamp | RefusalClamp, *, section: str
) -> list[int]:
    """The `n_features` most often active on forget text, best first, among those active on at most `max_retain_rate`
    of retain tokens."""
    check_measured(statistics)
    forget_F, retain_F = statistics["forget_rate"], statistics["retain_rate"]
    is_left_F = (retain_F <= settings.max_retain_rate) & (forget_F > 0)
    n_left = int(is_left_F.sum())
    if n_left < settings.n_features:
        raise DsgError(
            f"{n_left or 'No'} feature{'s are' if n_left != 1 else ' is'} active on forget text and on at most "
            f"{settings.max_retain_rate:g} of retain tokens; {settings.n_features} were asked for.",
            f"Raise methods.{section}.max_retain_rate, or lower methods.{section}.n_features (--set).",
        )
    ranked = forget_F.where(is_left_F, -1.0).sort(descending=True, stable=True).indices
    return [int(j) for j in ranked[: settings.n_features]]


def stand_in(statistics: Mapping[str, Tensor], selected: Sequence[int]) -> int:
    """argmax_j(retain_rate_j - forget_rate_j) over live features that are not selected."""
    forget_F, retain_F = statistics["forget_rate"], statistics["retain_rate"]
    is_live_F = (forget_F > 0) | (retain_F > 0)
    is_live_F[list(selected)] = False
    if not is_live_F.any():
        raise DsgError(
            "All live features are selected, so none is left to stand in for a refusal feature.",
            "Name one with methods.refusal_clamp.refusal_feature (--set).",
        )
    return int((retain_F - forget_F).where(is_live_F, -torch.inf).argmax())


def _coefficient(text: str, median_residual_norm: float, *, key: str) -> float:
    hint = f"Set methods.{key} to a number such as 300, or a multiple of the median residual norm such as 4r."
    return parse_strength(text, median_residual_norm, hint=hint)


def _raise_refusal(
    selected: Sequence[int],
    above: Sequence[float],
    refusal: int,
    coefficient: float,
    clamps_features: bool,
    *,
    setting: str,
    notes: tuple[str, ...] = (),
) -> Clamping:
    """Where any selected feature exceeds its `above`, the refusal feature is set to the coefficient, and if
    `clamps_features` the selected ones to minus that. How active the refusal feature is makes no token active."""
    if refusal in selected:
        raise DsgError(
            f"The refusal feature {refusal} is one of those whose activity calls for it.",
            "Name another with methods.refusal_clamp.refusal_feature, or fewer features with n_features (--set).",
        )
    clamped = list(selected) if clamps_features else []
    return Clamping(
        indices=[refusal, *clamped],
        detectors=[] if clamps_features else list(selected),
        coefficients=[coefficient, *(-coefficient for _ in clamped)],
        above=[NEVER, *above],
        clamp="all",
        setting=setting,
        notes=notes,
    )


LARGEST_FILE = 2**20
LARGEST_NUMBER = 1e6

METHOD_OF = {
    "": "static-clamp",
    "clamp": "static-clamp",
    "clamp_prime": "static-clamp",
    "conditional": "conditional-clamp",
    "refusal": "refusal-clamp",
}
"""Action -> the method that it asks for."""

SETTING = "steering file"
"""In place of a strength as a person would give it."""


@dataclass(frozen=True)
class SteeringRow:
    """A feature, and what it is set to."""

    line: int
    index: int
    coefficient: float
    above: float
    refusal: int | None


@dataclass(frozen=True)
class SteeringFile:
    """All rows of a file, and the SAE that it is for."""

    method: str
    rows: list[SteeringRow]
    release: str
    """Of the SAE, or empty where the file does not say; so the id."""
    sae_id: str
    sha256: str


def read_steering(path: Path) -> SteeringFile:
    """Read and check a steering file."""
    if not is_file(path):
        raise DsgError(f"There is no steering file {str(path)[:200]}.", "Set methods.<method>.steering_file to one.")
    content = read_bounded(path, LARGEST_FILE)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DsgError(f"{path}, line {line}: this is not UTF-8.", "Save the file as UTF-8.") from error
    rows: list[SteeringRow] = []
    shared: dict[str, str] = {}
    """What is the same in every row: method, release and id of the SAE."""
    for line, cells in _cells(path, text):
        where = f"{path}, line {line}"
        action = cells.get("hook_action", "").lower()
        if action not in METHOD_OF:
            hint = nearest(action[:80], filter(None, METHOD_OF))
            raise DsgError(f"{where}: there is no action {action[:80]!r}.", hint)
        method = METHOD_OF[action]
        for name, value, rule in (
            ("method", method, "a file holds actions of one kind"),
            ("sae_release", cells.get("sae_release", ""), "a file is for one SAE"),
            ("sae_id", cells.get("sae_id", ""), "a file is for one SAE"),
        ):
            if value and shared.setdefault(name, value) != value:
                earlier = shared[name][:80]
                raise DsgError(f"{where}: this row is for {value[:80]}, earlier ones are for {earlier}; {rule}.")
        row = SteeringRow(
            line=line,
            index=_feature_index(cells, "latent_idx", where),
            coefficient=_number(cells, "steering_coefficient", where),
            above=0.0 if method == "static-clamp" else _number(cells, "clamp_value", where, at_least=0.0),
            refusal=_feature_index(cells, "refuse_id", where) if method == "refusal-clamp" else None,
        )
        if any(earlier.index == row.index for earlier in rows):
            raise DsgError(f"{where}: the feature {row.index} is there twice.")
        first = rows[0] if rows else row
        if row.refusal is not None and (row.refusal, row.coefficient) != (first.refusal, first.coefficient):
            raise DsgError(
                f"{where}: another refuse_id or steering_coefficient than in the rows before.",
                "One refusal feature can be set, to one value; split the file, and put several guardrails on together.",
            )
        rows.append(row)
    if not rows:
        raise DsgError(f"{path} has no rows.", "Give a row for each feature below the names of the columns.")
    release, sae_id = shared.get("sae_release", ""), shared.get("sae_id", "")
    return SteeringFile(shared["method"], rows, release, sae_id, hashlib.sha256(content).hexdigest())


def _cells(path: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Number and cells of each line below the names of the columns."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    names: list[str] = []
    try:
        for values in reader:
            cells, where = [value.strip() for value in values], f"{path}, line {reader.line_num}"
            if not any(cells):
                continue
            if any(cells[len(names) :]) and names:
                raise DsgError(f"{where}: there are more values than columns.")
            if names:
                yield reader.line_num, dict(zip(names, cells, strict=False))
                continue
            names = cells
            for name in ("latent_idx", "hook_action", "steering_coefficient"):
                if name not in names:
                    raise DsgError(f"{where}: there is no column {name}.", "The first line names the columns.")
            if twice := [name for name in names if name and names.count(name) > 1]:
                raise DsgError(f"{where}: the column {twice[0][:80]} is there twice.")
    except csv.Error as error:
        raise DsgError(f"{path}, line {reader.line_num}: this is no CSV: {error}.") from error


def _feature_index(cells: dict[str, str], name: str, where: str) -> int:
    text = cells.get(name, "")
    match = re.fullmatch(r"([0-9]{1,9})(\.0*)?", text)  # A table with gaps writes 12 as 12.0.
    if match is None:
        raise DsgError(f"{where}: {name} must be a feature's number, not {text[:80]!r}.")
    return int(match[1])


def _number(cells: dict[str, str], name: str, where: str, *, at_least: float = -NEVER) -> float:
    text = cells.get(name, "")
    try:
        value = float(text) if re.fullmatch(r"[0-9.eE+-]+", text) else None
    except ValueError:
        value = None
    if value is None or not at_least <= value or abs(value) >= LARGEST_NUMBER:
        raise DsgError(f"{where}: {name} must be a number of sensible size, not {text[:80]!r}.")
    return value


def steered_clamping(
    steering: SteeringFile, method: str, *, n_features: int, clamps_features: bool = False
) -> Clamping:
    """What a steering file asks of a method, on an SAE of so many features."""
    rows = steering.rows
    if steering.method != method:
        raise DsgError(
            f"The actions of the steering file are those of {steering.method}, not of {method}.",
            f"Take --method {steering.method}, or another file.",
        )
    for row in rows:
        for index in (row.index, row.refusal or 0):
            if index >= n_features:
                raise DsgError(f"The steering file, line {row.line}: the SAE has {n_features} features; no {index}.")
    indices, above = [row.index for row in rows], [row.above for row in rows]
    refusal = rows[0].refusal
    if refusal is None:
        return Clamping(indices, [], [row.coefficient for row in rows], above, "each", setting=SETTING)
    return _raise_refusal(indices, above, refusal, rows[0].coefficient, clamps_features, setting=SETTING)


def check_same_sae(steering: SteeringFile, source: str) -> list[str]:
    """Refuse a steering file for another SAE than that of `source` (`RELEASE/ID` if it is of a release); a note where
    that cannot be told: an SAE of no release."""
    release, _, sae_id = source.partition("/")
    steering_source = "/".join(filter(None, (steering.release, steering.sae_id)))
    if not steering_source or steering_source == source:
        return []
    if release not in releases():
        return [f"The steering file is for the SAE {steering_source}; whether {source} is that one cannot be told."]
    if steering.release in releases() and steering.sae_id and locate_release(steering_source) == locate_release(source):
        return []  # Two names of one SAE, such as a canonical one.
    if (steering.release or release, steering.sae_id or sae_id) == (release, sae_id):
        return []
    raise DsgError(
        f"The steering file is for the SAE {steering_source}; the features are of {source}.",
        "Run dsg select with --sae, or take another file.",
    )
