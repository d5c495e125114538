"""Gemma2ForCausalLM of transformers under its guardrails; see README.md."""

from transformers import Gemma2ForCausalLM

from .configuration_dsg import DsgConfig
from .exported import GuardedModel


class DsgGemma2ForCausalLM(GuardedModel, Gemma2ForCausalLM):
    config_class = DsgConfig
