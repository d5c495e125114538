"""Dynamic SAE guardrails: unlearning in language models by gating and clamping a few SAE features."""

__version__ = "0.1.0"
