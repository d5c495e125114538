"""The stages: each one file with one `run()` that reads artifacts, calls the core and writes one artifact."""

from __future__ import annotations
