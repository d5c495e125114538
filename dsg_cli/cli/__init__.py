"""The command line: one file a command, each parse, run, render."""

from __future__ import annotations
