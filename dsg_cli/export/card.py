"""The model card of an export, README.md: what was unlearned, what was measured, how to load it, what it cannot do.

Names of corpora, benches and models come from others: they stand in it as Markdown code, and paths are cut to their
last part.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dsg_cli.attacks import ATTACKS
from dsg_cli.data.hub import REPOSITORY, SCHEME, cached_file
from dsg_cli.errors import DsgError
from dsg_cli.evals import PAPER
from dsg_cli.guardrail.loading import without_path
from dsg_cli.guardrail.runtime.gates import CAUSAL_FORMS
from dsg_cli.lab import data as lab
from dsg_cli.methods import finetunes
from dsg_cli.report.evaluations import NOT_MEASURABLE, place, ranking, shown_benches, shown_metrics
from dsg_cli.report.rendering import Table, code, escaped, number, one_line
from dsg_cli.report.tables import guardrail_rows
from dsg_cli.workspace.artifacts import FeatureSet, Guardrail, Header, ModelWeights, Threshold
from dsg_cli.workspace.files import is_file, read_bounded
from dsg_cli.workspace.results import AttackReport, EvalReport, Json
from dsg_cli.workspace.store import Stored

CARD_FILE = "README.md"

FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)

LARGEST = 2**20

LICENCE = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}")

LANGUAGE = re.compile(r"[A-Za-z]{2,3}(?:-[A-Za-z0-9]{2,8})*|code|multilingual")

LONGEST = 300


@dataclass(frozen=True)
class BaseCard:
    """What is known of a base model; empty where its card does not say."""

    licence: tuple[str, ...] = ()
    """Identifiers, as the hub spells them."""
    licence_name: str = ""
    licence_link: str = ""
    languages: tuple[str, ...] = ()


def read_base_card(source: str) -> BaseCard:
    """The base model's card, from its folder or from the local cache; nothing is downloaded.

    Args:
        source: A model of the lab, a folder by its absolute path, or a repository at a commit.
    """
    if source in lab.MODEL_DIRS:
        return BaseCard(licence=("apache-2.0",), languages=("en",))
    path = cached_file(source, CARD_FILE) if REPOSITORY.fullmatch(source) else Path(source) / CARD_FILE
    try:
        text = read_bounded(path, LARGEST).decode("utf-8-sig") if path and is_file(path) else ""
        match = FRONT_MATTER.match(text)
        said = yaml.safe_load(match[1]) if match else None
    except (DsgError, yaml.YAMLError, ValueError, RecursionError):  # A card that cannot be read says nothing.
        return BaseCard()
    if not isinstance(said, dict):
        return BaseCard()
    return BaseCard(
        licence=_codes(said.get("license"), LICENCE),
        licence_name=_short(said.get("license_name")),
        licence_link=_short(said.get("license_link")),
        languages=_codes(said.get("language"), LANGUAGE),
    )


def _codes(said: Any, pattern: re.Pattern[str]) -> tuple[str, ...]:
    several = said if isinstance(said, list) else [said]
    return tuple(one for one in several if isinstance(one, str) and pattern.fullmatch(one))


def _short(said: Any) -> str:
    is_name = isinstance(said, str) and len(said) <= LONGEST and said.isprintable()
    return said.strip() if is_name else ""


@dataclass(frozen=True)
class CardGuard:
    """One guardrail of an export."""

    stored: Stored
    key: str
    """Digest of what it does: numbers and tensors."""
    file: str
    """Its light file's name."""
    threshold: Stored | None
    features: Stored | None
    """What it was made from, if that lies beside it."""

    @property
    def header(self) -> Header:
        return self.stored.header

    @property
    def body(self) -> Guardrail:
        return self.stored.body_as(Guardrail)

    @property
    def query(self) -> str:
        """The words by which its features were picked, if they were; else nothing."""
        described = self.features.body_as(FeatureSet).described if self.features is not None else {}
        return str(described.get("query", ""))

    @property
    def calibration(self) -> Threshold | None:
        return self.threshold.body_as(Threshold) if self.threshold is not None else None


@dataclass(frozen=True)
class CardFacts:
    """What is exported, and what is known of it."""

    name: str
    """Of the folder or the repository."""
    address: str
    """By which it is loaded: the folder's name, or `org/name` on the hub."""
    is_on_hub: bool
    is_whole_model: bool
    architecture: str
    model: str
    """What the guardrails are on, by its name."""
    base: str
    """What that was made from, before any method trained it: usually the same."""
    base_card: BaseCard
    guards: list[CardGuard]
    lineage: list[Stored]
    """Trainings between the base and the model, the first one first."""
    evaluations: list[Stored]
    """Of exactly these guardrails together, on the weights that they were made for; oldest first."""
    attacks: list[Stored]
    is_mismatched: bool
    """They were put on other weights: nothing was measured there."""

    @property
    def forget(self) -> list[str]:
        """Corpora to forget, each once."""
        return list(dict.fromkeys(name for guard in self.guards for name in guard.body.forget))

    @property
    def retain(self) -> list[str]:
        """Corpora to retain, each once."""
        names = dict.fromkeys(name for guard in self.guards for name in guard.body.retain)
        return [name for name in names if name not in self.forget]

    def newest_evaluations(self) -> list[tuple[str, Stored]]:
        """Every bench and split with the newest evaluation that asked it."""
        newest: dict[tuple[str, str], Stored] = {}
        for stored in self.evaluations:
            body = stored.body_as(EvalReport)
            for bench in body.results:
                newest[bench, body.split] = stored
        return [(bench, stored) for (bench, _), stored in newest.items()]

    def newest_attacks(self) -> list[Stored]:
        """The newest report of every attack on every bench and split."""
        newest: dict[tuple[str, str, str], Stored] = {}
        for stored in self.attacks:
            body = stored.body_as(AttackReport)
            newest[body.attack, body.bench, split_of(stored)] = stored
        return list(newest.values())


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """As Markdown."""
    return Table(columns, rows).markdown()


def split_of(stored: Stored) -> str:
    """Which questions an evaluation or an attack asked: `test` or `dev`."""
    if isinstance(stored.body, EvalReport):
        return stored.body.split
    return str(stored.header.settings.get("split", "test"))


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


TASK = {"type": "text-generation", "name": "Text generation"}

TAGS = ["unlearning", "sparse-autoencoder", "guardrail", "dsg-cli", "arxiv:2504.08192"]


def front_matter(facts: CardFacts) -> str:
    """The YAML block, fences included. What is not known has no field."""
    fields: Json = _licence_fields(facts.base_card)
    if repository := REPOSITORY.fullmatch(facts.base):
        # Nothing is trained: the base's weights stay as they are, and something small is put on them.
        fields |= {"base_model": repository[1], "base_model_relation": "finetune" if facts.lineage else "adapter"}
    fields["library_name"] = "transformers" if facts.is_whole_model else "dsg-cli"
    fields["pipeline_tag"] = "text-generation"
    if facts.base_card.languages:
        fields["language"] = list(facts.base_card.languages)
    fields["tags"] = TAGS
    results = [_result(bench, stored) for bench, stored in named(facts)]
    if results := [one for one in results if one["metrics"]]:
        fields["model-index"] = [{"name": one_line(facts.name), "results": results}]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n"


def named(facts: CardFacts) -> list[tuple[str, Stored]]:
    """The newest evaluation of every bench, without the parts of those that were asked as a whole."""
    shown = [(bench, stored, _shown(stored)) for bench, stored in facts.newest_evaluations()]
    return [(bench, stored) for bench, stored, benches in shown if bench in benches]


def _shown(stored: Stored) -> list[str]:
    return shown_benches(stored.body_as(EvalReport), stored.header.settings.get("benches", []))


def _licence_fields(card: BaseCard) -> Json:
    if not card.licence:
        return {}
    fields: Json = {"license": card.licence[0] if len(card.licence) == 1 else list(card.licence)}
    named = {"license_name": card.licence_name, "license_link": card.licence_link}
    return fields | {key: value for key, value in named.items() if value}


def _result(bench: str, stored: Stored) -> Json:
    """What the guarded model reached on a bench."""
    after = stored.body_as(EvalReport).results[bench]["unlearned"]
    dataset = {"type": one_line(bench), "name": one_line(bench), "split": split_of(stored)}
    return {
        "task": TASK.copy(),
        "dataset": dataset,
        "metrics": [
            _metric(metric, after, stored) for metric in shown_metrics({"unlearned": after}) if metric in after
        ],
    }


def _metric(metric: str, after: dict[str, Any], stored: Stored) -> Json:
    kind = "accuracy" if metric == "acc" else one_line(metric)
    n = f", n = {after['n']}" if "n" in after else ""
    return {"type": kind, "value": after[metric], "name": f"{kind} under the guardrail{n} ({stored.id})"}


NO_EVALUATION = """No evaluation of it was at hand. This makes one; a further export puts it here:

```bash
{commands}
```"""

ABOUT = (
    "Base: the same model without the guardrail, asked the same. Brackets: 95 % intervals. Gated: share of what was "
    "asked on which the gate opened. Accuracy, unless a metric is named. From: the artifact that holds the number."
)

ABOUT_PAPER = (
    "Benches of the paper's protocol ask only what the base model answers rightly in every order of the options: "
    "its accuracy there is 1 by construction."
)

ABOUT_ATTACKS = "Accuracy on what was to be forgotten, where most came back; base: without the guardrail, there too."


def measured_section(facts: CardFacts) -> str:
    """The section, with what is missing and how to make it."""
    if facts.is_mismatched:
        evaluations = "It was put on other weights than those it was made for. Nothing was measured on these."
        return f"## What was measured\n\n{evaluations}\n\n{_false_positives(facts)}"
    parts = [_evaluations(facts), "### False positives", _false_positives(facts), "### Attacks", _attacks(facts)]
    return "\n\n".join(["## What was measured", *parts])


def _evaluations(facts: CardFacts) -> str:
    found = named(facts)
    if not found:
        return NO_EVALUATION.format(commands=f"dsg eval{_sources(facts)} --bench BENCH")
    rows = [row for bench, stored in found for row in _bench_rows(bench, stored)]
    used = {stored.id: stored for _, stored in found}
    parts = [
        table(["bench", "split", "base", "guarded", "gated", "n", "from"], rows),
        ABOUT + (f" {ABOUT_PAPER}" if any(bench in PAPER for bench, _ in found) else ""),
        "\n".join(f"- {code(name)}: {_asked(stored)}" for name, stored in used.items()),
    ]
    return "\n\n".join(parts)


def _bench_rows(bench: str, stored: Stored) -> Iterator[list[str]]:
    """A row a metric."""
    body = stored.body_as(EvalReport)
    sides, gate = body.results[bench], body.gate.get(bench)
    for metric in shown_metrics(sides):
        yield [
            code(bench if metric == "acc" else f"{bench}.{metric}", in_table=True),
            code(body.split, in_table=True),
            _with_interval(sides["base"], metric),
            _with_interval(sides["unlearned"], metric),
            _share(gate["rate"] if gate else None),
            str(sides["unlearned"].get("n", "-")),
            code(stored.id, in_table=True),
        ]


def _asked(stored: Stored) -> str:
    """How an evaluation asked, in words."""
    settings, body = stored.header.settings, stored.body_as(EvalReport)
    limit, n_shots = settings.get("limit"), settings.get("num_fewshot")
    said = [
        f"made {code(stored.header.created)} in {code(stored.header.dtype)}",
        {"test": "test questions", "dev": "dev questions, on which settings may have been chosen"}.get(body.split, ""),
        f"the first {limit} of each bench" if limit else "",
        f"{n_shots} examples in front" if n_shots else "",
        "in the chat template" if settings.get("apply_chat_template") else "",
    ]
    return ", ".join(one for one in said if one) + "."


def _false_positives(facts: CardFacts) -> str:
    return "\n\n".join(_rates(guard, len(facts.guards) > 1) for guard in facts.guards)


def _rates(guard: CardGuard, is_one_of_several: bool) -> str:
    """How often the gate opens on text that is not to be forgotten, and on text that is."""
    said = f"{code(guard.stored.id)}: " if is_one_of_several else ""
    if guard.body.gate == "token":
        return f"{said}There is no gate: every token on which a feature is hot is clamped, in any text."
    found = guard.calibration
    if found is None or guard.threshold is None:
        return f"{said}Not known here: the threshold that it was made from was not at hand."
    lengths = guard.threshold.header.settings.get("lengths")
    at = f" of {lengths[0]} to {lengths[1]} tokens" if lengths else ""
    each = "each retain corpus" if found.guarantee == "each" else "all retain corpora together"
    settings = guard.threshold.header.settings
    promise = f"The threshold was set so that {found.alpha:g} of further texts{at} like those of {each} are gated. "
    if settings.get("threshold") is not None:
        promise = "The threshold was given, not calibrated: nothing promises how much is gated. "
    elif settings.get("quantile") == "percentile":
        promise = f"The threshold is the percentile of retain text that {found.alpha:g} exceeded; it promises nothing. "
    promise = f"{said}{promise}What it gates of fresh documents (from {code(guard.threshold.id)}):"
    rows = [
        [
            code(without_path(one["what"]), in_table=True),
            "to forget" if one["is_forget"] else "to keep",
            f"{one['rate']:.3f} [{one['low']:.3f}, {one['high']:.3f}]",
            str(one["n"]),
        ]
        for one in found.rates
    ]
    if found.false_positive_rate is not None:
        together = f"{found.false_positive_rate:.3f} [{found.low:.3f}, {found.high:.3f}]"
        rows.insert(0, ["all retain text", "to keep", together, str(found.n_fresh)])
    return f"{promise}\n\n{table(['text', '', 'gated', 'n'], rows)}" if rows else f"{promise} nothing was measured."


def _attacks(facts: CardFacts) -> str:
    """The point of each attack at which most came back, and the attacks that were not tried."""
    newest = {id(stored.body): stored for stored in facts.newest_attacks()}
    bodies = [stored.body_as(AttackReport) for stored in newest.values()]
    tried = {body.attack for body in bodies}
    command = f"dsg attack{_sources(facts)} --kind all"
    if not bodies:
        return f"None was tried, as far as is known here. This tries all:\n\n```bash\n{command}\n```"
    rows = [_attack_row(body, newest[id(body)]) for body in ranking(bodies)]
    by = {body.attack: f"- {code(body.attack)}: {escaped(body.threat_model)}" for body in bodies}
    missing = [kind for kind in ATTACKS if kind not in tried]
    parts = [
        table(["attack", "bench", "split", "before", "worst", "at", "base there", "n", "from"], rows),
        ABOUT_ATTACKS,
        "\n".join(by.values()),
        f"Not tried: {', '.join(map(code, missing))} (`dsg attack`)." if missing else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _attack_row(body: AttackReport, stored: Stored) -> list[str]:
    found = body.summary
    worst: Json = next(
        (p["unlearned"] for p in body.curve if (p["x"], p["variant"]) == (found["worst_x"], found["worst_variant"])), {}
    )
    n = worst.get("n", body.before["unlearned"].get("n"))
    return [
        code(body.attack, in_table=True),
        code(body.bench, in_table=True),
        code(split_of(stored), in_table=True),
        _share(found["forget_acc_before"]),
        _with_interval(worst, "forget") if found["n_measurable"] else NOT_MEASURABLE,
        code(place(body), in_table=True),
        _share(found["unguarded_at_worst"]),
        "-" if n is None else str(n),
        code(stored.id, in_table=True),
    ]


def _with_interval(side: Json, metric: str) -> str:
    """A value and its 95 % interval."""
    shown = _share if metric in ("acc", "forget") else number
    value = side.get("forget_acc" if metric == "forget" else metric)
    low, high = side.get(f"{metric}_low"), side.get(f"{metric}_high")
    has_interval = value is not None and low is not None and high is not None
    return shown(value) + (f" [{shown(low)}, {shown(high)}]" if has_interval else "")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _sources(facts: CardFacts) -> str:
    """`--from` of what is exported."""
    return "".join(f" --from {guard.stored.id}" for guard in facts.guards)


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
        what = "taught" if finetunes(body.method) else f"made to forget {_names(body.forget)}"
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
