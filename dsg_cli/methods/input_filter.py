"""Refuse prompts by keywords or by a linear classifier (2403.03329)."""

from __future__ import annotations

from dsg_cli.methods.filtering import fitted
from dsg_cli.methods.settings import InputFilter
from dsg_cli.methods.wrapping import Made, Material


def make(settings: InputFilter, material: Material) -> Made:
    """A filter of prompts; its threshold holds for prompts like retain text.

    Raises:
        DsgError: Nothing tells the texts apart, there is too little text, or an activation is not finite.
    """
    return fitted(settings, material, method="input-filter", side="input")
