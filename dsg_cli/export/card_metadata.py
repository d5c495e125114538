"""The front matter of a model card, in the hub's format: what search and leaderboards read."""

from __future__ import annotations

from typing import Any

import yaml

from dsg_cli.artifacts import EvalReport, Json
from dsg_cli.export.base_card import BaseCard
from dsg_cli.export.card_facts import CardFacts, split_of
from dsg_cli.hub import REPOSITORY
from dsg_cli.report.evaluations import shown_benches
from dsg_cli.report.markdown import one_line
from dsg_cli.report.metrics import shown_metrics
from dsg_cli.workspace import Stored

TASK = {"type": "text-generation", "name": "Text generation"}
TAGS = ["unlearning", "sparse-autoencoder", "guardrail", "dsg-cli", "arxiv:2504.08192"]


def front_matter(facts: CardFacts) -> str:
    """The YAML block, fences included. What is not known has no field."""
    fields: Json = _licence(facts.base_card)
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


def _licence(card: BaseCard) -> Json:
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
