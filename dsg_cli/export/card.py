"""The model card of an export, README.md: what was unlearned, what was measured, how to load it, what it cannot do.

Its text is card.md.j2. Names of corpora, benches and models come from others: they stand in it as Markdown code, and
paths are cut to their last part.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from dsg_cli.attacks import ATTACKS
from dsg_cli.data.hub import REPOSITORY, SCHEME, cached_file
from dsg_cli.errors import DsgError
from dsg_cli.evals import PAPER
from dsg_cli.guardrail.loading import without_path
from dsg_cli.guardrail.runtime.gates import CAUSAL_FORMS
from dsg_cli.lab import data as lab
from dsg_cli.methods import finetunes
from dsg_cli.report.evaluations import NOT_MEASURABLE, benches_of, place, ranking, shown_metrics
from dsg_cli.report.rendering import Name, Table, code, escaped, number, one_line, share
from dsg_cli.report.tables import guardrail_rows
from dsg_cli.workspace.artifacts import FeatureSet, Guardrail, Header, Threshold
from dsg_cli.workspace.files import is_file, read_bounded
from dsg_cli.workspace.results import AttackReport, EvalReport, Json
from dsg_cli.workspace.store import Stored

CARD_FILE = "README.md"

LARGEST = 2**20
"""Bytes of a card that is read."""

LONGEST = 300
"""Characters of a licence's name or address."""

LICENCE = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}")

LANGUAGE = re.compile(r"[A-Za-z]{2,3}(?:-[A-Za-z0-9]{2,8})*|code|multilingual")

PATH = re.compile(r"(?<![\w./:])/(?:[^\s/]+/)+")
"""The folders of a path in running text."""

TAGS = ["unlearning", "sparse-autoencoder", "guardrail", "dsg-cli", "arxiv:2504.08192"]


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
    from huggingface_hub import ModelCard

    if source in lab.MODEL_DIRS:
        return BaseCard(licence=("apache-2.0",), languages=("en",))
    path = cached_file(source, CARD_FILE) if REPOSITORY.fullmatch(source) else Path(source) / CARD_FILE
    try:
        text = read_bounded(path, LARGEST).decode("utf-8-sig") if path and is_file(path) else ""
        if not text.lstrip().startswith("---"):
            return BaseCard()
        data = ModelCard(text, ignore_metadata_errors=True).data
    except (
        DsgError,
        yaml.YAMLError,
        ValueError,
        TypeError,
        RecursionError,
    ):  # A card that cannot be read says nothing.
        return BaseCard()
    return BaseCard(
        licence=_matching(data.get("license"), LICENCE),
        licence_name=_printable(data.get("license_name")),
        licence_link=_printable(data.get("license_link")),
        languages=_matching(data.get("language"), LANGUAGE),
    )


def _matching(value: Any, pattern: re.Pattern[str]) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(value for value in values if isinstance(value, str) and pattern.fullmatch(value))


def _printable(value: Any) -> str:
    is_name = isinstance(value, str) and len(value) <= LONGEST and value.isprintable()
    return value.strip() if is_name else ""


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
            newest |= {(bench, body.split): stored for bench in body.results}
        return [(bench, stored) for (bench, _), stored in newest.items()]

    def shown_evaluations(self) -> list[tuple[str, Stored]]:
        """The same without the parts of benches that were asked as a whole."""
        return [(bench, stored) for bench, stored in self.newest_evaluations() if bench in benches_of(stored)]

    def newest_attacks(self) -> list[Stored]:
        """The newest report of every attack on every bench and split."""
        newest: dict[tuple[str, str, str], Stored] = {}
        for stored in self.attacks:
            body = stored.body_as(AttackReport)
            newest[body.attack, body.bench, _split(stored)] = stored
        return list(newest.values())


def _split(stored: Stored) -> str:
    """Which questions an evaluation or an attack asked: `test` or `dev`."""
    if isinstance(stored.body, EvalReport):
        return stored.body.split
    return str(stored.header.settings.get("split", "test"))


def model_card(facts: CardFacts) -> str:
    """The whole text of README.md. In its template every value is escaped but for names, as code, and tables."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("dsg_cli.export", "."),
        finalize=lambda value: value if isinstance(value, Markup) else escaped(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"code": _code, "name": _name, "names": _names, "quoted": _quoted}
    evaluations, attacks = facts.shown_evaluations(), facts.newest_attacks()
    bodies = [stored.body_as(AttackReport) for stored in attacks]
    notes = dict.fromkeys(note for guard in facts.guards for note in _notes(guard))
    text = environment.get_template("card.md.j2").render(
        facts=facts,
        finetunes=finetunes,
        topics=[*map(_name, facts.forget), *(_code(guard.query) for guard in facts.guards if guard.query)],
        gates={guard.body.gate for guard in facts.guards},
        methods={guard.body.method for guard in facts.guards},
        notes=[PATH.sub("", note) for note in notes],
        sources=Markup("".join(f" --from {guard.stored.id}" for guard in facts.guards)),
        evaluations=list({stored.id: stored for _, stored in evaluations}.values()),
        asks_paper=any(bench in PAPER for bench, _ in evaluations),
        threat_models={body.attack: body.threat_model for body in bodies},
        untried=[_code(kind) for kind in ATTACKS if kind not in {body.attack for body in bodies}],
        can_write=all(guard.body.gate in CAUSAL_FORMS for guard in facts.guards),
        base_remark=_base_remark(facts.model),
        base_arguments=_base_arguments(facts),
        files=[f"{SCHEME if facts.is_on_hub else ''}{facts.address}/{guard.file}" for guard in facts.guards],
        guardrail_tables=[_guardrail_table(guard) for guard in facts.guards],
        rate_tables=[_rate_table(guard.calibration) for guard in facts.guards],
        bench_table=_table(
            ("bench", "split", "base", "guarded", "gated", "n", "from"),
            (row for bench, stored in evaluations for row in _bench_rows(bench, stored)),
        ),
        attack_table=_table(
            ("attack", "bench", "split", "before", "worst", "at", "base there", "n", "from"),
            _attack_rows(attacks),
        ),
        facts_table=_table(("", ""), ([name, Name(value)] for name, value in _provenance(facts))),
        artifact_table=_table(("artifact", "made", "by", "seed", "sha256"), _artifact_rows(facts)),
    )
    return front_matter(facts) + "\n" + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def front_matter(facts: CardFacts) -> str:
    """The YAML block, fences included. What is not known has no field."""
    from huggingface_hub import EvalResult, ModelCardData

    card, repository = facts.base_card, REPOSITORY.fullmatch(facts.base)
    fields: Json = {"license": card.licence[0] if len(card.licence) == 1 else list(card.licence)}
    fields |= {"license_name": card.licence_name, "license_link": card.licence_link}
    fields = {key: value for key, value in fields.items() if value and card.licence}
    if repository:
        # Nothing is trained: the base's weights stay as they are, and something small is put on them.
        fields |= {"base_model": repository[1], "base_model_relation": "finetune" if facts.lineage else "adapter"}
    results = []
    for bench, stored in facts.shown_evaluations():
        unlearned = stored.body_as(EvalReport).results[bench]["unlearned"]
        n = f", n = {unlearned['n']}" if "n" in unlearned else ""
        for metric in shown_metrics({"unlearned": unlearned}):
            if metric in unlearned:
                kind = "accuracy" if metric == "acc" else one_line(metric)
                results.append(
                    EvalResult(
                        task_type="text-generation",
                        task_name="Text generation",
                        dataset_type=one_line(bench),
                        dataset_name=one_line(bench),
                        dataset_split=_split(stored),
                        metric_type=kind,
                        metric_value=unlearned[metric],
                        metric_name=f"{kind} under the guardrail{n} ({stored.id})",
                    )
                )
    data = ModelCardData(
        language=list(card.languages) or None,
        library_name="transformers" if facts.is_whole_model else "dsg-cli",
        pipeline_tag="text-generation",
        tags=TAGS,
        model_name=one_line(facts.name),
        eval_results=results or None,
        **fields,
    )
    if not results:
        del data.model_name
    return f"---\n{data.to_yaml()}\n---\n"


def _code(text: str) -> Markup:
    return Markup(code(text))


def _name(name: str) -> Markup:
    """A model or corpus: of a path, the last part."""
    return _code(without_path(name))


def _names(names: Iterable[str]) -> Markup:
    return Markup(", ".join(map(_name, names)) or "no corpus")


def _quoted(text: str) -> Markup:
    """A name as a string of Python, on one line."""
    return Markup(json.dumps(text, ensure_ascii=False))


def _table(columns: Iterable[str], rows: Iterable[list[str]]) -> Markup:
    return Markup(Table(list(columns), list(rows)).markdown())


def _notes(guard: CardGuard) -> list[str]:
    chain = [stored for stored in (guard.features, guard.threshold, guard.stored) if stored]
    return [note for stored in chain for note in stored.header.notes]


def _base_remark(model: str) -> str:
    """What to know before the model that the guardrails are put on is loaded."""
    if model in lab.MODEL_DIRS:
        return Markup("# `dsg lab export lab` writes it.")
    return "" if REPOSITORY.fullmatch(model) else Markup("# The model that it was made for, wherever it lies.")


def _base_arguments(facts: CardFacts) -> Markup:
    """By which it is loaded."""
    match, source = REPOSITORY.fullmatch(facts.model), facts.model
    if match:
        source = match[1]
    elif facts.model in lab.MODEL_DIRS:
        source = f"lab/{lab.MODEL_DIRS[facts.model].name}"
    revision = f", revision={_quoted(match[2])}" if match and match[2] else ""
    remote_code = ", trust_remote_code=True" if any(guard.header.trust_remote_code for guard in facts.guards) else ""
    return Markup(f"{_quoted(source)}{revision}{remote_code}")


def _guardrail_table(guard: CardGuard) -> Markup:
    rows = [("guardrail", guard.stored.id), *guardrail_rows(guard.body), ("digest", guard.key)]
    return _table(("", ""), ([name, Name(value)] for name, value in rows))


def _rate_table(body: Threshold | None) -> str:
    """How often the gate opens on text that is not to be forgotten, and on text that is; nothing if not measured."""
    if body is None:
        return ""
    rows = []
    if body.false_positive_rate is not None:
        bounds = f"{body.false_positive_rate:.3f} [{body.low:.3f}, {body.high:.3f}]"
        rows.append(["all retain text", "to keep", bounds, str(body.n_fresh)])
    for rate in body.rates:
        bounds = f"{rate['rate']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]"
        name = Name(without_path(rate["what"]))
        rows.append([name, "to forget" if rate["is_forget"] else "to keep", bounds, str(rate["n"])])
    return _table(("text", "", "gated", "n"), rows) if rows else ""


def _bench_rows(bench: str, stored: Stored) -> Iterator[list[str]]:
    """A row a metric."""
    body = stored.body_as(EvalReport)
    sides, gate = body.results[bench], body.gate.get(bench)
    for metric in shown_metrics(sides):
        yield [
            Name(bench if metric == "acc" else f"{bench}.{metric}"),
            Name(body.split),
            _with_interval(sides["base"], metric),
            _with_interval(sides["unlearned"], metric),
            share(gate["rate"] if gate else None, 3),
            str(sides["unlearned"].get("n", "-")),
            Name(stored.id),
        ]


def _attack_rows(attacks: list[Stored]) -> Iterator[list[str]]:
    """The point of each attack at which most came back."""
    stored_by_body = {id(stored.body): stored for stored in attacks}
    for body in ranking([stored.body_as(AttackReport) for stored in attacks]):
        stored, summary = stored_by_body[id(body)], body.summary
        at = (summary["worst_x"], summary["worst_variant"])
        worst: Json = next((point["unlearned"] for point in body.curve if (point["x"], point["variant"]) == at), {})
        n = worst.get("n", body.before["unlearned"].get("n"))
        yield [
            Name(body.attack),
            Name(body.bench),
            Name(_split(stored)),
            share(summary["forget_acc_before"], 3),
            _with_interval(worst, "forget") if summary["n_measurable"] else NOT_MEASURABLE,
            Name(place(body)),
            share(summary["unguarded_at_worst"], 3),
            "-" if n is None else str(n),
            Name(stored.id),
        ]


def _with_interval(side: Json, metric: str) -> str:
    """A value and its 95 % interval; `forget` is the forget accuracy under an attack."""
    value = side.get("forget_acc" if metric == "forget" else metric)
    values = [value, side.get(f"{metric}_low"), side.get(f"{metric}_high")]
    shown, *bounds = [share(x, 3) if metric in ("acc", "forget") else number(x) for x in values]
    return f"{shown} [{', '.join(bounds)}]" if None not in values else shown


def _provenance(facts: CardFacts) -> list[tuple[str, str]]:
    """Model, SAEs, corpora and versions."""
    header = facts.guards[0].header
    model = header.model
    rows = [
        ("model", f"{without_path(model.source)}, {model.n_layers} layers, width {model.width}"),
        ("its fingerprint", f"{model.fingerprint} (layers 0 to {model.last_layer})"),
    ]
    for sae in {guard.header.sae.sha256: guard.header.sae for guard in facts.guards if guard.header.sae}.values():
        revision = f" at {sae.revision}" if sae.revision else ""
        rows.append(("SAE", f"{without_path(sae.source)}{revision}, {sae.n_features} features, at {sae.hook}"))
        rows.append(("its weights", sae.sha256))
    corpora = {(role, corpus["name"]): corpus for guard in facts.guards for role, corpus in _corpora(guard)}
    for (role, name), corpus in corpora.items():
        revision = f" at {corpus['revision']}" if corpus.get("revision") else ""
        rows.append((role, f"{without_path(name)}{revision}, texts {corpus['sha256']}"))
    versions = ", ".join(f"{name} {version}" for name, version in header.packages.items())
    return [*rows, ("versions", versions), ("run", f"{header.device}, {header.dtype}")]


def _corpora(guard: CardGuard) -> list[tuple[str, Json]]:
    """Corpora that calibration read, or the method itself: their names and digests."""
    settings = (guard.threshold or guard.stored).header.settings
    corpora = [(role, corpus) for role in ("forget", "retain") for corpus in settings.get(role) or []]
    return [
        (role, corpus) for role, corpus in corpora if isinstance(corpus, dict) and {"name", "sha256"} <= set(corpus)
    ]


def _artifact_rows(facts: CardFacts) -> Iterator[list[str]]:
    """Every artifact that is spoken of, once."""
    origins = [stored for guard in facts.guards for stored in (guard.features, guard.threshold) if stored]
    chain = [*facts.lineage, *origins, *(guard.stored for guard in facts.guards)]
    chain += [*(stored for _, stored in facts.newest_evaluations()), *facts.newest_attacks()]
    for digest, stored in {stored.json["sha256"]: stored for stored in chain}.items():
        header = stored.header
        commit = f" {header.git['commit'][:12]}" if header.git.get("commit") else ""
        changed = " with changes" if commit and header.git.get("dirty") else ""
        made_by = Name(f"dsg-cli {header.dsg_version}{commit}{changed}")
        yield [Name(stored.id), Name(header.created), made_by, str(header.seed), Name(digest)]
