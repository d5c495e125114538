"""`dsg apply`: everything that later steps need in one guardrail file.

Cuts the selected features out of the SAE, resolves the strength, and writes guardrail-NNN with its tensors. The
model itself is neither loaded nor changed.
"""

from __future__ import annotations

import dataclasses
import math
import re

from dsg_cli.artifacts import FeatureSet, Guardrail, Threshold
from dsg_cli.errors import DsgError
from dsg_cli.progress import Report, silent
from dsg_cli.recipe import Recipe
from dsg_cli.sae import slice_sae
from dsg_cli.stages.chain import chain_sae, parent
from dsg_cli.stages.provenance import Clock, new_header
from dsg_cli.workspace import Stored, Workspace


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
    features = parent(threshold, "features")
    median = features.body_as(FeatureSet).median_residual_norm
    strength = parse_strength(recipe.guardrail.strength, median)
    assert threshold.header.sae is not None
    sae = chain_sae(threshold.header.sae, threshold.id)
    header = new_header(
        "guardrail",
        recipe,
        settings=dataclasses.asdict(recipe.guardrail),
        model=threshold.header.model,
        sae=threshold.header.sae,
        inputs=[features, threshold],
    )
    if reuse and (stored := workspace.matching(header)) is not None:
        return stored
    set_at = threshold.body_as(Threshold)
    body = Guardrail(
        indices=set_at.features,
        gate=set_at.gate,
        threshold=set_at.threshold,
        strength=strength,
        strength_setting=recipe.guardrail.strength,
        median_residual_norm=median,
        hook=sae.site.name,
        activation=sae.identity.architecture,
        special_ids=set_at.special_ids,
        forget=[corpus["name"] for corpus in features.header.settings["forget"]],
        retain=[corpus["name"] for corpus in features.header.settings["retain"]],
    )
    tensors = slice_sae(sae, set_at.features).state_dict()
    report("guardrail", 1, 1)
    return workspace.write(clock.close(header), body, tensors=tensors)


def parse_strength(text: str, median_residual_norm: float) -> float:
    """c from `500`, or from `2r`: twice the median residual norm at the hook.

    Raises:
        DsgError: Neither, or not a positive finite number.
    """
    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(r?)\s*", text)
    try:
        value = float(match[1]) if match else math.nan
    except ValueError:
        value = math.nan
    if match is None or not math.isfinite(value) or value <= 0:
        raise DsgError(
            f"The strength {text!r} is not a positive number.",
            "Give --strength 500, or a multiple of the median residual norm such as --strength 2r.",
        )
    return value * median_residual_norm if match[2] else value
