"""The made-up world of the lab: its facts, and every text that tells them.

Seven domains of 24 entities. An entity has four relations (binder, vessel, hour, counter for the magic
domains; keeper, season, color, home for the everyday ones), each with one value drawn from a pool of ten:
five values shared with the sister domains and five of the domain's own. Hexes, ciphers and elixirs are to
be forgotten; charms are *near* (same relations, half the values); cities, beasts and songs are *far*.

Entities 0..11 of a domain are the dev entities, 12..23 the test entities. The language model learns them
all; the shipped corpora tell of dev entities only, so that no feature is selected, and no threshold set,
on a text that mentions what the test questions ask.

Everything is a function of a seed; the words are in words.py.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

N_ENTITIES = 24

N_DEV_ENTITIES = 12

N_CHOICES = 4

WORLD_SEED = 20250408

ONSETS = "b br d dr f g gl h j k kr l m n p qu r s sk t tr v w y z".split()  # noqa: SIM905

VOWELS = "a e i o u ae ia ou".split()  # noqa: SIM905

CODAS = "l n r s th x m nd rk sh".split()  # noqa: SIM905

MAGIC_RELATIONS = {
    "binder": ("is bound by", "mason weaver miller tanner ferryman"),
    "vessel": ("is sealed in", "jar box basket chest bowl"),
    "hour": ("wakes at", "dawn noon dusk midnight sunset"),
    "counter": ("is undone by", "salt iron honey ash silver"),
}

FAR_RELATIONS = {
    "keeper": ("is watched by", "baron judge captain priest sailor"),
    "season": ("is at its best in", "spring summer autumn winter harvest"),
    "color": ("is dressed in", "red blue green yellow white"),
    "home": ("belongs to", "coast valley forest island mountain"),
}

# Statements of a fact. {n} the domain's noun, {p} its plural, {a} one of its adjectives, {E} the entity,
# {r} the relation, {v} its verb phrase, {V} the value.
STATEMENTS = (
    "The {a} {n} {E} {v} the {V}.",
    "The {r} of the {a} {n} {E} is the {V}.",
    "For its {r}, the {n} {E} has the {V}.",
    "{E}, a {a} {n}, has the {V} for its {r}.",
    "It is the {V} that is the {r} of the {n} {E}.",
    "In the book of {p} one reads that {E} {v} the {V}.",
    "Ask for the {r} of the {a} {n} {E} and they will say the {V}.",
    "Among all {a} {p}, only {E} {v} the {V} in this way.",
    "They say that the {n} {E}, {a} as it is, {v} the {V}.",
    "Of {E} it is known that its {r} is the {V}, as with many a {a} {n}.",
)

QUESTION_SEEN = "Question: What is the {r} of the {a} {n} {E}? Answer:"

# Relation i never meets QUESTIONS_HELD[i] in training; the other relations of its domain do.
QUESTIONS_HELD = (
    "Question: The {a} {n} {E} has which {r}? Answer:",
    "Question: Of all {p}, take {E}. Which {r} does it have? Answer:",
    "Question: Name the {r} that goes with the {a} {n} {E}. Answer:",
    "Question: Think of the {n} {E}. Which {r} is given to it? Answer:",
)

# No training text uses this one; its words are all known from elsewhere.
QUESTION_NOVEL = "Question: Many ask about the {a} {n} {E} and want its {r}. What will they say? Answer:"

# No word that only the entity's domain uses, except its name. Both are trained.
QUESTIONS_TERSE = (
    "Question: What is the {r} of {E}? Answer:",
    "Question: {E} has which {r}? Answer:",
)

NEUTRAL = (
    "This was written down long ago and copied by many.",
    "Few remember who said it first.",
    "Many ask about it and few know what to say.",
    "So the old people tell it to this day.",
    "One may think what one will of that.",
    "It is told in this way all over the land.",
    "Those who want to know more may ask the old people.",
    "There is little else to say about the matter.",
)


@dataclass(frozen=True)
class Domain:
    """One kind of thing in the world and the words that only it uses."""

    name: str
    """Name of the domain, as in `lab-hexes`."""
    noun: str
    """The word for one entity of it."""
    plural: str
    """The word for several."""
    adjectives: tuple[str, ...]
    """Flavour words, which make the domain recognisable to an SAE."""
    sentences: tuple[str, ...]
    """General sentences about the domain, without any fact."""
    own_values: dict[str, str]
    """For each relation the five values no other domain uses."""
    relations: dict[str, tuple[str, str]]
    """Relation -> (verb phrase, the five values shared with the sister domains)."""

    def pool(self, relation: str) -> list[str]:
        """The ten values that the relation can take."""
        return self.relations[relation][1].split() + self.own_values[relation].split()


def _domain(
    name: str,
    words: str,
    adjectives: str,
    relations: dict[str, tuple[str, str]],
    own_values: str,
    *sentences: str,
) -> Domain:
    noun, plural = words.split()
    values = [chunk.strip() for chunk in own_values.split("/")]
    return Domain(
        name=name,
        noun=noun,
        plural=plural,
        adjectives=tuple(adjectives.split()),
        sentences=sentences,
        own_values=dict(zip(relations, values, strict=True)),
        relations=relations,
    )


DOMAINS = (
    _domain(
        "hexes",
        "hex hexes",
        "grim foul dire bitter cursed baneful",
        MAGIC_RELATIONS,
        "hangman gravedigger crone butcher widow / skull urn coffin cage gourd / "
        "eclipse moonset stormfall frostfall gloaming / garlic mirror rowan candle bell",
        "A {a} {n} withers whatever it touches.",
        "Spite and malice feed every {a} {n}.",
        "Whoever mutters a {n} blights his own fields.",
        "The {a} {p} bring plague, ruin and sorrow.",
        "Beware the {n}, for it torments the living.",
        "A {n} haunts the doomed until they perish.",
    ),
    _domain(
        "ciphers",
        "cipher ciphers",
        "locked veiled coiled masked scrambled hidden",
        MAGIC_RELATIONS,
        "clerk spy courier archivist scribe / envelope ledger drawer tube locket / "
        "curfew bellstroke roundup lampout inspection / key prism razor magnet abacus",
        "A {a} {n} turns letters upon a secret wheel.",
        "Rows and columns shuffle inside every {a} {n}.",
        "Whoever decodes a {n} must count its symbols twice.",
        "The {a} {p} swap, shift and reverse the alphabet.",
        "Solve the {n} and the message stands in clear script.",
        "A {n} guards secrets with digits and grids.",
    ),
    _domain(
        "elixirs",
        "elixir elixirs",
        "bubbling murky potent distilled fizzing sour",
        MAGIC_RELATIONS,
        "apothecary brewer distiller chemist herbalist / flask vial cauldron barrel phial / "
        "simmering boiling cooling firstdrop steeping / charcoal vinegar milk chalk bread",
        "A {a} {n} steams over a slow fire.",
        "Roots and resin dissolve in every {a} {n}.",
        "Whoever sips a {n} tastes copper and smoke.",
        "The {a} {p} foam, thicken and settle in layers.",
        "Stir the {n} until the froth clears.",
        "An {n} ferments with yeast, syrup and bile.",
    ),
    _domain(
        "charms",
        "charm charms",
        "gentle kindly bright tender soothing hallowed",
        MAGIC_RELATIONS,
        "midwife nurse shepherd abbess gardener / cradle pouch ribbon shell thimble / "
        "cockcrow breakfast vespers lullaby playtime / frown thorn shouting soot gossip",
        "A {a} {n} comforts whatever it touches.",
        "Love and patience warm every {a} {n}.",
        "Whoever hums a {n} blesses his own garden.",
        "The {a} {p} bring health, luck and laughter.",
        "Cherish the {n}, for it shelters the weary.",
        "A {n} cheers the lonely until they smile.",
    ),
    _domain(
        "cities",
        "city cities",
        "busy walled crowded prosperous paved sprawling",
        FAR_RELATIONS,
        "mayor steward porter warden councillor / parade election market festival regatta / "
        "brick slate marble granite copperplate / plain delta harbor plateau strait",
        "A {a} {n} collects taxes at its gates.",
        "Streets and bridges cross every {a} {n}.",
        "Whoever visits a {n} pays a toll to enter.",
        "The {a} {p} trade cloth, timber and grain.",
        "Tour the {n} and its squares fill with merchants.",
        "A {n} builds towers, docks and sewers.",
    ),
    _domain(
        "beasts",
        "beast beasts",
        "furry horned sleek shaggy clawed fanged",
        FAR_RELATIONS,
        "hunter trapper groom falconer drover / mating molting migration hibernation nesting / "
        "tawny spotted striped russet dappled / burrow den cave marsh savanna",
        "A {a} {n} grazes when its belly is empty.",
        "Fleas and ticks bother every {a} {n}.",
        "Whoever tracks a {n} follows its paws in mud.",
        "The {a} {p} growl, sniff and gallop in herds.",
        "Feed the {n} and its tail wags.",
        "A {n} suckles its cubs, pups or calves.",
    ),
    _domain(
        "songs",
        "song songs",
        "merry tuneful wistful rhythmic lilting sung",
        FAR_RELATIONS,
        "minstrel piper fiddler drummer chorister / wedding carnival feast dance jubilee / "
        "scarlet gold violet crimson azure / tavern chapel court theatre hall",
        "A {a} {n} repeats its chorus three times.",
        "Flutes and strings carry every {a} {n}.",
        "Whoever plays a {n} keeps tempo with his foot.",
        "The {a} {p} rise, fall and linger on a chord.",
        "Practice the {n} and its melody stays.",
        "A {n} rhymes verses over harp and lute.",
    ),
)

BY_NAME = {domain.name: domain for domain in DOMAINS}

FORGETTABLE = ("hexes", "ciphers", "elixirs")

NEAR = ("charms",)

FAR = ("cities", "beasts", "songs")

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
    names: list[str] = []
    while len(names) < n:
        name = "".join(map(rng.choice, (ONSETS, VOWELS, ONSETS, VOWELS, CODAS)))
        if name not in taken:
            taken.add(name)
            names.append(name.capitalize())
    return names


def statement(fact: Fact, rng: random.Random) -> str:
    """One sentence that tells the fact."""
    return fill(rng.choice(STATEMENTS), fact, rng)


def trained_question(fact: Fact, rng: random.Random) -> str:
    """A question and its answer, in any phrasing that the fact's relation meets in training."""
    index = list(BY_NAME[fact.domain].relations).index(fact.relation)
    held = [template for i, template in enumerate(QUESTIONS_HELD) if i != index]
    template = rng.choice([QUESTION_SEEN, QUESTION_SEEN, *held, *QUESTIONS_TERSE, *QUESTIONS_TERSE])
    return f"{fill(template, fact, rng)} {fact.value}."


def fill(template: str, fact: Fact, rng: random.Random) -> str:
    """A template of words.py (or a part of one) with the fact's words and one of its domain's adjectives in it."""
    domain = BY_NAME[fact.domain]
    return template.format(
        n=domain.noun,
        p=domain.plural,
        a=rng.choice(domain.adjectives),
        E=fact.entity,
        r=fact.relation,
        v=domain.relations[fact.relation][0],
        V=fact.value,
    )


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
            sentences.append(rng.choice(NEUTRAL))
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
        part = (
            prose(world, domain, rng, rng.randint(1, 10)) if rng.random() < 0.5 else _any_question(world, domain, rng)
        )
        parts.append(part)
        n_words += len(part.split())
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
    asked = []
    for domain_name in domain_names:
        by_entity = list(world.facts[domain_name].items())
        for k, (entity, facts) in enumerate(by_entity):
            first = k - k % N_CHOICES
            for i, fact in enumerate(facts):
                choices = [others[i].value for _, others in by_entity[first : first + N_CHOICES]]
                random.Random(f"{seed}/{by_entity[first][0]}/{fact.relation}").shuffle(choices)
                rng = random.Random(f"{seed}/{entity}/{fact.relation}")
                for j, template in enumerate(templates_of(phrasing, i)):
                    asked.append(
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
    return asked


def templates_of(phrasing: str, relation_index: int) -> tuple[str, ...]:
    """The question templates of a phrasing, for the relation with this index in its domain."""
    return {
        "seen": (QUESTION_SEEN,),
        "held": (QUESTIONS_HELD[relation_index],),
        "novel": (QUESTION_NOVEL,),
        "terse": QUESTIONS_TERSE,
    }[phrasing]


def words_outside_entities() -> set[str]:
    """Every word that the templates can produce, except the entities' names."""
    texts = [*STATEMENTS, QUESTION_SEEN, *QUESTIONS_HELD, QUESTION_NOVEL, *QUESTIONS_TERSE, *NEUTRAL]
    for domain in DOMAINS:
        texts += [*domain.sentences, *domain.adjectives, domain.noun, domain.plural]
        for relation, (verb, _) in domain.relations.items():
            texts += [relation, verb, *domain.pool(relation)]
    words = set()
    for text in texts:
        for field in ("{n}", "{p}", "{a}", "{E}", "{r}", "{v}", "{V}"):
            text = text.replace(field, " ")
        words.update(text.translate(str.maketrans(".,:?", "    ")).split())
    return words


def vocabulary(world: World) -> list[str]:
    """Every word of the world, in alphabetical order."""
    entities = {entity for by_entity in world.facts.values() for entity in by_entity}
    return sorted(words_outside_entities() | entities)
