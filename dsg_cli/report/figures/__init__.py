"""Figures of a report: draw.py has one function each, style.py how they look."""

from __future__ import annotations
