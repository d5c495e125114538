"""Artifacts to tables for people."""

from __future__ import annotations
