"""`dsg apply`: everything that later steps need in one guardrail file.

Cuts the selected features out of the SAE, resolves the strength, and writes guardrail-NNN with its tensors. The
model itself is neither loaded nor changed.
"""

from __future__ import annotations

import dataclasses
import math
import re

from dsg_cli.artifacts import Guardrail, Threshold
from dsg_cli.errors import DsgError
from dsg_cli.progress import Report, silent
from dsg_cli.recipe import Recipe
from dsg_cli.slicing import detector_weights, slice_sae
from dsg_cli.stages.chain import chain_sae, settle
from dsg_cli.stages.provenance import Clock, new_header
from dsg_cli.workspace import Stored, Workspace

LARGEST_STRENGTH = 1e6
"""Beyond this a clamped residual loses its meaning, and float32 soon its range."""


def run(
    recipe: Recipe, workspace: Workspace, *, source: str | None = None, reuse: bool = False, report: Report = silent
) -> Stored:
    """Build the guardrail from the newest threshold, or from the one named, and write it.

    Raises:
        DsgError: Anything the user can mend.
    """
    clock = Clock()
    threshold = workspace.find("threshold", source)
    workspace.check_writable()
    set_at = threshold.body_as(Threshold)
    strength = parse_strength(recipe.guardrail.strength, set_at.median_residual_norm)
    assert threshold.header.sae is not None
    sae = chain_sae(threshold.header.sae, threshold.id)
    recipe = settle(recipe, threshold.header)
    header = new_header(
        "guardrail",
        recipe,
        settings=dataclasses.asdict(recipe.guardrail),
        model=threshold.header.model,
        sae=threshold.header.sae,
        inputs=[threshold],
    )
    if reuse and (stored := workspace.matching(header)) is not None:
        return stored
    slice_spec, tensors = slice_sae(sae, set_at.features, set_at.detectors)
    body = Guardrail(
        indices=set_at.features,
        detectors=set_at.detectors,
        gate=set_at.gate,
        window=set_at.window,
        threshold=set_at.threshold,
        strength=strength,
        strength_setting=recipe.guardrail.strength,
        median_residual_norm=set_at.median_residual_norm,
        hook=sae.site.name,
        hook_out=sae.write.name,
        activation=sae.identity.architecture,
        slice=dataclasses.asdict(slice_spec),
        special_ids=set_at.special_ids,
        bos=set_at.bos,
        forget=set_at.forget,
        retain=set_at.retain,
    )
    tensors["detect"] = detector_weights(set_at.features, set_at.detectors)
    report("guardrail", 1, 1)
    return workspace.write(clock.close(header), body, tensors=tensors)


def parse_strength(text: str, median_residual_norm: float) -> float:
    """c from `500`, or from `2r`: twice the median residual norm at the hook.

    Raises:
        DsgError: Neither, or not a positive finite number.
    """
    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(r?)\s*", text)
    try:
        value = float(match[1]) * (median_residual_norm if match[2] else 1.0) if match else math.nan
    except ValueError:
        value = math.nan
    if not 0 < value < LARGEST_STRENGTH:
        raise DsgError(
            f"The strength {text!r} is not a positive number of sensible size.",
            "Give --strength 500, or a multiple of the median residual norm such as --strength 4r.",
        )
    return value
