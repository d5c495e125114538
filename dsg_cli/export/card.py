"""The README of an exported guardrail or model: how to load it, and what it does not protect from."""

from __future__ import annotations

from collections.abc import Sequence

from dsg_cli.guardrail import GuardrailModule

LIMITS = """## What it does not protect from

The knowledge is still in the weights. Whoever holds them can take the guardrail off: this protects a model behind an
API. A gate can be talked past, and it blocks some harmless text; both were measured when it was made, not for your use.
A clamped answer is wrong or gibberish, not a refusal.
"""
USE_MODEL = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)
model.dsg_guardrails[0].counters()  # Sequences seen and gated so far.
```

Without `trust_remote_code` it does not load. Serve it without continuous batching, which lays many sequences
into one row.
"""
USE_LIGHT = """```python
from dsg_cli import guarded, load_guardrail

with guarded(model, load_guardrail("PATH")):
    model.generate(**inputs)
```

`model` is the model that the guardrail was made for; another one is refused.
"""


def model_card(guardrails: Sequence[GuardrailModule], *, architecture: str, is_whole_model: bool) -> str:
    """The README's text, with a row a guardrail."""
    rows = "\n".join(
        f"| {guard.gate.form} | {guard.gate.threshold:.4g} | {guard.n_chosen} | {guard.read.name} "
        f"| {_set_to(guard)} | {guard.key[:12]} |"
        for guard in guardrails
    )
    title, use = ("A guarded model", USE_MODEL) if is_whole_model else ("A guardrail", USE_LIGHT)
    return f"""---
library_name: transformers
tags: [unlearning, sparse-autoencoder, guardrail]
---

# {title}

{architecture} under dynamic sparse-autoencoder guardrails (arXiv 2504.08192): a few features of a sparse
autoencoder are watched, and clamped in sequences on which they fire too much.

{use}
| gate | threshold | features | hook | set to | digest |
|---|---|---|---|---|---|
{rows}

{LIMITS}"""


def _set_to(guard: GuardrailModule) -> str:
    """The values that clamped features are set to, each once."""
    values = dict.fromkeys(guard.spec.coefficients or [-guard.spec.strength])
    return ", ".join(f"{value:.4g}" for value in values)
