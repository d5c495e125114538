"""All that runs when a guarded model runs: torch and transformers only, and imports from this folder only.

`dsg export` copies these files, as they are, into the folder of an exported model.
"""

from __future__ import annotations
