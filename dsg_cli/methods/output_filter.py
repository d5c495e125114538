"""Refuse answers by keywords or by a linear classifier (2403.03329)."""

from __future__ import annotations

from dsg_cli.methods.filtering import fitted
from dsg_cli.methods.settings import OutputFilter
from dsg_cli.methods.wrapping import Made, Material


def make(settings: OutputFilter, material: Material) -> Made:
    """A filter of answers; its threshold is set on retain text as it is, without a question in front.

    Raises:
        DsgError: Nothing tells the texts apart, there is too little text, or an activation is not finite.
    """
    return fitted(settings, material, method="output-filter", side="output")
