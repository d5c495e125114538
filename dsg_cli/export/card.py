"""The model card of an export, README.md: what was unlearned, what was measured, how to load it, what it cannot do.

Its text is card.md.j2. Names of corpora, benches and models come from others: they stand in it as Markdown code, and
paths are cut to their last part.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
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
from dsg_cli.report.rendering import code, escaped, number, one_line, share
from dsg_cli.report.tables import guardrail_rows
from dsg_cli.workspace.artifacts import FeatureSet, Guardrail, Header, Threshold
from dsg_cli.workspace.body import Json
from dsg_cli.workspace.files import is_file, read_bounded
from dsg_cli.workspace.results import AttackReport, EvalReport
from dsg_cli.workspace.store import Stored

CARD_FILE = "README.md"
LARGEST = 2**20  # Bytes of a card that is read.
LONGEST = 300  # Characters of a licence's name or address.
LICENCE = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}")
LANGUAGE = re.compile(r"[A-Za-z]{2,3}(?:-[A-Za-z0-9]{2,8})*|code|multilingual")
PATH = re.compile(r"(?<![\w./:])/(?:[^\s/]+/)+")  # The folders of a path in running text.
TAGS = ["unlearning", "sparse-autoencoder", "guardrail", "dsg-cli", "arxiv:2504.08192"]


@dataclass(frozen=True)
class BaseCard:
    """What is known of a base model; empty where its card does not say."""

    licence: tuple[str, ...] = ()  # Identifiers, as the hub spells them.
    licence_name: str = ""
    licence_link: str = ""
    languages: tuple[str, ...] = ()


def read_base_card(source: str) -> BaseCard:
    """The base model's card, from its folder or from the local cache; nothing is downloaded.

    The source is a model of the lab, a folder by its absolute path, or a repository at a commit.
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
    except (DsgError, yaml.YAMLError, ValueError, TypeError, RecursionError):
        return BaseCard()  # A card that cannot be read says nothing.
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
    key: str  # Digest of what it does: numbers and tensors.
    file: str  # Its light file's name.
    threshold: Stored | None
    features: Stored | None  # What it was made from, if that lies beside it.

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

    def rates(self) -> list[Json]:
        """How often the gate opens on text that is to be kept, and on text that is to be forgotten, if measured."""
        body = self.calibration
        if body is None:
            return []
        rates = [rate | {"text": _cell(without_path(rate["what"]))} for rate in body.rates]
        if body.false_positive_rate is not None:
            all_text = {"text": "all retain text", "is_forget": False, "n": body.n_fresh}
            rates.insert(0, all_text | {"rate": body.false_positive_rate, "low": body.low, "high": body.high})
        return rates

    def corpora(self) -> list[tuple[str, Json]]:
        """Corpora that calibration read, or the method itself: role, and name with digest."""
        settings = (self.threshold or self.stored).header.settings
        corpora = [(role, corpus) for role in ("forget", "retain") for corpus in settings.get(role) or []]
        return [(role, item) for role, item in corpora if isinstance(item, dict) and {"name", "sha256"} <= set(item)]

    def notes(self) -> list[str]:
        chain = [stored for stored in (self.features, self.threshold, self.stored) if stored]
        return [note for stored in chain for note in stored.header.notes]


@dataclass(frozen=True)
class CardFacts:
    """What is exported, and what is known of it."""

    name: str  # Of the folder or the repository.
    address: str  # By which it is loaded: the folder's name, or `org/name` on the hub.
    is_on_hub: bool
    is_whole_model: bool
    architecture: str
    model: str  # What the guardrails are on, by its name.
    base: str  # What that was made from, before any method trained it: usually the same.
    base_card: BaseCard
    guards: list[CardGuard]
    lineage: list[Stored]  # Trainings between the base and the model, the first one first.
    evaluations: list[Stored]
    """Of exactly these guardrails together, on the weights that they were made for; oldest first."""
    attacks: list[Stored]
    is_mismatched: bool  # They were put on other weights: nothing was measured there.

    @property
    def forget(self) -> list[str]:
        return list(dict.fromkeys(name for guard in self.guards for name in guard.body.forget))

    @property
    def retain(self) -> list[str]:
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

    def artifacts(self) -> list[Stored]:
        origins = [stored for guard in self.guards for stored in (guard.features, guard.threshold) if stored]
        chain = [*self.lineage, *origins, *(guard.stored for guard in self.guards)]
        chain += [*(stored for _, stored in self.newest_evaluations()), *self.newest_attacks()]
        return list({stored.json["sha256"]: stored for stored in chain}.values())


def _split(stored: Stored) -> str:
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
    environment.filters |= {"code": _code, "cell": _cell, "name": _name, "names": _names, "quoted": _quoted}
    environment.filters |= {"without_path": without_path, "share": lambda value: share(value, 3)}
    environment.filters["measured"] = _with_interval
    benches, attacks = facts.shown_evaluations(), facts.newest_attacks()
    threat_models = {body.attack: body.threat_model for body in (stored.body_as(AttackReport) for stored in attacks)}
    text = environment.get_template("card.md.j2").render(
        facts=facts,
        finetunes=finetunes,
        guardrail_rows=guardrail_rows,
        shown_metrics=shown_metrics,
        made_by=_made_by,
        topics=[*map(_name, facts.forget), *(_code(guard.query) for guard in facts.guards if guard.query)],
        gates={guard.body.gate for guard in facts.guards},
        methods={guard.body.method for guard in facts.guards},
        notes=dict.fromkeys(PATH.sub("", note) for guard in facts.guards for note in guard.notes()),
        sources=Markup("".join(f" --from {guard.stored.id}" for guard in facts.guards)),
        benches=benches,
        evaluations=list({stored.id: stored for _, stored in benches}.values()),
        asks_paper=any(bench in PAPER for bench, _ in benches),
        attacks=_attack_rows(attacks),
        threat_models=threat_models,
        untried=[_code(kind) for kind in ATTACKS if kind not in threat_models],
        can_write=all(guard.body.gate in CAUSAL_FORMS for guard in facts.guards),
        repository=REPOSITORY.fullmatch(facts.model),
        lab_folder=f"lab/{lab.MODEL_DIRS[facts.model].name}" if facts.model in lab.MODEL_DIRS else "",
        has_remote_code=any(guard.header.trust_remote_code for guard in facts.guards),
        files=[f"{SCHEME if facts.is_on_hub else ''}{facts.address}/{guard.file}" for guard in facts.guards],
        header=facts.guards[0].header,
        saes={guard.header.sae.sha256: guard.header.sae for guard in facts.guards if guard.header.sae}.values(),
        corpora={(role, corpus["name"]): corpus for guard in facts.guards for role, corpus in guard.corpora()},
        versions=", ".join(f"{name} {version}" for name, version in facts.guards[0].header.packages.items()),
        artifacts=facts.artifacts(),
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
        task: Json = {"task_type": "text-generation", "task_name": "Text generation", "dataset_split": _split(stored)}
        task |= dict.fromkeys(("dataset_type", "dataset_name"), one_line(bench))
        for metric in shown_metrics({"unlearned": unlearned}):
            if metric in unlearned:
                kind = "accuracy" if metric == "acc" else one_line(metric)
                name = f"{kind} under the guardrail{n} ({stored.id})"
                results.append(EvalResult(**task, metric_type=kind, metric_value=unlearned[metric], metric_name=name))
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


def _cell(text: str) -> Markup:
    return Markup(code(text, in_table=True))


def _name(name: str) -> Markup:
    """A model or corpus: of a path, the last part."""
    return _code(without_path(name))


def _names(names: Iterable[str]) -> Markup:
    return Markup(", ".join(map(_name, names)) or "no corpus")


def _quoted(text: str) -> Markup:
    return Markup(json.dumps(text, ensure_ascii=False))


def _attack_rows(attacks: list[Stored]) -> list[Json]:
    """The point of each attack at which most came back, the one that brought back most first."""
    rows = []
    stored_by_body = {id(stored.body): stored for stored in attacks}
    for body in ranking([stored.body_as(AttackReport) for stored in attacks]):
        stored, summary = stored_by_body[id(body)], body.summary
        at = (summary["worst_x"], summary["worst_variant"])
        worst: Json = next((point["unlearned"] for point in body.curve if (point["x"], point["variant"]) == at), {})
        n = worst.get("n", body.before["unlearned"].get("n"))
        row = {"kind": body.attack, "bench": body.bench, "split": _split(stored), "place": place(body), "id": stored.id}
        row |= {"before": summary["forget_acc_before"], "base": summary["unguarded_at_worst"]}
        row["worst"] = _with_interval(worst, "forget") if summary["n_measurable"] else NOT_MEASURABLE
        rows.append(row | {"n": "-" if n is None else n})
    return rows


def _with_interval(side: Json, metric: str) -> Markup:
    """A value and its 95 % interval; `forget` is the forget accuracy under an attack."""
    value = side.get("forget_acc" if metric == "forget" else metric)
    values = [value, side.get(f"{metric}_low"), side.get(f"{metric}_high")]
    shown, *bounds = [share(x, 3) if metric in ("acc", "forget") else number(x) for x in values]
    return Markup(shown if None in values else f"{shown} [{', '.join(bounds)}]")


def _made_by(header: Header) -> str:
    commit = f" {header.git['commit'][:12]}" if header.git.get("commit") else ""
    return f"dsg-cli {header.dsg_version}{commit}{' with changes' if commit and header.git.get('dirty') else ''}"
