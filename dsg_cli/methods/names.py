"""Every method by its name: what it changes, what it needs, and where it comes from. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dsg_cli.errors import DsgError, nearest

Form = Literal["guardrail", "model", "wrapper"]
"""What a method makes, and the kind of its artifact: features that are clamped while the model runs; other weights;
text around the prompt, or a filter in front of or behind the model."""


@dataclass(frozen=True)
class Method:
    """One method; its code is the module of that name in this package (`dsg` is the rest of the package)."""

    form: Form
    what: str
    paper: str
    """arXiv id, or empty for what nobody in particular proposed."""
    needs_sae: bool = False
    needs_forget: bool = True
    """Whether it reads a forget corpus."""
    is_trained: bool = False
    """Whether it trains weights by gradient steps; `ssd` changes them without."""
    teaches: bool = False
    """Whether what it reads is there afterwards rather than gone: no rival, and no row of a comparison."""


METHODS = {
    "dsg": Method("guardrail", "clamp features where a gate has fired", "2504.08192", needs_sae=True),
    "static-clamp": Method("guardrail", "clamp each feature wherever it is active", "2410.19278", needs_sae=True),
    "conditional-clamp": Method("guardrail", "clamp each feature above a value", "2503.11127", needs_sae=True),
    "refusal-clamp": Method("guardrail", "raise a refusal feature where others fire", "2503.11127", needs_sae=True),
    "sspu": Method("model", "train within the span of SAE features", "2505.24428", needs_sae=True, is_trained=True),
    "sae-representation": Method(
        "model", "train SAE features towards those of made-up names", "2509.15631", needs_sae=True, is_trained=True
    ),
    "prompt": Method("wrapper", "tell the model not to answer", "2403.03329", needs_forget=False),
    "input-filter": Method("wrapper", "refuse prompts by keywords or a linear classifier", "2403.03329"),
    "output-filter": Method("wrapper", "refuse answers by keywords or a linear classifier", "2403.03329"),
    "in-context": Method("wrapper", "show examples with wrong answers first", "2310.07579", needs_forget=False),
    "gradient-ascent": Method("model", "raise the loss on forget text", "2210.01504", is_trained=True),
    "grad-diff": Method("model", "raise the loss on forget text, not on retain text", "2203.12817", is_trained=True),
    "npo": Method("model", "negative preference optimisation", "2404.05868", is_trained=True),
    "simnpo": Method("model", "the same without a reference model", "2410.07163", is_trained=True),
    "rmu": Method("model", "steer representations of forget text to a random vector", "2403.03218", is_trained=True),
    "scrub": Method("model", "leave a teacher on forget text, follow it on retain text", "2302.09880", is_trained=True),
    "ssd": Method("model", "dampen weights that matter to forget text", "2308.07707"),
    "finetune": Method(
        "model", "train on text, to make a target or a reference", "", needs_forget=False, is_trained=True, teaches=True
    ),
}
"""In the order of tables."""


def check_method(name: str) -> Method:
    """A method by its name.

    Raises:
        DsgError: There is none.
    """
    if name not in METHODS:
        raise DsgError(f"There is no method named {name[:200]}.", f"{nearest(name[:200], METHODS)} See dsg ls methods.")
    return METHODS[name]


def teaches(name: str) -> bool:
    """Whether what a method makes has learnt rather than unlearned."""
    return name in METHODS and METHODS[name].teaches


def check_lora(name: str) -> None:
    """Refuse adapters for a method that trains no weights.

    Raises:
        DsgError: It does not, or there is no such method.
    """
    if not check_method(name).is_trained:
        raise DsgError(f"--lora is for methods that train weights, and {name} does not.", "Leave it out.")


def check_corpora(name: str, *, train: Sequence[str], others: Sequence[str]) -> None:
    """Refuse corpora of the other kind: what is taught is neither to be forgotten nor to be retained.

    Args:
        name: A method.
        train: Corpora that were named to be trained on.
        others: Corpora that were named to be forgotten or retained.

    Raises:
        DsgError: There are some, or there is no such method.
    """
    if check_method(name).teaches and others:
        raise DsgError(f"{name} teaches: nothing is forgotten or retained.", "Name what it trains on with --train.")
    if train and not teaches(name):
        raise DsgError(f"--train is for finetune, and {name} unlearns.", "Name corpora with --forget and --retain.")


def section_of(name: str) -> str:
    """The key of a method's settings below `methods` in a recipe."""
    return name.replace("-", "_")


def module_name(name: str) -> str:
    """The module that holds a method."""
    return f"dsg_cli.methods.{section_of(name)}"
