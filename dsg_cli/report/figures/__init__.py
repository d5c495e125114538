"""Figures of a report, one kind a file, in one style."""

from __future__ import annotations
