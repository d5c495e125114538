"""Settings of wrappers that have the right type and still make no sense. No torch here."""

from __future__ import annotations

import math

from dsg_cli.methods.settings import MethodsSection


def checks(section: MethodsSection) -> tuple[tuple[bool, str], ...]:
    """Whether each setting is fine, and what to say if it is not."""
    shown = section.in_context
    return (
        (bool(section.prompt.text.strip()), "methods.prompt.text is empty; write what the model is told."),
        (shown.n_forget >= 1, f"methods.in_context.n_forget is {shown.n_forget}; take at least 1."),
        (shown.n_retain >= 0, f"methods.in_context.n_retain is {shown.n_retain}; it must be at least 0."),
        *(
            check
            for name, one in (("input_filter", section.input_filter), ("output_filter", section.output_filter))
            for check in (
                (0 < one.alpha < 1, f"methods.{name}.alpha is {one.alpha:g}; it must lie between 0 and 1."),
                (
                    0 < one.ridge < math.inf,
                    f"methods.{name}.ridge is {one.ridge:g}; it must be a positive number.",
                ),
                (one.n_keywords >= 1, f"methods.{name}.n_keywords is {one.n_keywords}; take at least 1."),
                (
                    one.layer is None or one.layer >= 0,
                    f"methods.{name}.layer is {one.layer}; layers count from 0.",
                ),
                (bool(one.refusal.strip()), f"methods.{name}.refusal is empty; write what is answered."),
                (
                    one.keywords_file is None or one.rule == "keywords",
                    f"methods.{name}.keywords_file is given; set methods.{name}.rule=keywords, or leave it out.",
                ),
            )
        ),
    )
