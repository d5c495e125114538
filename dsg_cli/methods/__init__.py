"""Ways to unlearn, by family: what they are called, and where their code is. No torch here."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from dsg_cli.errors import DsgError, nearest

Form = Literal["guardrail", "model", "wrapper"]
"""What a method makes, and the kind of its artifact: features that are clamped while the model runs; other weights;
text around the prompt, or a filter in front of or behind the model."""


@dataclasses.dataclass(frozen=True)
class Method:
    """One method; `dsg` is the rest of the package."""

    form: Form
    module: str
    """Of this package, which holds it; its function has formula and paper."""
    what: str
    needs_sae: bool = False
    needs_forget: bool = True
    """Whether it reads a forget corpus."""
    is_trained: bool = False
    """Whether it trains weights by gradient steps; `ssd` changes them without."""
    finetunes: bool = False
    """Whether the model knows afterwards what it reads: no rival, and no row of a comparison."""


_clamp = partial(Method, "guardrail", "clamps", needs_sae=True)
_trained = partial(Method, "model", is_trained=True)

METHODS = {
    "dsg": Method("guardrail", "", "clamp features where a gate has fired", needs_sae=True),
    "static-clamp": _clamp("clamp each feature wherever it is active"),
    "conditional-clamp": _clamp("clamp each feature above a value"),
    "refusal-clamp": _clamp("raise a refusal feature where others fire"),
    "sspu": _trained("representation", "train within the span of SAE features", needs_sae=True),
    "sae-representation": _trained(
        "representation", "train SAE features towards those of made-up names", needs_sae=True
    ),
    "prompt": Method("wrapper", "wrappers", "tell the model not to answer", needs_forget=False),
    "input-filter": Method("wrapper", "wrappers", "refuse prompts by keywords or a linear classifier"),
    "output-filter": Method("wrapper", "wrappers", "refuse answers by keywords or a linear classifier"),
    "in-context": Method("wrapper", "wrappers", "show examples with wrong answers first", needs_forget=False),
    "gradient-ascent": _trained("losses", "raise the loss on forget text"),
    "grad-diff": _trained("losses", "raise the loss on forget text, not on retain text"),
    "npo": _trained("losses", "negative preference optimisation"),
    "simnpo": _trained("losses", "the same without a reference model"),
    "rmu": _trained("representation", "steer representations of forget text to a random vector"),
    "scrub": _trained("losses", "leave a teacher on forget text, follow it on retain text"),
    "ssd": Method("model", "losses", "dampen weights that matter to forget text"),
    "finetune": dataclasses.replace(
        _trained("losses", "train on text, to make a target or a reference"), needs_forget=False, finetunes=True
    ),
}
"""In the order of tables."""


def check_method(name: str) -> Method:
    """A method by its name."""
    if name not in METHODS:
        raise DsgError(f"There is no method named {name[:200]}.", f"{nearest(name[:200], METHODS)} See dsg ls methods.")
    return METHODS[name]


def finetunes(name: str) -> bool:
    """Whether what a method makes has learnt rather than unlearned."""
    return name in METHODS and METHODS[name].finetunes


def check_lora(name: str) -> None:
    """Refuse adapters for a method that trains no weights."""
    if not check_method(name).is_trained:
        raise DsgError(f"--lora is for methods that train weights, and {name} does not.", "Leave it out.")


def check_corpora(name: str, *, train: Sequence[str], others: Sequence[str]) -> None:
    """Refuse corpora to be forgotten or retained (`others`) for a method that finetunes, and `train` for the rest."""
    if check_method(name).finetunes and others:
        raise DsgError(f"{name} teaches: nothing is forgotten or retained.", "Name what it trains on with --train.")
    if train and not finetunes(name):
        raise DsgError(f"--train is for finetune, and {name} unlearns.", "Name corpora with --forget and --retain.")


def section_of(name: str) -> str:
    """The key of a method's settings below `methods` in a recipe."""
    return name.replace("-", "_")


def load_method(name: str) -> Callable[..., Any]:
    """The function of a method that changes weights (`unlearn_<name>`) or wraps the model (`make_<name>`)."""
    method = METHODS[name]
    module = importlib.import_module(f"dsg_cli.methods.{method.module}")
    verb = "make" if method.form == "wrapper" else "unlearn"
    function: Callable[..., Any] = getattr(module, f"{verb}_{section_of(name)}")
    return function
