"""The lab's variants of MUSE and TOFU: rows with the columns of the data sets on the hub, computed from the world.

Hexes are what is forgotten, charms what is retained beside them, ciphers and elixirs stand for TOFU's real authors
and the everyday domains for its facts about the world. The right scores are known: `lab` was trained on all of them,
`lab-retrain` and `lab-retrain-1` never on hexes. Texts and questions are in forms that the model was trained on; what
a row tells of is a dev entity or a test entity, as `part` says.

A document of MUSE's holdout is its counterpart of the forget split with other values: each statement about a run of
four entities gets the value of another entity of that run. So every fact in it is wrong, while each value stands
there as often as in its counterpart, and a model that was never told the facts has nothing to tell the two apart by.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

from dsg_cli.lab.world import (
    BY_NAME,
    FAR,
    N_CHOICES,
    NEAR,
    STATEMENTS,
    Fact,
    World,
    build_world,
    fill,
    questions,
    statement,
)

Part = Literal["dev", "test"]
Row = dict[str, Any]

FORGET, OTHERS = ("hexes",), ("ciphers", "elixirs")

N_DOCUMENTS = 96
"""Documents of each split of PrivLeak."""
N_PROMPTS = 2
"""Prompts of VerbMem a fact."""
N_EXAMPLES = 10
"""Questions to show before the one that is asked."""

VALUE_LAST = tuple(template for template in STATEMENTS if template.endswith(" {V}."))
"""The statements in which all but the value stands before the value."""


def rows(benchmark: Literal["muse", "tofu"], config: str, split: str, *, part: Part) -> list[Row]:
    """The rows of a split of `muse-bench/MUSE-News` or `locuslab/TOFU`, with the lab's texts in them.

    Config and split are the keys of `SPLITS`, spelled as on the hub; `part` is that of the entities (examples in
    context, `_icl`, are about the other part's). Always the same rows: MUSE's `prompt` and `gt`, `question` and
    `answer`, or `text`; TOFU's `question`, `answer`, `perturbed_answer` (a list) and, but for real authors and world
    facts, `paraphrased_answer`. A prompt or question, one space, and what follows is text as in training.
    """
    return SPLITS[benchmark, config, split](build_world(), part)


def _facts(world: World, domain: str, part: Part) -> list[Fact]:
    return [fact for facts in world.facts[domain].values() for fact in facts if fact.is_dev is (part == "dev")]


def _verbatim(world: World, part: Part) -> list[Row]:
    """Statements of facts, split before their value."""
    rows = []
    for fact in _facts(world, *FORGET, part):
        rng = random.Random(f"verbmem/{fact.entity}/{fact.relation}")
        for template in rng.sample(VALUE_LAST, N_PROMPTS):
            rows.append({"prompt": fill(template.removesuffix(" {V}."), fact, rng), "gt": f"{fact.value}."})
    return rows


def _questions(world: World, domains: Sequence[str], part: Part) -> list[Row]:
    """Every fact as a question; the context holds the cue, the answer its full stop."""
    return [
        {"question": question.context, "answer": f"{question.choices[question.answer].strip()}."}
        for question in questions(world, domains, "seen")
        if question.split == part
    ]


def _examples(world: World, domains: Sequence[str], part: Part) -> list[Row]:
    others = _questions(world, domains, "test" if part == "dev" else "dev")
    return random.Random(f"examples/{domains[0]}").sample(others, N_EXAMPLES)


def _documents(world: World, domain: str, part: Part, *, is_true: bool = True) -> list[Row]:
    """Prose that states two relations of a run of four entities, in any order; with true values or exchanged ones."""
    facts, seeds = _facts(world, domain, part), [f"{domain}/{part}/{i}" for i in range(N_DOCUMENTS)]
    return [{"text": " ".join(_statements(facts, seed, is_true=is_true))} for seed in seeds]


def _statements(facts: Sequence[Fact], seed: str, *, is_true: bool) -> Iterator[str]:
    rng = random.Random(f"privleak/{seed}")
    entities = list(dict.fromkeys(fact.entity for fact in facts))
    first = rng.randrange(0, len(entities), N_CHOICES)
    chosen = []
    for relation in rng.sample(BY_NAME[facts[0].domain].relations, 2):
        run = [fact for fact in facts if fact.relation == relation][first : first + N_CHOICES]
        step = rng.randrange(1, N_CHOICES)
        values = [run[(i + (0 if is_true else step)) % N_CHOICES].value for i in range(N_CHOICES)]
        chosen += [replace(fact, value=value) for fact, value in zip(run, values, strict=True)]
    rng.shuffle(chosen)
    for fact in chosen:
        yield statement(fact, rng)


def _perturbed(world: World, domains: Sequence[str], part: Part, *, with_paraphrase: bool = False) -> list[Row]:
    """Questions with wrong answers in the form of the right one: a statement that has the value last, or the value.

    The wrong values are the other four of the relation that are, like the right one, the domain's own or shared with
    its sisters: how likely a value is by itself does not give the right one away.
    """
    facts = [fact for domain in domains for fact in _facts(world, domain, part)]
    rows = []
    for fact, row in zip(facts, _questions(world, domains, part), strict=True):
        rng = random.Random(f"tofu/{fact.entity}/{fact.relation}")
        form = fill(rng.choice(VALUE_LAST).removesuffix("{V}."), fact, rng) if with_paraphrase else ""
        domain = BY_NAME[fact.domain]
        own, shared = domain.own_values[fact.relation], domain.shared_values[fact.relation]
        wrong = [f"{form}{value}." for value in (own if fact.value in own else shared) if value != fact.value]
        paraphrase = {"paraphrased_answer": f"{form}{fact.value}."} if with_paraphrase else {}
        rows.append({**row, **paraphrase, "perturbed_answer": wrong})
    return rows


SPLITS: dict[tuple[str, str, str], Callable[[World, Part], list[Row]]] = {
    ("muse", "verbmem", "forget"): _verbatim,
    ("muse", "knowmem", "forget_qa"): lambda world, part: _questions(world, FORGET, part),
    ("muse", "knowmem", "retain_qa"): lambda world, part: _questions(world, NEAR, part),
    ("muse", "knowmem", "forget_qa_icl"): lambda world, part: _examples(world, FORGET, part),
    ("muse", "knowmem", "retain_qa_icl"): lambda world, part: _examples(world, NEAR, part),
    ("muse", "privleak", "forget"): lambda world, part: _documents(world, *FORGET, part),
    ("muse", "privleak", "retain"): lambda world, part: _documents(world, *NEAR, part),
    ("muse", "privleak", "holdout"): lambda world, part: _documents(world, *FORGET, part, is_true=False),
    ("tofu", "forget10_perturbed", "train"): lambda world, part: _perturbed(world, FORGET, part, with_paraphrase=True),
    ("tofu", "retain_perturbed", "train"): lambda world, part: _perturbed(world, NEAR, part, with_paraphrase=True),
    ("tofu", "real_authors_perturbed", "train"): lambda world, part: _perturbed(world, OTHERS, part),
    ("tofu", "world_facts_perturbed", "train"): lambda world, part: _perturbed(world, FAR, part),
}
