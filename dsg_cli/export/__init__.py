"""Guardrails for others: one light file, a model folder that stock clients load, a repository on a hub."""

from __future__ import annotations
