"""The command line: commands by the panels of `dsg --help`; each is parse, run, render."""

from __future__ import annotations
