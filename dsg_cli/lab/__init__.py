"""The embedded lab: a tiny language model that knows a made-up world, and an SAE on it."""

from __future__ import annotations
