"""Dynamic SAE guardrails: unlearning in language models by gating and clamping a few SAE features."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsg_cli.guardrail.guarded import guarded as guarded
    from dsg_cli.guardrail.guarded import protected_parameters as protected_parameters
    from dsg_cli.guardrail.loading import load_guardrail as load_guardrail

__version__ = "0.1.0"
__all__ = ["__version__", "guarded", "load_guardrail", "protected_parameters"]

_HOMES = {
    "guarded": "dsg_cli.guardrail.guarded",
    "load_guardrail": "dsg_cli.guardrail.loading",
    "protected_parameters": "dsg_cli.guardrail.guarded",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used: they need torch, `dsg --help` does not."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
