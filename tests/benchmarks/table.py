"""Every benchmark as one table of ratios from one run: python tests/benchmarks/table.py

Not part of the test suite: the figures are of the machine they come from. CPU, 2 threads, about two minutes.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import evaluating
import files
import hook
import layers
import memory
import scaling
import torch
import transformers


def main() -> None:
    """Measure everything and print a Markdown table."""
    out = sys.stdout.write
    out("| what | measured | target |\n|---|---|---|\n")
    for part in (hook, layers, files, memory, evaluating, scaling):
        for what, measured, target in part.rows():
            out(f"| {what} | {measured} | {target} |\n")
            sys.stdout.flush()
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    out(f"\n{cpu}, 2 threads; torch {torch.__version__}, transformers {transformers.__version__}\n")


if __name__ == "__main__":
    main()
