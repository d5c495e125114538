"""The made-up world of the lab: its facts, and every text that tells them.

Seven domains of 24 entities. An entity has four relations (binder, vessel, hour, counter for the magic
domains; keeper, season, color, home for the everyday ones), each with one value drawn from a pool of ten:
five values shared with the sister domains and five of the domain's own. Hexes, ciphers and elixirs are to
be forgotten; charms are *near* (same relations, half the values); cities, beasts and songs are *far*.

Entities 0..11 of a domain are the dev entities, 12..23 the test entities. The language model learns them
all; the shipped corpora tell of dev entities only, so that no feature is selected, and no threshold set,
on a text that mentions what the test questions ask.

Everything is a function of a seed; the words are in words.yaml.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

N_ENTITIES, N_DEV_ENTITIES, N_CHOICES = 24, 12, 4
WORLD_SEED = 20250408

WORDS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text(encoding="utf-8"))
STATEMENTS: list[str] = WORDS["statements"]
QUESTIONS: dict[str, list[str]] = WORDS["questions"]
"""Phrasing -> templates; of `held`, the i-th is asked about relation i."""


@dataclass(frozen=True)
class Domain:
    """One kind of thing in the world (its name as in `lab-hexes`) and the words that only it uses."""

    name: str
    noun: str
    plural: str
    adjectives: list[str]
    """Flavour words, which make the domain recognisable to an SAE."""
    sentences: list[str]
    """General sentences about the domain, without any fact."""
    verbs: dict[str, str]
    """Relation -> its verb phrase."""
    own_values: dict[str, list[str]]
    """For each relation the five values no other domain uses."""
    shared_values: dict[str, list[str]]
    """For each relation the five values that sister domains use too."""

    @property
    def relations(self) -> list[str]:
        return list(self.verbs)

    def pool(self, relation: str) -> list[str]:
        """The ten values that the relation can take."""
        return self.shared_values[relation] + self.own_values[relation]


def _domain(name: str, words: dict[str, Any]) -> Domain:
    relations = WORDS["relations"][words["relations"]]
    return Domain(
        name=name,
        noun=words["noun"],
        plural=words["plural"],
        adjectives=words["adjectives"].split(),
        sentences=words["sentences"],
        verbs={relation: row["verb"] for relation, row in relations.items()},
        own_values={relation: values.split() for relation, values in words["values"].items()},
        shared_values={relation: row["shared"].split() for relation, row in relations.items()},
    )


DOMAINS = tuple(_domain(name, words) for name, words in WORDS["domains"].items())

BY_NAME = {domain.name: domain for domain in DOMAINS}

NEAR, FAR = ("charms",), ("cities", "beasts", "songs")

DOMAINS_OF = {
    "lab-hexes": ("hexes",),
    "lab-ciphers": ("ciphers",),
    "lab-elixirs": ("elixirs",),
    "lab-near": NEAR,
    "lab-far": FAR,
    "lab-retain": (*NEAR, *FAR),
}
"""Which domains the corpora and benches are about."""


@dataclass(frozen=True)
class Fact:
    """One entity, one relation, one value."""

    domain: str
    entity: str
    relation: str
    value: str
    is_dev: bool


@dataclass(frozen=True)
class Question:
    """A four-choice cloze: the context, the choices with their leading space, the index of the right one."""

    id: str
    domain: str
    phrasing: str
    split: str
    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class World:
    """All facts of the world, grouped by domain and by entity."""

    facts: dict[str, dict[str, list[Fact]]]
    """domain -> entity -> its four facts, dev entities first."""

    def entities(self, domain: str, *, dev_only: bool = False) -> list[str]:
        names = list(self.facts[domain])
        return names[:N_DEV_ENTITIES] if dev_only else names


def build_world(seed: int = WORLD_SEED) -> World:
    """Draw the entities' names and their values.

    Each run of four entities has four different values of a relation, and each of the four is asked about with
    just these values as choices: a model that answers without regard to the entity scores exactly 0.25.
    """
    rng = random.Random(seed)
    names = _entity_names(rng, n=N_ENTITIES * len(DOMAINS))
    facts: dict[str, dict[str, list[Fact]]] = {}
    for i, domain in enumerate(DOMAINS):
        entities = names[i * N_ENTITIES : (i + 1) * N_ENTITIES]
        values = {r: _even_values(rng, domain.pool(r)) for r in domain.relations}
        facts[domain.name] = {
            entity: [Fact(domain.name, entity, r, values[r][k], k < N_DEV_ENTITIES) for r in domain.relations]
            for k, entity in enumerate(entities)
        }
    return World(facts)


def _even_values(rng: random.Random, pool: Sequence[str]) -> list[str]:
    """Values for all entities in a row: each run of four entities has four different ones."""
    return [value for _ in range(N_ENTITIES // N_CHOICES) for value in rng.sample(pool, N_CHOICES)]


def _entity_names(rng: random.Random, n: int) -> list[str]:
    taken = {word.lower() for word in words_outside_entities()}
    onsets, vowels, codas = (WORDS["names"][part].split() for part in ("onsets", "vowels", "codas"))
    names: list[str] = []
    while len(names) < n:
        name = "".join(map(rng.choice, (onsets, vowels, onsets, vowels, codas)))
        if name not in taken:
            taken.add(name)
            names.append(name.capitalize())
    return names


def statement(fact: Fact, rng: random.Random) -> str:
    """One sentence that tells the fact."""
    return fill(rng.choice(STATEMENTS), fact, rng)


def trained_question(fact: Fact, rng: random.Random) -> str:
    """A question and its answer, in any phrasing that the fact's relation meets in training."""
    index = BY_NAME[fact.domain].relations.index(fact.relation)
    held = [template for i, template in enumerate(QUESTIONS["held"]) if i != index]
    template = rng.choice([*(2 * QUESTIONS["seen"]), *held, *(2 * QUESTIONS["terse"])])
    return f"{fill(template, fact, rng)} {fact.value}."


def fill(template: str, fact: Fact, rng: random.Random) -> str:
    """A template of words.yaml (or a part of one) with the fact's words and one of its domain's adjectives in it."""
    domain = BY_NAME[fact.domain]
    words = {"n": domain.noun, "p": domain.plural, "a": rng.choice(domain.adjectives)}
    return template.format(**words, E=fact.entity, r=fact.relation, v=domain.verbs[fact.relation], V=fact.value)


def prose(world: World, domain_name: str, rng: random.Random, n_sentences: int, *, dev_only: bool = False) -> str:
    """A paragraph about one domain; one in three is about a single entity of it.

    Half of the sentences tell facts, a third are general, the rest neutral.
    """
    domain = BY_NAME[domain_name]
    entities = world.entities(domain_name, dev_only=dev_only)
    hero = rng.choice(entities) if rng.random() < 1 / 3 else None
    sentences = []
    for _ in range(n_sentences):
        kind = rng.random()
        if kind < 0.5:
            fact = rng.choice(world.facts[domain_name][hero or rng.choice(entities)])
            sentences.append(statement(fact, rng))
        elif kind < 0.83:
            text = rng.choice(domain.sentences)
            sentences.append(text.format(n=domain.noun, p=domain.plural, a=rng.choice(domain.adjectives)))
        else:
            sentences.append(rng.choice(WORDS["neutral"]))
    return " ".join(sentences)


def training_document(world: World, rng: random.Random, max_words: int, *, without: Collection[str] = ()) -> str:
    """One document of the language model's training text.

    Short prose, a list of questions, or a long mixture of both across domains (so that a question after
    hundreds of words on something else is still answered). Of the domains in `without` it has not a word.
    """
    domains = [domain.name for domain in DOMAINS if domain.name not in without]
    kind = rng.random()
    if kind < 0.4:
        return prose(world, rng.choice(domains), rng, rng.randint(1, 8))
    if kind < 0.8:
        domain = rng.choice(domains)
        return " ".join(_any_question(world, domain, rng) for _ in range(rng.randint(1, 4)))
    parts: list[str] = []
    target, n_words = rng.randint(20, max_words), 0
    while n_words < target:
        domain = rng.choice(domains)
        is_prose = rng.random() < 0.5
        parts.append(prose(world, domain, rng, rng.randint(1, 10)) if is_prose else _any_question(world, domain, rng))
        n_words += len(parts[-1].split())
    return " ".join(parts)


def _any_question(world: World, domain: str, rng: random.Random) -> str:
    return trained_question(rng.choice(world.facts[domain][rng.choice(world.entities(domain))]), rng)


def corpus(world: World, domain_names: Sequence[str], seed: int, n_documents: int) -> list[str]:
    """Prose documents of 1 to 24 sentences about dev entities, the domains taking turns."""
    rng = random.Random(seed)
    return [
        prose(world, domain_names[i % len(domain_names)], rng, rng.randint(1, 24), dev_only=True)
        for i in range(n_documents)
    ]


def questions(world: World, domain_names: Sequence[str], phrasing: str, seed: int = 0) -> list[Question]:
    """Every fact of the domains as a question.

    The choices are the values that the fact's run of four entities has for the relation (see `build_world`), in the
    same order for all four.
    """
    rows, templates = [], QUESTIONS[phrasing]
    for domain_name in domain_names:
        by_entity = list(world.facts[domain_name].items())
        for k, (entity, facts) in enumerate(by_entity):
            first = k - k % N_CHOICES
            for i, fact in enumerate(facts):
                choices = [others[i].value for _, others in by_entity[first : first + N_CHOICES]]
                random.Random(f"{seed}/{by_entity[first][0]}/{fact.relation}").shuffle(choices)
                rng = random.Random(f"{seed}/{entity}/{fact.relation}")
                for j, template in enumerate(templates[i : i + 1] if phrasing == "held" else templates):
                    rows.append(
                        Question(
                            id=f"{domain_name}/{entity}/{fact.relation}/{phrasing}{j or ''}",
                            domain=domain_name,
                            phrasing=phrasing,
                            split="dev" if fact.is_dev else "test",
                            context=fill(template, fact, rng),
                            choices=tuple(f" {choice}" for choice in choices),
                            answer=choices.index(fact.value),
                        )
                    )
    return rows


def words_outside_entities() -> set[str]:
    """Every word that the templates can produce, except the entities' names."""
    texts = [*STATEMENTS, *itertools.chain(*QUESTIONS.values()), *WORDS["neutral"]]
    for domain in DOMAINS:
        texts += [*domain.sentences, *domain.adjectives, domain.noun, domain.plural]
        for relation, verb in domain.verbs.items():
            texts += [relation, verb, *domain.pool(relation)]
    return {word for text in texts for word in re.sub(r"\{\w\}|[.,:?]", " ", text).split()}


def vocabulary(world: World) -> list[str]:
    """Every word of the world, in alphabetical order."""
    entities = {entity for by_entity in world.facts.values() for entity in by_entity}
    return sorted(words_outside_entities() | entities)
