"""One file a command; its `run` reads artifacts, calls the other rooms and writes one artifact.

`apply` has unlearn.py and wrap.py beside it; `generate` is in prompts.py. stage.py is what all repeat, inputs.py and
composition.py are what they start from.
"""

from __future__ import annotations
