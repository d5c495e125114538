"""The model card of an export, README.md: what was unlearned, what was measured, how to load it, what it cannot do.

Names of corpora, benches and models come from others: they stand in it as Markdown code, and paths are cut to their
last part.
"""

from __future__ import annotations

import re

from dsg_cli.artifacts import Header, Json, ModelWeights
from dsg_cli.export.card_facts import CardFacts, CardGuard
from dsg_cli.export.card_loading import loading_section
from dsg_cli.export.card_metadata import front_matter
from dsg_cli.export.card_numbers import measured_section
from dsg_cli.export.light import without_path
from dsg_cli.methods.names import teaches
from dsg_cli.report.guardrails import guardrail_rows
from dsg_cli.report.markdown import code, escaped, table

PATH = re.compile(r"(?<![\w./:])/(?:[^\s/]+/)+")
METHOD = """Dynamic guardrails on a sparse autoencoder ([arXiv 2504.08192](https://arxiv.org/abs/2504.08192)): a few
features are watched, and clamped in sequences on which they fire too much."""
OTHER_METHOD = "Features of a sparse autoencoder are clamped while the model runs."
UNTOUCHED = "The weights of the model are as they were."
LIMITS = """## What it does not protect from

- The knowledge is still in the weights{here}. Whoever holds them can take the guardrail off. It protects a model behind
  an API, not a published one.
- A gate can be talked past: with harmless text around a question, in other words, by a search. What was tried is above;
  that it withstood something proves nothing.
- Fine-tuning moves what the gate reads, unless the layers below it are frozen.
- It blocks some harmless text: longer text more often than was promised, and text that no retain corpus is about.
- A clamped answer is wrong or gibberish, not a refusal."""
MEAN_GATE = """
- Its gate is a mean over the sequence, as in the paper: harmless text around a question dilutes it, and it cannot guard
  text while it is written."""


def model_card(facts: CardFacts) -> str:
    """The whole text of README.md."""
    sections = [
        f"# {escaped(facts.name)}",
        _summary(facts),
        _unlearned(facts),
        measured_section(facts),
        _limits(facts),
        loading_section(facts),
        _provenance(facts),
        _licence(facts),
    ]
    return front_matter(facts) + "\n" + "\n\n".join(sections) + "\n"


def _summary(facts: CardFacts) -> str:
    model = f"{code(without_path(facts.model))} ({code(facts.architecture)})"
    words = [code(guard.query) for guard in facts.guards if guard.query]
    topics = ", ".join([*map(_name, facts.forget), *words]) or "what its features stand for"
    about = f"from answering about {topics}"
    is_dsg = any(guard.body.method == "dsg" for guard in facts.guards)
    what = f"The model {model}, guarded to keep it" if facts.is_whole_model else f"A guardrail that is to keep {model}"
    return f"{what} {about}.\n\n{METHOD if is_dsg else OTHER_METHOD} {UNTOUCHED}"


def _unlearned(facts: CardFacts) -> str:
    parts = [f"## What was unlearned\n\nTo forget: {_names(facts.forget)}. To keep: {_names(facts.retain)}."]
    for stored in facts.lineage:
        body = stored.body_as(ModelWeights)
        what = "taught" if teaches(body.method) else f"made to forget {_names(body.forget)}"
        parts.append(f"Before that, the weights were {what} by {code(body.method)} ({code(stored.id)}).")
    for guard in facts.guards:
        if guard.query:
            parts.append(f"Features were picked by their descriptions, for the words {code(guard.query)}.")
        said = [("guardrail", guard.stored.id), *guardrail_rows(guard.body), ("digest", guard.key)]
        parts.append(table(["", ""], [[name, code(value, in_table=True)] for name, value in said]))
    notes = dict.fromkeys(note for guard in facts.guards for note in _notes(guard))
    if notes:
        parts.append("\n".join(f"- {escaped(PATH.sub('', note))}" for note in notes))
    return "\n\n".join(parts)


def _notes(guard: CardGuard) -> list[str]:
    before = [stored.header.notes for stored in (guard.features, guard.threshold) if stored]
    return [note for notes in (*before, guard.header.notes) for note in notes]


def _limits(facts: CardFacts) -> str:
    here = ", which lie in this folder" if facts.is_whole_model else ""
    has_mean = any(guard.body.gate == "mean" for guard in facts.guards)
    return LIMITS.format(here=here) + (MEAN_GATE if has_mean else "")


def _provenance(facts: CardFacts) -> str:
    header = facts.guards[0].header
    chain = [*facts.lineage, *(one for guard in facts.guards for one in (guard.features, guard.threshold) if one)]
    chain += [guard.stored for guard in facts.guards]
    chain += [*(stored for _, stored in facts.newest_evaluations()), *facts.newest_attacks()]
    rows = [
        [code(one.id), code(one.header.created), code(_made_by(one.header)), str(one.header.seed), code(digest)]
        for digest, one in {one.json["sha256"]: one for one in chain}.items()
    ]
    facts_rows = [[name, code(value, in_table=True)] for name, value in _facts(facts, header)]
    listed = table(["artifact", "made", "by", "seed", "sha256"], rows)
    return f"## Provenance\n\n{table(['', ''], facts_rows)}\n\n{listed}"


def _facts(facts: CardFacts, header: Header) -> list[tuple[str, str]]:
    """Model, SAEs, corpora and versions."""
    model = header.model
    rows = [
        ("model", f"{without_path(model.source)}, {model.n_layers} layers, width {model.width}"),
        ("its fingerprint", f"{model.fingerprint} (layers 0 to {model.last_layer})"),
    ]
    for sae in {guard.header.sae.sha256: guard.header.sae for guard in facts.guards if guard.header.sae}.values():
        revision = f" at {sae.revision}" if sae.revision else ""
        rows.append(("SAE", f"{without_path(sae.source)}{revision}, {sae.n_features} features, at {sae.hook}"))
        rows.append(("its weights", sae.sha256))
    read = {(role, one["name"]): one for guard in facts.guards for role, one in _corpora(guard)}
    rows += [
        (role, f"{without_path(name)}{' at ' + one['revision'] if one.get('revision') else ''}, texts {one['sha256']}")
        for (role, name), one in read.items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in header.packages.items())
    return [*rows, ("versions", versions), ("run", f"{header.device}, {header.dtype}")]


def _corpora(guard: CardGuard) -> list[tuple[str, Json]]:
    """Corpora that calibration read, or the method itself: their names and digests."""
    settings = (guard.threshold or guard.stored).header.settings
    listed = [(role, one) for role in ("forget", "retain") for one in settings.get(role) or []]
    return [(role, one) for role, one in listed if isinstance(one, dict) and {"name", "sha256"} <= set(one)]


def _made_by(header: Header) -> str:
    commit = header.git.get("commit", "")[:12]
    changed = " with changes" if header.git.get("dirty") else ""
    return f"dsg-cli {header.dsg_version}" + (f" {commit}{changed}" if commit else "")


def _licence(facts: CardFacts) -> str:
    card, base = facts.base_card, code(without_path(facts.base))
    by_name = f" ({escaped(card.licence_name)})" if card.licence_name else ""
    link = f" Its text: {code(card.licence_link)}." if card.licence_link else ""
    said = f"That of {base}: {', '.join(map(code, card.licence))}{by_name}, as its publisher says.{link}"
    if not card.licence:
        said = f"That of {base}, which is not known here: no card that names one was at hand. Look it up first."
    return f"## Licence\n\n{said} The rows of the SAE in it have the SAE's own licence."


def _name(name: str) -> str:
    return code(without_path(name))


def _names(names: list[str]) -> str:
    return ", ".join(map(_name, names)) or "no corpus"
