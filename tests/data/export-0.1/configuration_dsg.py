"""Configuration of a guarded model: the base model's, and its guardrails."""

from transformers import Gemma2Config

from .sealing import SealedConfig


class DsgConfig(SealedConfig, Gemma2Config):
    model_type = "dsg_" + Gemma2Config.model_type
