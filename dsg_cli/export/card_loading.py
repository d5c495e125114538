"""How to load an export: Python that runs as it stands in its model card."""

from __future__ import annotations

import json

from dsg_cli.export.card_facts import CardFacts
from dsg_cli.hub import REPOSITORY, SCHEME
from dsg_cli.lab import data as lab
from dsg_cli.runtime.gates import CAUSAL_FORMS

WHOLE = """from transformers import AutoModelForCausalLM, AutoTokenizer

options = {{"trust_remote_code": True}}
model = AutoModelForCausalLM.from_pretrained({address}, **options)
tokenizer = AutoTokenizer.from_pretrained({address}, **options)
inputs = tokenizer("Something to ask", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
print(model.dsg_guardrails[0].counters())  # Sequences seen and gated so far.
"""
ABOUT_WHOLE = """It needs torch and transformers, not the package that made it. Without `trust_remote_code` it does not
load, nor through the base's own class: read its Python files first. Serve it without continuous batching, which lays
many sequences into one row."""
LIGHT = """from dsg_cli import guarded, load_guardrail
from transformers import AutoModelForCausalLM, AutoTokenizer

{base}
guardrails = [{guardrails}]
inputs = tokenizer("Something to ask", return_tensors="pt")
with guarded(model, guardrails):
    {answer}
print(guardrails[0].counters())  # Sequences seen and gated so far.
"""
GENERATES = "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))"
SCORES = "print(model(**inputs, use_cache=False).logits.shape)  # Its gate needs whole sequences: it cannot write."
ABOUT_LIGHT = """It needs the Python package dsg-cli, in the version below or a newer one. The model must be the one
that it was made for, which is checked; the hooks are gone after the block."""


def loading_section(facts: CardFacts) -> str:
    """The section, with code for the form of the export."""
    if facts.is_whole_model:
        source, about = WHOLE.format(address=_quoted(facts.address)), ABOUT_WHOLE
    else:
        can_write = all(guard.body.gate in CAUSAL_FORMS for guard in facts.guards)
        source = LIGHT.format(
            base=_base(facts),
            guardrails=", ".join(f"load_guardrail({_quoted(_file(facts, guard.file))})" for guard in facts.guards),
            answer=GENERATES if can_write else SCORES,
        )
        about = ABOUT_LIGHT
    return f"## How to load it\n\n```python\n{source}```\n\n{about}"


def _file(facts: CardFacts, name: str) -> str:
    return f"{SCHEME if facts.is_on_hub else ''}{facts.address}/{name}"


def _base(facts: CardFacts) -> str:
    """The two lines that load the model that the guardrails are put on."""
    match, options = REPOSITORY.fullmatch(facts.model), ""
    source = match[1] if match else facts.model
    if match and match[2]:
        options += f", revision={_quoted(match[2])}"
    if any(guard.header.trust_remote_code for guard in facts.guards):
        options += ", trust_remote_code=True"
    lines = []
    if facts.model in lab.MODEL_DIRS:
        lines.append("# `dsg lab export lab` writes it.")
        source = f"lab/{lab.MODEL_DIRS[facts.model].name}"
    elif not match:
        lines.append("# The model that it was made for, wherever it lies.")
    lines += [
        f"model = AutoModelForCausalLM.from_pretrained({_quoted(source)}{options})",
        f"tokenizer = AutoTokenizer.from_pretrained({_quoted(source)}{options})",
    ]
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """A name as a string of Python, on one line."""
    return json.dumps(text, ensure_ascii=False)
